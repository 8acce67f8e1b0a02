"""Conformal p-values and thresholds, from the trusted examples' own couplings.

The leave-one-out coupling of a trusted example is what it would score, had it come as a test example: its trace against
the other n - 1. With n of them the p-value of a test example is (1 + number of trusted at most as explained) / (n + 1),
and flagging p ≤ fpr flags a share of at most fpr of examples exchangeable with the trusted ones.

How far that holds. Given scores that do not depend on which of the n + 1 examples is the test, the bound is exact, on
average over trusted sets (Vovk et al. 2005). Here a trusted example is held against n - 1 and the test against n
references, so it is exact only up to one reference in n; the worst case without any stability is 2 fpr (Barber et al.
2021, arXiv 1905.02928). For one given trusted set the realized rate scatters around fpr with a standard deviation of
√(fpr (1 - fpr) / n) or so: n = 300 and 5 % wanted give 5 ± 1.3 %. No p-value is under 1 / (n + 1), so a rate under that
flags nothing: 1 % needs 99 trusted examples; with `classes`, 99 of each.
"""

from __future__ import annotations

import numpy as np


def p_values(
    trusted_couplings: np.ndarray,
    couplings: np.ndarray,
    *,
    trusted_classes: np.ndarray | None = None,
    classes: np.ndarray | None = None,
) -> np.ndarray:
    """Conformal p-values, float64 `[num_test]`; small = anomalous.

    Args:
      trusted_couplings: leave-one-out couplings `[num_trusted]`, high = explained.
      couplings: `[num_test]`.
      trusted_classes, classes: predicted classes. Given both, each example is held against the trusted ones of its own
        class alone (Mondrian); an example of a class that no trusted one has gets p = 1: nothing can be said.
    """
    if (trusted_classes is None) != (classes is None):
        raise ValueError("classes: wanted those of the trusted and of the test examples, or neither")
    if trusted_classes is None or classes is None:
        return _conformal(trusted_couplings, couplings)
    result = np.ones(len(couplings))
    for label in np.unique(classes):
        result[classes == label] = _conformal(trusted_couplings[trusted_classes == label], couplings[classes == label])
    return result


def _conformal(trusted: np.ndarray, test: np.ndarray) -> np.ndarray:
    # side="right" counts ties as at most as explained, which errs towards not flagging
    rank = np.searchsorted(np.sort(trusted), test, side="right")
    return (1 + rank) / (len(trusted) + 1)


def threshold(trusted_couplings: np.ndarray, fpr: float) -> float:
    """The coupling under which `p_values` are at most `fpr`; -inf where too few trusted examples allow none.

    >>> threshold(np.arange(99.0), 0.05)
    4.0
    """
    check_fpr(fpr)
    index = int(np.floor(fpr * (len(trusted_couplings) + 1) + 1e-9)) - 1
    return float(np.sort(trusted_couplings)[index]) if index >= 0 else float("-inf")


def check_fpr(fpr: float) -> None:
    """Raises ValueError unless 0 < fpr < 1."""
    if not 0 < fpr < 1:
        raise ValueError(f"fpr: wanted a rate between 0 and 1, got {fpr}")
