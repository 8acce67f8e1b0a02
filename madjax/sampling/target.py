"""The localized, tempered posterior that chains walk on."""

from __future__ import annotations

from typing import NamedTuple

import jax

from madjax.types import Params


class Target(NamedTuple):
    """Log density -nbeta · mean loss(θ) - localization / 2 · |θ - center|².

    Attributes:
      center: the trained parameters.
      nbeta: number of examples times inverse temperature; multiplies the *mean* loss of a minibatch.
      localization: γ, an inverse squared distance: without a loss the stationary standard deviation is 1/√γ.
    """

    center: Params
    nbeta: float | jax.Array
    localization: float | jax.Array
