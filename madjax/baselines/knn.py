"""Distance to the k-th nearest trusted example (Sun et al. 2022, arXiv 2204.06507)."""

from __future__ import annotations

import dataclasses

import numpy as np
from sklearn.neighbors import NearestNeighbors

from madjax.baselines.baseline import Anomaly, Observed
from madjax.baselines.features import OfFeatures, check_varies


@dataclasses.dataclass(frozen=True)
class KNN(OfFeatures):
    """Euclidean distance between features of length one.

    Attributes:
      k: which neighbour, at most as many as there are trusted examples. The paper takes 50 of the 50,000 training
        images of CIFAR-10, and 10 of a hundredth of ImageNet's.
    """

    k: int = 10

    def fit(self, trusted: Observed) -> Anomaly:
        """Keeps the trusted features.

        Raises:
          ValueError: where they are constant, or k is less than one.
        """
        if self.k < 1:
            raise ValueError(f"k: wanted at least 1, got {self.k}")
        check_varies(trusted["features"])
        reference = unit(trusted["features"])
        neighbours = NearestNeighbors(n_neighbors=min(self.k, len(reference)), algorithm="brute").fit(reference)
        return lambda observed: neighbours.kneighbors(unit(observed["features"]))[0][:, -1]


def unit(features: np.ndarray) -> np.ndarray:
    """Float64 features of length one; zeros stay."""
    features = features.astype(np.float64)
    length = np.linalg.norm(features, axis=1, keepdims=True)
    return np.divide(features, length, out=np.zeros_like(features), where=length > 0)
