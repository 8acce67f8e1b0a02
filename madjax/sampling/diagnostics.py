"""Whether chains have mixed and stayed finite; ArviZ computes, this module adapts shapes."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class TraceDiagnostics(NamedTuple):
    """Per example, float64 `[num_examples]`.

    Attributes:
      ess: bulk effective sample size over all chains (Vehtari et al. 2021, arXiv 1903.08008). NaN for constant traces.
      rhat: rank-normalized split R-hat; near 1 where chains agree. NaN for constant traces.
    """

    ess: np.ndarray
    rhat: np.ndarray


def trace_diagnostics(traces: np.ndarray) -> TraceDiagnostics:
    """Effective sample size and R-hat of every loss trace.

    Args:
      traces: `[num_chains, num_draws, num_examples]`; `split_chains` makes it.

    Raises:
      ValueError: under four draws a chain, from which neither can be told.
    """
    if traces.ndim != 3 or traces.shape[1] < 4:
        raise ValueError(f"traces: wanted [num_chains, num_draws >= 4, num_examples], got {traces.shape}")
    from arviz_stats.base.array import array_stats  # as long to import as all the rest, and chains alone need it

    return TraceDiagnostics(
        np.asarray(array_stats.ess(traces, chain_axis=0, draw_axis=1)),
        np.asarray(array_stats.rhat(traces, chain_axis=0, draw_axis=1)),
    )


def ensure_finite(values: np.ndarray, what: str) -> None:
    """Raises FloatingPointError that says `what` is not finite, and at which index first."""
    finite = np.isfinite(values)
    if not finite.all():
        index = np.unravel_index(np.argmin(finite), finite.shape)
        where = f" at index {tuple(map(int, index))}" if index else ""
        raise FloatingPointError(f"{what}: wanted finite numbers, got {values[index]}{where}")
