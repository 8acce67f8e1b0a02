"""Class-balanced, seeded splits, and the reference's rule for which examples count."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from madjax.attacks.attack import Attack


def split_by_class(rng: np.random.Generator, labels: np.ndarray, shares: tuple[float, ...]) -> list[np.ndarray]:
    """Indices of disjoint parts, each with its share of every class, shuffled.

    Args:
      shares: of each part; they sum to at most 1, and what is left over is in no part.

    >>> [len(part) for part in split_by_class(np.random.default_rng(0), np.repeat([0, 1], 10), (0.5, 0.2))]
    [10, 4]
    """
    if min(shares) <= 0 or sum(shares) > 1 + 1e-9:
        raise ValueError(f"shares: wanted positive shares with a sum of at most 1, got {shares}")
    parts: list[list[np.ndarray]] = [[] for _ in shares]
    bounds = np.cumsum((0.0, *shares))
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        edges = np.rint(bounds * len(members)).astype(int)
        for part, start, stop in zip(parts, edges[:-1], edges[1:], strict=True):
            part.append(members[start:stop])
    return [rng.permutation(np.concatenate(part)) for part in parts]


class CountedExamples(NamedTuple):
    """Which examples of a backdoored model's test set count, by the reference's protocol.

    Attributes:
      trusted, benign: indices of clean images that the model classifies rightly.
      anomalous: indices of clean images, not of the target class, that with the trigger are classified as the target.
      accuracy: on all clean test images; asr: share of triggered non-target images classified as the target.
    """

    trusted: np.ndarray
    benign: np.ndarray
    anomalous: np.ndarray
    accuracy: float
    asr: float


def count_examples(
    predict: Callable[[np.ndarray], np.ndarray],
    images: np.ndarray,
    labels: np.ndarray,
    trusted: np.ndarray,
    test: np.ndarray,
    attack: Attack | None,
    target: int,
) -> CountedExamples:
    """Applies the protocol.

    Args:
      predict: uint8 images `[n, ...]` -> classes `[n]`.
      trusted, test: indices of the parts; the triggered images are those of `test`.
      attack: None for a clean model: no anomalies, and an ASR of NaN.
    """
    right = predict(images) == labels
    accuracy = float(right[test].mean())
    if attack is None:
        return CountedExamples(trusted[right[trusted]], test[right[test]], test[:0], accuracy, float("nan"))
    sources = test[labels[test] != target]
    fires = predict(attack.trigger(images[sources])) == target
    return CountedExamples(trusted[right[trusted]], test[right[test]], sources[fires], accuracy, float(fires.mean()))
