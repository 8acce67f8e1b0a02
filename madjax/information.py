"""How much the trusted traces, all together, tell of one: Gaussian mutual information, -1/2 log(1 - R²), in nats.

1 - R² is the share of a trace's variance over draws that a ridge regression on the trusted traces leaves: of unit
traces z and A `[D, num_trusted]`, the least |z - A w|² + λ |w|² over w, which is z' (A A' / λ + I)^-1 z. As more of
them than draws would explain anything, λ goes with the mean of the eigenvalues of A A' that are not zero by their
number. Where trusted traces are alike, a few eigenvalues make that mean, so λ is a share of it; a third and three times
as much find nearly as much (`docs/choosing-the-scale.md`).

Where the nearest traces tell whether somebody moves as this one does, all together tell whether it moves in directions
that trusted ones move in at all: an output that rests on what many have in part is explained, though by no one alone.

Traces here are centered, of unit norm, or zero where no draw moves an output: such a one is told nothing of.
"""

from __future__ import annotations

import numpy as np

RIDGE = 0.3


def information(trusted: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Float64 `[num_test]` of unit traces `[D, num_trusted]` and `[D, num_test]`."""
    return _nats(np.einsum("di,di->i", test, _solve(trusted, trusted.shape[1], test)))


def left_out(trusted: np.ndarray) -> np.ndarray:
    """Float64 `[num_trusted]`: what the others tell of each."""
    count = trusted.shape[1] - 1
    own = np.einsum("di,di->i", trusted, _solve(trusted, count, trusted))
    return _nats(_without(own, trusted, count))


def pairs_left_out(trusted: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """Float64 `[num_trusted, len(asked)]`: what all but the example of the row tell of each other one at `asked`.

    What stands there of an example and itself means nothing.
    """
    count = trusted.shape[1] - 2
    solved = _solve(trusted, count, trusted)
    own, shared = np.einsum("di,di->i", trusted, solved), trusted.T @ solved[:, asked]
    # Sherman and Morrison's update, first for the row's example, then for the one that is told of
    without_row = own[asked] + np.square(shared) / (_ridge(trusted, count) - own)[:, None]
    return _nats(_without(without_row, trusted, count))


def _ridge(trusted: np.ndarray, count: int) -> float:
    """λ of `count` references."""
    return RIDGE * count / min(len(trusted), count)


def _solve(trusted: np.ndarray, count: int, traces: np.ndarray) -> np.ndarray:
    """(A A' / λ + I)^-1 of traces, λ being that of `count` references."""
    ridge, (num_draws, num_trusted) = _ridge(trusted, count), trusted.shape
    if num_draws <= num_trusted:
        return np.linalg.solve(trusted @ trusted.T / ridge + np.eye(num_draws), traces)
    # Woodbury's identity: a matrix of examples is the smaller one
    return traces - trusted @ np.linalg.solve(trusted.T @ trusted + ridge * np.eye(num_trusted), trusted.T @ traces)


def _without(share: np.ndarray, trusted: np.ndarray, count: int) -> np.ndarray:
    """The share of a trace that is left where it is not among the references itself."""
    return share / (1 - share / _ridge(trusted, count))


def _nats(share: np.ndarray) -> np.ndarray:
    return -np.log(np.where(share > 0, np.minimum(share, 1), 1)) / 2
