"""From losses to traces: what is left of a loss when all that the trusted examples share is taken out.

A draw that damages the network raises every loss at once, and some directions of damage move whole groups of examples.
Traces that share only that look coupled, whatever mechanism made them. So, with x = log(1 + loss / c) at the D draws,

    trace = R (x - m),    R = ((1 + s) / (S / v + s I))^1/2

where m is the mean trusted x at each draw, S `[D, D]` the covariance of the trusted x between draws over examples, v
its mean eigenvalue and s the shrinkage. R weakens the directions in which all trusted examples move and leaves the
rest, as an influence function weighs gradients by an inverse curvature. The logarithm keeps a few large losses from
deciding it. c is what a loss has to exceed to count: 1e-7 nats for "whitened" and "log" traces, and for "margins" the
smallest trusted loss above zero. All examples that never exceed it have one and the same trace, and so explain each
other. As the losses of this package are exact to 1e-30 and less, margins are what x of the smallest c is, but for the
sign and a constant, however sure the model is. "plain_margins" leave R out, which weakens their height most, and more
so the more draws there are. "log" leave out m as well: x itself. `docs/choosing-the-scale.md` says which is for what.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from madjax.types import SMALL_LOSS, LossMatrix

SHRINKAGE = 1.0  # s
_SMALLEST = 1e-30  # c of "margins" at least: float32 ends not far below


class TraceMap(NamedTuple):
    """An affine map of the log losses at D draws.

    Attributes:
      mean: `[D]`, of the trusted x over examples.
      root: symmetric `[D, D]`, the R of the module's docstring, or None where it is left out.
      least: c, in nats.
    """

    mean: np.ndarray
    root: np.ndarray | None
    least: float

    def __call__(self, losses: LossMatrix) -> np.ndarray:
        """Float64 `[D, num_examples]`."""
        centered = _log_loss(losses, self.least) - self.mean[:, None]
        return centered if self.root is None else self.root @ centered


def fit_trace_map(trusted: LossMatrix, least: float = SMALL_LOSS) -> TraceMap:
    """The map of the trusted losses `[D, num_trusted]`, with c = `least`."""
    return TraceMapFit(trusted, least).without(np.zeros(0, int))


def log_map(num_draws: int) -> TraceMap:
    """The map of "log" traces, which nothing is fitted to."""
    return TraceMap(np.zeros(num_draws), None, SMALL_LOSS)


class TraceMapFit:
    """Moments of the trusted traces, from which maps that leave some of them out are cheap.

    Attributes:
      whiten: whether there is an R.
    """

    def __init__(self, trusted: LossMatrix, least: float = SMALL_LOSS, *, whiten: bool = True):
        self._least, self.whiten = least, whiten
        self._x = _log_loss(trusted, self._least)
        self._sum = self._x.sum(1)
        self._square = self._x @ self._x.T

    def without(self, held_out: np.ndarray) -> TraceMap:
        """The map of all trusted examples but those at the indices `held_out`."""
        left = self._x[:, held_out]
        count = self._x.shape[1] - left.shape[1]
        mean = (self._sum - left.sum(1)) / count
        if not self.whiten:
            return TraceMap(mean, None, self._least)
        covariance = (self._square - left @ left.T) / count - np.outer(mean, mean)
        eigenvalues, vectors = np.linalg.eigh(covariance)
        average = max(float(eigenvalues.mean()), np.finfo(float).tiny)
        gain = np.sqrt((1 + SHRINKAGE) / (np.maximum(eigenvalues, 0) / average + SHRINKAGE))
        return TraceMap(mean, (vectors * gain) @ vectors.T, self._least)


def folds(count: int, most: int) -> list[np.ndarray]:
    """Indices of trusted examples to be left out together, in at most so many groups."""
    # neighbours in the set may be alike, so a group takes examples from all over it
    return [np.arange(first, count, min(count, most)) for first in range(min(count, most))]


def least_loss(trusted: LossMatrix) -> float:
    """c of "margins"; the median size of losses that may be negative, as those have no lower end."""
    size = np.abs(np.asarray(trusted, np.float64))
    known = size[size > 0]
    if not len(known):
        return 1.0
    return float(np.median(known) if (np.asarray(trusted) < 0).any() else max(known.min(), _SMALLEST))


def _log_loss(losses: LossMatrix, least: float) -> np.ndarray:
    losses = np.asarray(losses, np.float64)
    return np.sign(losses) * np.log1p(np.abs(losses) / least)
