"""Class-balanced, seeded splits and subsets, which keep near-duplicates together."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np


def split_by_class(
    rng: np.random.Generator, labels: np.ndarray, shares: tuple[float, ...], groups: np.ndarray | None = None
) -> list[np.ndarray]:
    """Indices of disjoint parts, each with its share of every class, shuffled.

    Args:
      labels: int `[n]`.
      shares: of each part; they sum to at most 1, and what is left over is in no part.
      groups: int `[n]`, near-duplicates that stay together: each class is cut between groups, as near to the shares as
        these allow. No group holds two classes.

    >>> [len(part) for part in split_by_class(np.random.default_rng(0), np.repeat([0, 1], 10), (0.5, 0.2))]
    [10, 4]
    """
    if min(shares) <= 0 or sum(shares) > 1 + 1e-9:
        raise ValueError(f"shares: wanted positive shares with a sum of at most 1, got {shares}")
    _check_groups(labels, groups)
    parts: list[list[np.ndarray]] = [[] for _ in shares]
    bounds = np.cumsum((0.0, *shares))
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        edges = np.rint(bounds * len(members)).astype(int)
        if groups is not None:
            members, ends = _by_group(members, groups)
            # the nearest ends of groups; ties are broken by chance, or all classes would favour one part
            targets = bounds * len(members) + rng.uniform(-1e-6, 1e-6)  # one shift for all keeps them in order
            nearby = np.abs(ends - targets[:, None])
            edges = ends[nearby.argmin(1)]
        for part, start, stop in zip(parts, edges[:-1], edges[1:], strict=True):
            part.append(members[start:stop])
    return [rng.permutation(np.concatenate(part)) for part in parts]


def balanced_subset(
    rng: np.random.Generator, labels: np.ndarray, size: int, groups: np.ndarray | None = None
) -> np.ndarray:
    """Ascending indices of `size` examples, as evenly from all classes as there are enough.

    Args:
      labels: int `[n]`.
      size: where it exceeds `n`, everything is taken.
      groups: int `[n]`, near-duplicates, taken whole or not at all: the subset may then be smaller than `size`.

    Raises:
      ValueError: where not even one group fits.

    >>> balanced_subset(np.random.default_rng(0), np.array([0, 0, 0, 0, 1, 1]), 4)
    array([0, 2, 4, 5])
    """
    _check_groups(labels, groups)
    queue: list[tuple[Any, np.ndarray]] = []  # (how many of its class come before, the members of a group)
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        ends = np.arange(len(members) + 1)
        if groups is not None:
            members, ends = _by_group(members, groups)
        queue += [(start, members[start:stop]) for start, stop in pairwise(ends)]
    taken: list[np.ndarray] = []
    left = size
    for _, members in sorted(queue, key=lambda item: item[0]):
        if len(members) <= left:
            taken.append(members)
            left -= len(members)
    if not taken:
        smallest = min((len(members) for _, members in queue), default=1)
        raise ValueError(f"size: got {size}, wanted at least {smallest}, the smallest group")
    return np.sort(np.concatenate(taken))


def _by_group(members: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Shuffled members with each group in one piece, groups by first appearance, and where groups begin and end."""
    _, first, codes, counts = np.unique(groups[members], return_index=True, return_inverse=True, return_counts=True)
    members = members[np.argsort(first[codes], kind="stable")]
    return members, np.concatenate(([0], np.cumsum(counts[np.argsort(first)])))


def _check_groups(labels: np.ndarray, groups: np.ndarray | None) -> None:
    if groups is None:
        return
    if groups.shape != labels.shape:
        raise ValueError(f"groups: got shape {groups.shape}, wanted that of the labels, {labels.shape}")
    ids, first, codes = np.unique(groups, return_index=True, return_inverse=True)
    mixed = ids[codes[labels != labels[first][codes]]]
    if mixed.size:
        raise ValueError(f"groups: group {mixed[0]} holds several classes, wanted one class a group")
