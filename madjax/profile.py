"""An example's profile: what the trusted ones of its class tell of it, part by part of the model.

Where draws move one part of a model at a time, what trusted examples of the same predicted class tell of an example can
be asked of each part by itself. An output of another mechanism need not be told less of in every part: in the first
layers a trigger may be what all images of a class share, in others nothing is like it. So all parts of a profile are
seen together, and an example is as explained as the lesser of two says:

- how much is told of it, summed over the parts, by the standards of all and of its class (`madjax.standardize`);
- how usual its profile is: minus the logarithm of its squared Mahalanobis distance from the profiles of the trusted
  examples of its class. Their covariance is that within classes, shrunk half-way to a diagonal one.

A profile has two figures a part, the information of `madjax.information` and the mean of the highest correlations, and
the mean of the whole trace, which is how sure the model is. A class that has one trusted example or none tells nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from madjax import information
from madjax.standardize import MEAN_PRIOR, in_deviations, standardize, standardize_trusted

SHRINKAGE = 0.5
_TINY = np.finfo(float).tiny


def of_part(
    trusted: np.ndarray, test: np.ndarray, trusted_classes: np.ndarray, classes: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """What a part of the draws says: nats, and the mean of the `count` highest correlations.

    Args:
      trusted, test: unit traces as in `madjax.information`, `[D, num_trusted]` and `[D, num_test]`.
      trusted_classes, classes: predicted, of each.

    Returns:
      Float64 `[num_trusted, 2]`, each left out of its class, and `[num_test, 2]`.
    """
    own, told = np.zeros((trusted.shape[1], 2)), np.zeros((test.shape[1], 2))
    for label in np.unique(trusted_classes):
        members, asked = np.flatnonzero(trusted_classes == label), np.flatnonzero(classes == label)
        if len(members) < 2:
            continue
        references, others = trusted[:, members], test[:, asked]
        own[members, 0], told[asked, 0] = information.left_out(references), information.information(references, others)
        products = references.T @ references
        np.fill_diagonal(products, -np.inf)
        own[members, 1] = _mean_highest(products, min(count, len(members) - 1))
        told[asked, 1] = _mean_highest(references.T @ others, min(count, len(members)))
    return own, told


def compare(
    parts: Sequence[tuple[np.ndarray, np.ndarray]],
    heights: np.ndarray,
    heights_of_test: np.ndarray,
    trusted_classes: np.ndarray,
    classes: np.ndarray,
) -> np.ndarray:
    """Couplings of the test examples, in standard deviations of the trusted ones.

    Args:
      parts: of each part of the model, what `of_part` says.
      heights, heights_of_test: means of whole traces, `[num_trusted]` and `[num_test]`.
    """
    own = np.column_stack([*np.concatenate([part[0].T for part in parts]), heights])
    told = np.column_stack([*np.concatenate([part[1].T for part in parts]), heights_of_test])
    deviation = _positive(own.std(0))
    own, told = (own - own.mean(0)) / deviation, (told - own.mean(0)) / deviation
    sums, sums_of_test = own[:, :-1:2].sum(1), told[:, :-1:2].sum(1)
    explained = standardize_trusted(sums, trusted_classes), standardize(sums_of_test, classes, sums, trusted_classes)
    usual = _usual(*_within_class(own, told, trusted_classes, classes))
    return np.minimum(*(in_deviations(values, trusted) for trusted, values in (explained, usual)))


def _mean_highest(products: np.ndarray, count: int) -> np.ndarray:
    return np.partition(products, -count, axis=0)[-count:].mean(0)


def _within_class(
    own: np.ndarray, told: np.ndarray, trusted_classes: np.ndarray, classes: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Profiles less the mean of their class, which lies nearer to that of all, 0, the fewer members it has."""
    centered, moved = own.copy(), told.copy()
    for label in np.unique(trusted_classes):
        members, asked = trusted_classes == label, classes == label
        total, count = own[members].sum(0), members.sum() + MEAN_PRIOR
        centered[members] -= (total - own[members]) / (count - 1)
        moved[asked] -= total / count
    return centered, moved


def _usual(own: np.ndarray, told: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    deviation = _positive(own.std(0))
    own, told = own / deviation, told / deviation
    count, size = own.shape
    each = (1 - SHRINKAGE) / (count - 1)
    precision = np.linalg.inv(each * own.T @ own + SHRINKAGE * np.eye(size))
    distances = np.einsum("if,fg,ig->i", own, precision, own), np.einsum("if,fg,ig->i", told, precision, told)
    # Sherman and Morrison: the covariance without the example itself
    left_out = distances[0] / (1 - each * distances[0])
    return -np.log(np.maximum(left_out, _TINY)), -np.log(np.maximum(distances[1], _TINY))


def _positive(deviation: np.ndarray) -> np.ndarray:
    return np.where(deviation > 0, deviation, 1.0)
