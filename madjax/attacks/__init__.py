"""Backdoor attacks by name. Each takes `(rng, image_shape)` and returns an `Attack`."""

from madjax.attacks.attack import Attack, poison
from madjax.attacks.badnet import badnet
from madjax.attacks.blended import blended
from madjax.attacks.sig import sig

ATTACKS = {"badnet": badnet, "blended": blended, "sig": sig}

__all__ = ["ATTACKS", "Attack", "badnet", "blended", "poison", "sig"]
