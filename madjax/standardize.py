"""Couplings in units of the trusted ones: how much less explained an example is, among all and within its class.

Classes differ in how far their trusted examples explain each other: those of an easy class share nearly all of their
traces, those of a hard one little. One threshold for all flags the hard class, and lets through what imitates the easy
one, though within its class it stands far out; a threshold for each class alone is blind where the class imitated is a
hard one. So a coupling is held against the mean and the standard deviation of the trusted couplings twice, of all and
of the same predicted class, and the lower of the two counts: what is explained must be so by either standard. The
moments of a class are shrunk, as it may be small: the mean towards that of all trusted examples, the variance towards
that within classes. A class without any trusted example gets just those two.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

# further members of a class that have the moments of all
MEAN_PRIOR, VARIANCE_PRIOR = 2, 10


def in_deviations(values: np.ndarray, trusted: np.ndarray) -> np.ndarray:
    """Values as standard deviations above the mean of the trusted ones, which may all be equal."""
    return (values - trusted.mean()) / (trusted.std() or 1.0)


def standardize(
    values: np.ndarray, classes: np.ndarray, trusted_values: np.ndarray, trusted_classes: np.ndarray
) -> np.ndarray:
    """Float64 `[num_test]`: couplings as standard deviations above the mean of all, or of their class if that is less.

    Args:
      values: `[num_test]`; classes: `[num_test]`, predicted.
      trusted_values: `[num_trusted]`, each with the others; trusted_classes: `[num_trusted]`, predicted.
    """
    against, result = _standard(trusted_values, trusted_classes), np.empty(len(values))
    for label in np.unique(classes):
        chosen = classes == label
        result[chosen] = against(values[chosen], trusted_values[trusted_classes == label])
    return result


def standardize_trusted(trusted_values: np.ndarray, trusted_classes: np.ndarray) -> np.ndarray:
    """Float64 `[num_trusted]`: the same of each trusted example, which is left out of the moments of its class."""
    against, result = _standard(trusted_values, trusted_classes), np.empty(len(trusted_values))
    for index, (value, label) in enumerate(zip(trusted_values, trusted_classes, strict=True)):
        others = trusted_classes == label
        others[index] = False
        result[index] = against(value, trusted_values[others])
    return result


def _standard(
    trusted_values: np.ndarray, trusted_classes: np.ndarray
) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """(values, trusted values of their class) -> standardized values."""
    mean, least = trusted_values.mean(), np.finfo(float).tiny ** 0.5  # all equal: nothing but the sign is left to tell
    deviation_of_all = trusted_values.std() or least
    labels, places = np.unique(trusted_classes, return_inverse=True)
    class_means = np.bincount(places, trusted_values) / np.bincount(places)
    freedom = max(len(trusted_values) - len(labels), 1)
    variance = np.square(trusted_values - class_means[places]).sum() / freedom

    def against(values: np.ndarray, members: np.ndarray) -> np.ndarray:
        center = (members.sum() + MEAN_PRIOR * mean) / (len(members) + MEAN_PRIOR)
        spread = np.square(members - center).sum() + VARIANCE_PRIOR * variance
        deviation = np.sqrt(spread / (len(members) + VARIANCE_PRIOR)) or least
        return np.minimum((values - center) / deviation, (values - mean) / deviation_of_all)

    return against
