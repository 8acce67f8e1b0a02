"""Mahalanobis distances of features: to class means, relative to the background, and by each class's own covariance."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np
from scipy.linalg import cholesky, solve_triangular

from madjax.baselines.baseline import Anomaly, Observed, predicted
from madjax.baselines.features import Moments, OfFeatures, means, moments, numbered, shrunk, tell_shrinkage


@dataclasses.dataclass(frozen=True)
class Mahalanobis(OfFeatures):
    """Squared distance to the nearest class mean under one covariance (Lee et al. 2018, arXiv 1807.03888).

    Classes are the model's own predictions. The paper's covariance is not shrunk, for it comes from the training set.

    Attributes:
      shrinkage: see `features.shrunk`.
    """

    shrinkage: float | None = None

    def fit(self, trusted: Observed) -> Anomaly:
        """Fits class means and their common covariance."""
        distances = _to_classes(trusted, self.shrinkage)
        return lambda observed: distances(observed["features"]).min(axis=1)


@dataclasses.dataclass(frozen=True)
class RelativeMahalanobis(Mahalanobis):
    """The same less the squared distance to the mean of all under their covariance (Ren et al. 2021, 2106.09022)."""

    def fit(self, trusted: Observed) -> Anomaly:
        """Fits class means and covariance, and those of the background."""
        features, one = trusted["features"], np.zeros(len(trusted["features"]), int)
        center = means(features, one)
        background = Distances.of(center, moments(features, center, one), self.shrinkage)
        distances = _to_classes(trusted, self.shrinkage)
        return lambda observed: distances(observed["features"]).min(axis=1) - background(observed["features"])[:, 0]


@dataclasses.dataclass(frozen=True)
class ClassMahalanobis(Mahalanobis):
    """Squared distance to the mean of the predicted class under that class's own covariance.

    An example of a class whose trusted ones do not vary, or are fewer than two, is held against the nearest other.
    """

    def fit(self, trusted: Observed) -> Anomaly:
        """Fits a mean and a covariance to each class.

        Raises:
          ValueError: where no class has two trusted examples.
        """
        classes, features = predicted(trusted), trusted["features"]
        known, counts = np.unique(classes, return_counts=True)
        known = known[counts > 1]
        if not len(known):
            raise ValueError("trusted: wanted two examples of one predicted class at least, got none")
        models = []
        for label in known:
            own = features[classes == label]
            one = np.zeros(len(own), int)
            center = means(own, one)
            models.append(Distances.of(center, moments(own, center, one), self.shrinkage))
        tell_shrinkage(min((classes == label).sum() for label in known), features.shape[1], "trusted: some class")

        def anomaly(observed: Observed) -> np.ndarray:
            distances = np.stack([one(observed["features"])[:, 0] for one in models], axis=1)
            own = predicted(observed)[:, None] == known
            return np.where(own | ~own.any(axis=1, keepdims=True), distances, np.inf).min(axis=1)

        return anomaly


class Distances(NamedTuple):
    """Squared Mahalanobis distances to several centers.

    Attributes:
      root: lower Cholesky factor of the covariance.
      whitened_centers: `[num_centers, num_features]`.
    """

    root: np.ndarray
    whitened_centers: np.ndarray

    @classmethod
    def of(cls, centers: np.ndarray, around: Moments, shrinkage: float | None) -> Distances:
        """From centers `[num_centers, num_features]` and the moments around them."""
        root = cholesky(shrunk(around, shrinkage), lower=True)
        return cls(root, solve_triangular(root, centers.T, lower=True).T)

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """Float64 `[n, num_centers]`."""
        whitened = solve_triangular(self.root, features.astype(np.float64).T, lower=True).T
        return np.stack([np.square(whitened - center).sum(axis=1) for center in self.whitened_centers], axis=1)


def _to_classes(trusted: Observed, shrinkage: float | None) -> Distances:
    _, groups = numbered(predicted(trusted))
    centers = means(trusted["features"], groups)
    tell_shrinkage(*trusted["features"].shape)
    return Distances.of(centers, moments(trusted["features"], centers, groups), shrinkage)
