"""Chooses the scale of the perturbation from the trusted examples alone.

Too small a perturbation moves no output and every trace is noise around zero; too large a one turns the network into a
random one. Between them, what decides is how much of the network's function a draw destroys. So the scale is set where
a given share of the trusted outputs survives, whatever the network's size, depth or units: an output survives a draw
while its loss grows by less than ln 2, that is, while it keeps more than half of its probability.
"""

from __future__ import annotations

import math
from functools import partial

import jax
import numpy as np

from madjax.sampling.gaussian import GaussianDraws
from madjax.types import Batch, LossFn, num_examples

# share of trusted outputs that survive a draw
RETAINED = 0.3
PILOT_DRAWS = 8
PILOT_EXAMPLES = 64
_SMALLEST, _LARGEST, _HALVINGS = 1e-5, 1e2, 9


def surviving_share(loss_fn: LossFn, draws: GaussianDraws, examples: Batch) -> float:
    """Share of the outputs on `examples`, in one forward pass a draw, that survive; a loss that overflows does not."""
    losses = [np.asarray(_losses(loss_fn, draws, item, examples)) for item in draws.items()]
    center = np.asarray(_losses(loss_fn, draws.with_scale(0.0), np.int32(0), examples))
    return float(np.mean(np.stack(losses) - center < math.log(2)))


def pilot_examples(trusted: Batch) -> Batch:
    """At most `PILOT_EXAMPLES` of the trusted examples, evenly through the set, which may be sorted by class."""
    count = num_examples(trusted, "trusted")
    chosen = np.linspace(0, count - 1, min(PILOT_EXAMPLES, count)).astype(int)
    return jax.tree.map(lambda leaf: leaf[chosen], trusted)


def choose_scale(loss_fn: LossFn, draws: GaussianDraws, trusted: Batch, retained: float = RETAINED) -> float:
    """The scale at which a share `retained` of the trusted outputs survives the first `PILOT_DRAWS` draws.

    Bisection on the logarithm of the scale, always with the same noise: to within 4 % in scale.

    Args:
      draws: their scales are ignored.
      trusted: with the model's own outputs as labels.

    Raises:
      ValueError: where no scale between 1e-5 and 100 does it.
    """
    if not 0 < retained < 1:
        raise ValueError(f"retained: wanted a share between 0 and 1, got {retained}")
    pilot = pilot_examples(trusted)
    low, high = bounds = math.log(_SMALLEST), math.log(_LARGEST)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        share = surviving_share(loss_fn, draws.with_scale(math.exp(middle), PILOT_DRAWS), pilot)
        low, high = (middle, high) if share > retained else (low, middle)
    if low == bounds[0] or high == bounds[1]:
        fewer_or_more = "fewer" if low == bounds[0] else "more"
        raise ValueError(
            f"trusted: {fewer_or_more} than {retained:.0%} of the outputs survive every scale between {_SMALLEST} and "
            f"{_LARGEST}; do the drawn parameters matter to them?"
        )
    return math.exp((low + high) / 2)


def pilot_forwards(trusted: Batch) -> int:
    """Forward passes of one example that `choose_scale` takes."""
    return _HALVINGS * (PILOT_DRAWS + 1) * min(PILOT_EXAMPLES, num_examples(trusted))


@partial(jax.jit, static_argnums=0)
def _losses(loss_fn: LossFn, draws: GaussianDraws, item: jax.Array, examples: Batch) -> jax.Array:
    return loss_fn(draws.params(item), examples)
