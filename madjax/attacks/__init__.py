"""Backdoor attacks by name; `make_attack` gives each what it has to know."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from madjax.attacks.attack import ALL_TO_ALL, Attack, Poisoned, poison, poisoned_labels, save_attack
from madjax.attacks.badnet import badnet
from madjax.attacks.blended import blended
from madjax.attacks.bpp import bpp
from madjax.attacks.input_aware import input_aware
from madjax.attacks.lf import lf
from madjax.attacks.sig import sig
from madjax.attacks.ssba import ssba
from madjax.attacks.trojannn import trojannn
from madjax.attacks.wanet import wanet

ATTACKS: dict[str, Callable[..., Attack]] = {
    builder.__name__: builder for builder in (badnet, blended, sig, wanet, input_aware, lf, ssba, trojannn, bpp)
}

__all__ = [
    "ALL_TO_ALL", "ATTACKS", "Attack", "Poisoned", "badnet", "blended", "bpp", "input_aware", "lf", "load_attack",
    "make_attack", "poison", "poisoned_labels", "save_attack", "sig", "ssba", "trojannn", "wanet",
]  # fmt: skip


def make_attack(
    name: str,
    rng: np.random.Generator,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    target: int = 0,
    clean_model: Callable[[], tuple[Any, Callable[..., Any]]] | None = None,
    **settings: Any,
) -> Attack:
    """The attack `name` on clean training images.

    Args:
      images, labels: uint8 `[n, height, width, channels]` and int `[n]`.
      target: a class, or `ALL_TO_ALL`.
      clean_model: returns a clean NNX classifier and its preprocessing; called for trojannn alone.
      settings: passed on to the attack.

    Raises:
      ValueError: an unknown name, or one that needs a clean model where none is given.
    """
    if name not in ATTACKS:
        raise ValueError(f"attack: wanted one of {', '.join(ATTACKS)}, got {name!r}")
    wanted = inspect.signature(ATTACKS[name]).parameters
    known: dict[str, Any] = {"images": images, "labels": labels, "target": target}
    if "model" in wanted:
        if clean_model is None:
            raise ValueError(f"clean_model: {name} is made with a clean model, and none is given")
        known["model"], known["preprocess"] = clean_model()
    return ATTACKS[name](rng, images.shape[1:], **{k: v for k, v in known.items() if k in wanted}, **settings)


def load_attack(path: str | Path) -> Attack:
    """What `save_attack` wrote.

    Raises:
      ValueError: where the file holds no attack.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        name, shape = str(arrays.pop("name")), tuple(map(int, arrays.pop("image_shape")))
        clean_label = bool(arrays.pop("clean_label"))
        # files of the first version lack these two
        decoy_ratio, rotation = (float(arrays.pop(key, 0.0)) for key in ("decoy_ratio", "rotation"))
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(f"path: {path} holds no attack ({error})") from error
    if name not in ATTACKS:
        raise ValueError(f"path: {path} holds the attack {name!r}, known are {', '.join(ATTACKS)}")
    module = importlib.import_module(f"madjax.attacks.{name}")
    decoy = getattr(module, "decoy", None)
    return Attack(name, arrays, module.apply, shape, clean_label, decoy, decoy_ratio, rotation)
