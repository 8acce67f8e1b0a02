"""Which anomalies share a mechanism: groups of traces, of which nobody says how many there are.

Anomalies of one mechanism move together over the draws. They are joined, the most alike first (agglomerative clustering
by average linkage, scikit-learn's), as long as two groups' traces correlate by more than chance on average. Mechanisms
that lead to one class share much of their traces, namely what every output of that class shares, and come as one group.
So each group is looked at again without its mean trace: where a single direction leads in how its members correlate
with one another, it is split there, by two Gaussians of one covariance in its leading principal components, and is two
mechanisms where these lie far apart. What is left in groups that are too small shares its mechanism with too few to
tell.
`docs/results-beyond.md` tells how the settings were chosen.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from sklearn.cluster import AgglomerativeClustering
from sklearn.mixture import GaussianMixture
from threadpoolctl import threadpool_limits

from madjax.sampling.diagnostics import ensure_finite
from madjax.types import LossMatrix

MIN_SIZE = 10  # of a group; fewer alike anomalies are chance
MIN_CORRELATION = 0.15  # mean, between the traces of two groups that are joined
LEADING_SHARE = 0.55  # of the leading direction, from which on a group may be two
MIN_DISTANCE = 6.0  # of the two, in standard deviations; the sides of a single mechanism are nearer
_NUM_COMPONENTS = 12
_NOISE = 1e-6  # the least variance of a component, relative to the mean


class Mechanisms(NamedTuple):
    """Groups of anomalies, the largest first.

    Attributes:
      group: int `[n]`, from 0; -1 where an anomaly shares its trace with too few others.
      central: for each group, int indices of its members, those that correlate most with the group's mean trace first.
      correlation: float64 `[n, n]`, of the traces.
    """

    group: np.ndarray
    central: list[np.ndarray]
    correlation: np.ndarray

    @property
    def num_groups(self) -> int:
        """How many mechanisms were found."""
        return len(self.central)


def group_by_mechanism(
    traces: LossMatrix, *, min_size: int = MIN_SIZE, leading_share: float = LEADING_SHARE
) -> Mechanisms:
    """Groups anomalies by the traces they share.

    Args:
      traces: `[num_draws, n]`, of anomalies alone, as `Scorer.map` gives them.
      min_size: the fewest anomalies that make a group.
      leading_share: a group is split where its leading direction has this share of the variance; 1 splits none.

    Raises:
      ValueError: fewer than two anomalies or draws, traces that are all the same.
      FloatingPointError: traces that are not finite.
    """
    if traces.ndim != 2 or traces.shape[0] < 3:
        raise ValueError(f"traces: wanted [num_draws, n] of at least 3 draws, got {traces.shape}")
    if traces.shape[1] < 2:
        raise ValueError(f"traces: wanted at least 2 anomalies to group, got {traces.shape[1]}")
    if min_size < 2:
        raise ValueError(f"min_size: wanted at least 2, got {min_size}")
    if not 0 < leading_share <= 1:
        raise ValueError(f"leading_share: wanted a share above 0 and up to 1, got {leading_share}")
    ensure_finite(traces, "traces")
    if (traces == traces[:, :1]).all():
        raise ValueError(
            f"traces: those of all {traces.shape[1]} anomalies are identical, which leaves nothing to group"
        )
    shapes = _unit(traces - traces.mean(0))
    correlation = shapes.T @ shapes
    distance = np.clip(1 - correlation, 0, 2)
    np.fill_diagonal(distance, 0)
    apart: dict[str, Any] = {"n_clusters": None, "distance_threshold": 1 - MIN_CORRELATION}
    joined = AgglomerativeClustering(**apart, metric="precomputed", linkage="average").fit_predict(distance)
    parts = []
    with threadpool_limits(1):
        for label in range(joined.max() + 1):
            members = np.flatnonzero(joined == label)
            if len(members) >= min_size:
                parts += _split(shapes, members, min_size, leading_share)
    group = np.full(len(correlation), -1)
    for label, part in enumerate(sorted(parts, key=len, reverse=True)):
        group[part] = label
    central = []
    for label in range(group.max() + 1):
        members = np.flatnonzero(group == label)
        likeness = shapes[:, members].T @ shapes[:, members].mean(1)
        central.append(members[np.argsort(-likeness, kind="stable")])
    return Mechanisms(group, central, correlation)


def _unit(traces: np.ndarray) -> np.ndarray:
    """Traces of norm one; one without variance stays zero, and is like none."""
    norms = np.linalg.norm(traces, axis=0)
    return np.divide(traces, norms, out=np.zeros_like(traces, dtype=np.float64), where=norms > 0)


def _split(shapes: np.ndarray, members: np.ndarray, min_size: int, leading_share: float) -> list[np.ndarray]:
    """The mechanisms in one group, by their members."""
    if len(members) < 4 * min_size:  # too few to tell directions from chance
        return [members]
    own = shapes[:, members] - shapes[:, members].mean(1, keepdims=True)
    likeness = _unit(own)
    likeness = likeness.T @ likeness
    # members are alike that are like the same others: twice, since one trace is noisy and a profile of hundreds is not
    for _ in range(2):
        likeness = np.corrcoef(likeness)
    centered = likeness - likeness.mean(0) - likeness.mean(1)[:, None] + likeness.mean()
    values, vectors = np.linalg.eigh(centered)
    if values[-1] < leading_share * values.sum():
        return [members]
    first = _two_gaussians(vectors[:, -1:], None)
    axes, scales, _ = np.linalg.svd(own.T, full_matrices=False)
    count = min(_NUM_COMPONENTS, len(members) // 4, int((scales > 1e-9 * scales[0]).sum()))
    components = axes[:, :count] * scales[:count]
    second = _two_gaussians(components / components.std(), first)
    sides = [members[second == side] for side in (0, 1)]
    if min(map(len, sides)) < min_size or _distance(components, second) < MIN_DISTANCE:
        return [members]
    return [part for side in sides for part in _split(shapes, side, min_size, leading_share)]


def _distance(points: np.ndarray, side: np.ndarray) -> float:
    """Mahalanobis distance between the means of the points `[n, d]` of two sides."""
    means = np.stack([points[side == label].mean(0) for label in (0, 1)])
    within, gap = np.atleast_2d(np.cov((points - means[side]).T, bias=True)), means[1] - means[0]
    return float(np.sqrt(gap @ np.linalg.pinv(within, hermitian=True) @ gap))


def _two_gaussians(points: np.ndarray, start: np.ndarray | None) -> np.ndarray:
    """Zeros and ones `[n]`: which of two Gaussians each of the points `[n, d]` belongs to.

    Args:
      start: sides that they start from, and then are of one covariance.
    """
    if start is None:
        points = points / points.std()
        model = GaussianMixture(2, n_init=3, random_state=0, reg_covar=_NOISE)
    elif not 0 < start.sum() < len(start):
        return start
    else:
        means = np.stack([points[start == side].mean(0) for side in (0, 1)])
        model = GaussianMixture(2, covariance_type="tied", means_init=means, max_iter=300, reg_covar=1e-4)
    return model.fit_predict(points)
