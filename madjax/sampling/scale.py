"""Chooses the scale of the perturbation from the trusted examples alone.

Too small a perturbation moves no output and every trace is noise around zero; too large a one turns the network into a
random one. Between them, what decides is how much of the network's function a draw destroys. So the scale is set where
a given share of the trusted outputs survives, whatever the network's size, depth or units: an output survives a draw
while its loss grows by less than ln 2, that is, while it keeps more than half of its probability.

Where traces keep what all outputs share, a draw need not destroy anything: so small that losses move in proportion to
it, each by its own gradient, it tells more of how outputs come about. That scale is where log losses move by a given
amount.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator

import jax
import numpy as np

from madjax.sampling.gaussian import GaussianDraws
from madjax.sampling.layerwise import at_draws
from madjax.types import SMALL_LOSS, Batch, LossFn, num_examples

# share of trusted outputs that survive a draw
RETAINED = 0.3
# how far log losses move where they move in proportion
MOVED = 0.3
PILOT_DRAWS = 8
PILOT_EXAMPLES = 64
_SMALLEST, _LARGEST, _HALVINGS = 1e-5, 1e2, 9
# log losses move in proportion to the scale, so a few steps of a few draws do
_MOVING_DRAWS, _MOVING_STEPS, _MOST_AT_ONCE = 4, 8, 30.0


def surviving_share(loss_fn: LossFn, draws: GaussianDraws, examples: Batch) -> float:
    """Share of the outputs on `examples`, in one forward pass a draw, that survive; a loss that overflows does not."""
    return float(np.mean(list(_Pilot(loss_fn, draws, examples).shares(draws))))


class _Pilot:
    """What becomes of the losses at the center, draw by draw.

    Attributes:
      num_passes: forward passes of all examples so far.
    """

    def __init__(self, loss_fn: LossFn, draws: GaussianDraws, examples: Batch):
        self._loss_fn, self._examples, self.num_passes = loss_fn, examples, 0
        self._center = next(self._losses(draws.with_scale(0.0)))

    def _losses(self, draws: GaussianDraws) -> Iterator[np.ndarray]:
        at = at_draws(self._loss_fn, draws, self._examples)
        for item in draws.items():
            self.num_passes += 1
            yield np.asarray(at(item))

    def shares(self, draws: GaussianDraws) -> Iterator[float]:
        """One a draw, computed when it is asked for."""
        for losses in self._losses(draws):
            yield float(np.mean(losses - self._center < math.log(2)))

    def exceed(self, draws: GaussianDraws, wanted: float) -> bool:
        """Whether the mean share over the draws exceeds `wanted`, in as few draws as tell."""
        survived = 0.0
        for left, share in zip(reversed(range(draws.num_draws)), self.shares(draws), strict=True):
            survived += share
            if survived > wanted * draws.num_draws:
                return True
            if survived + left <= wanted * draws.num_draws:
                break
        return False

    def moved(self, draws: GaussianDraws) -> float:
        """How far log losses move: root mean square over draws, median over examples; infinite where they overflow."""
        losses = np.stack([self._center, *self._losses(draws)]).astype(np.float64)
        if not np.isfinite(losses).all():
            return math.inf
        center, *others = np.sign(losses) * np.log1p(np.abs(losses) / SMALL_LOSS)
        return float(np.median(np.sqrt(np.square(others - center).mean(0))))


def pilot_examples(trusted: Batch) -> Batch:
    """At most `PILOT_EXAMPLES` of the trusted examples, evenly through the set, which may be sorted by class."""
    count = num_examples(trusted, "trusted")
    chosen = np.linspace(0, count - 1, min(PILOT_EXAMPLES, count)).astype(int)
    return jax.tree.map(lambda leaf: leaf[chosen], trusted)


def choose_scale(
    loss_fn: LossFn, draws: GaussianDraws, trusted: Batch, retained: float = RETAINED
) -> tuple[float, int]:
    """The scale at which a share `retained` of the trusted outputs survives the first `PILOT_DRAWS` draws.

    Bisection on the logarithm of the scale, always with the same noise: to within 4 % in scale.

    Args:
      draws: their scales are ignored.
      trusted: with the model's own outputs as labels.

    Returns:
      The scale, and the forward passes of one example that it took.

    Raises:
      ValueError: where no scale between 1e-5 and 100 does it.
    """
    if not 0 < retained < 1:
        raise ValueError(f"retained: wanted a share between 0 and 1, got {retained}")
    pilot = pilot_examples(trusted)
    draws = draws.with_scale(0.0, PILOT_DRAWS)
    survivors = _Pilot(loss_fn, draws, pilot)
    low, high = bounds = math.log(_SMALLEST), math.log(_LARGEST)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        too_many = survivors.exceed(draws.with_scale(math.exp(middle)), retained)
        low, high = (middle, high) if too_many else (low, middle)
    if low == bounds[0] or high == bounds[1]:
        fewer_or_more = "fewer" if low == bounds[0] else "more"
        raise ValueError(
            f"trusted: {fewer_or_more} than {retained:.0%} of the outputs survive every scale between {_SMALLEST} and "
            f"{_LARGEST}; do the drawn parameters matter to them?"
        )
    return math.exp((low + high) / 2), survivors.num_passes * num_examples(pilot)


def check_moved(moved: float) -> None:
    """Raises ValueError unless log losses that move so far do it in proportion."""
    if not 0 < moved <= 1:
        raise ValueError(f"moved: wanted a number above 0, and 1 at most, got {moved}")


def choose_moving_scale(loss_fn: LossFn, draws: GaussianDraws, trusted: Batch, moved: float) -> tuple[float, int]:
    """The scale at which the trusted log losses move by `moved`, to within a tenth.

    Args and Returns: as `choose_scale`. A log loss moves by its root mean square over draws, the median example counts;
    they are what "log" traces are made of, see `madjax.traces`.

    Raises:
      ValueError: where no scale between 1e-5 and 100 does it.
    """
    check_moved(moved)
    examples = pilot_examples(trusted)
    draws = draws.with_scale(0.0, _MOVING_DRAWS)
    pilot, scale = _Pilot(loss_fn, draws, examples), 1e-3
    for _ in range(_MOVING_STEPS):
        by = pilot.moved(draws.with_scale(scale))
        if abs(by / moved - 1) < 0.1:
            break
        scale *= float(np.clip(moved / max(by, np.finfo(float).tiny), 1 / _MOST_AT_ONCE, _MOST_AT_ONCE))
        if not _SMALLEST < scale < _LARGEST:
            raise ValueError(
                f"trusted: no scale between {_SMALLEST} and {_LARGEST} moves the log losses by {moved}; do the drawn "
                "parameters matter to them?"
            )
    else:
        if not 0.5 < by / moved < 2:
            warnings.warn(
                f"trusted: {_MOVING_STEPS} steps did not find a scale at which the log losses move by {moved}; at the "
                f"last one they moved by {by:.3g}",
                stacklevel=2,
            )
    return scale, pilot.num_passes * num_examples(examples)
