"""From losses to traces: what is left of a loss when all that the trusted examples share is taken out.

A draw that damages the network raises every loss at once, and some directions of damage move whole groups of examples.
Traces that share only that look coupled, whatever mechanism made them. So, with x = log(1 + loss / c) at the D draws,

    trace = R (x - m),    R = ((1 + s) / (S / v + s I))^1/2

where m is the mean trusted x at each draw, S `[D, D]` the covariance of the trusted x between draws over examples, v
its mean eigenvalue and s the shrinkage. R weakens the directions in which all trusted examples move and leaves the
rest, as an influence function weighs gradients by an inverse curvature. The logarithm keeps a few large losses from
deciding it, and c, under which a loss counts as none, keeps it from magnifying the rounding of the smallest.
`docs/choosing-the-scale.md` compares it with plain losses.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from madjax.types import LossMatrix

SHRINKAGE = 1.0  # s
SMALL_LOSS = 1e-5  # c, in nats; float32 logits round losses to some 1e-6


class TraceMap(NamedTuple):
    """An affine map of losses at D draws.

    Attributes:
      mean: `[D]`, of the trusted x over examples.
      root: symmetric `[D, D]`, the R of the module's docstring.
    """

    mean: np.ndarray
    root: np.ndarray

    def __call__(self, losses: LossMatrix) -> np.ndarray:
        """Float64 `[D, num_examples]`."""
        return self.root @ (_log_loss(losses) - self.mean[:, None])


def fit_trace_map(trusted: LossMatrix) -> TraceMap:
    """The map of the trusted losses `[D, num_trusted]`."""
    return TraceMapFit(trusted).without(np.zeros(0, int))


class TraceMapFit:
    """Moments of the trusted traces, from which maps that leave some of them out are cheap."""

    def __init__(self, trusted: LossMatrix):
        self._x = _log_loss(trusted)
        self._sum = self._x.sum(1)
        self._square = self._x @ self._x.T

    def without(self, held_out: np.ndarray) -> TraceMap:
        """The map of all trusted examples but those at the indices `held_out`."""
        left = self._x[:, held_out]
        count = self._x.shape[1] - left.shape[1]
        mean = (self._sum - left.sum(1)) / count
        covariance = (self._square - left @ left.T) / count - np.outer(mean, mean)
        eigenvalues, vectors = np.linalg.eigh(covariance)
        average = max(float(eigenvalues.mean()), np.finfo(float).tiny)
        gain = np.sqrt((1 + SHRINKAGE) / (np.maximum(eigenvalues, 0) / average + SHRINKAGE))
        return TraceMap(mean, (vectors * gain) @ vectors.T)


def _log_loss(losses: LossMatrix) -> np.ndarray:
    # a loss of the user's own may be negative
    losses = np.asarray(losses, np.float64)
    return np.sign(losses) * np.log1p(np.abs(losses) / SMALL_LOSS)
