"""What stands out in a set of examples as a whole: spectral signatures and quantum entropy.

Both were made to filter a training set. Here the set is the examples to be scored together with the trusted ones, and
an example is held against the trusted ones of its predicted class (all of them where it has none).
"""

from __future__ import annotations

import dataclasses

import numpy as np
from scipy.linalg import cholesky, solve_triangular

from madjax.baselines.baseline import Anomaly, Observed, Statistic, Transductive, predicted
from madjax.baselines.features import Moments, OfFeatures, check_varies, moments, shrunk, tell_shrinkage


@dataclasses.dataclass(frozen=True)
class Spectral(OfFeatures, Transductive):
    """Squared projection on the class's direction of greatest spread (Tran et al. 2018, arXiv 1811.00636)."""

    def given(self, pool: Observed) -> Statistic:
        """Finds the directions."""
        return _Spectral(pool)


@dataclasses.dataclass(frozen=True)
class QuantumEntropy(OfFeatures, Transductive):
    """Norm after whitening, weighted by how much each direction spreads (SPECTRE: Hayase et al. 2021, 2104.11315).

    The weight is Q = exp(α (Σ - I) / (‖Σ‖ - 1)), Σ the covariance of all examples in coordinates where that of the
    trusted ones is I; the score is xᵀQx / tr Q.

    Attributes:
      alpha: 0 for the norm alone, infinite for the greatest direction alone; 4 in the paper.
    """

    alpha: float = 4.0

    def given(self, pool: Observed) -> Statistic:
        """Keeps the pool, which is whitened by every fit."""
        return _QuantumEntropy(pool, self.alpha)


@dataclasses.dataclass(frozen=True)
class Centers:
    """The trusted examples' mean, by predicted class, and over all."""

    by_class: dict[int, np.ndarray]
    overall: np.ndarray

    @classmethod
    def of(cls, trusted: Observed) -> Centers:
        """Float64 means."""
        check_varies(trusted["features"])
        features, classes = trusted["features"].astype(np.float64), predicted(trusted)
        by_class = {int(label): features[classes == label].mean(axis=0) for label in np.unique(classes)}
        return cls(by_class, features.mean(axis=0))

    def residuals(self, observed: Observed) -> np.ndarray:
        """Float64 `[n, num_features]`."""
        centers = np.stack([self.by_class.get(int(label), self.overall) for label in predicted(observed)])
        return observed["features"].astype(np.float64) - centers


@dataclasses.dataclass(frozen=True)
class _Spectral(Statistic):
    pool: Observed

    def fit(self, trusted: Observed) -> Anomaly:
        centers = Centers.of(trusted)
        residuals, classes = centers.residuals(self.pool), predicted(self.pool)
        axes = {
            label: np.linalg.svd(residuals[classes == label], full_matrices=False)[2][0] for label in np.unique(classes)
        }

        def anomaly(observed: Observed) -> np.ndarray:
            own = np.stack([axes[label] for label in predicted(observed)])
            return np.square((centers.residuals(observed) * own).sum(axis=1))

        return anomaly


@dataclasses.dataclass(frozen=True)
class _QuantumEntropy(Statistic):
    pool: Observed
    alpha: float

    def fit(self, trusted: Observed) -> Anomaly:
        centers = Centers.of(trusted)
        tell_shrinkage(*trusted["features"].shape)
        root = cholesky(shrunk(_around_zero(centers.residuals(trusted))), lower=True)

        def whitened(observed: Observed) -> np.ndarray:
            return solve_triangular(root, centers.residuals(observed).T, lower=True).T

        spread, axes = np.linalg.eigh(_around_zero(whitened(self.pool)).covariance)
        # where nothing spreads further than the trusted examples, every direction counts alike
        exponent = self.alpha * (spread - 1) / max(spread[-1] - 1, 1e-6) if spread[-1] > 1 else np.zeros(len(spread))
        weights = np.exp(exponent - exponent.max())
        return lambda observed: np.square(whitened(observed) @ axes) @ weights / weights.sum()


def _around_zero(residuals: np.ndarray) -> Moments:
    return moments(residuals, np.zeros((1, residuals.shape[1])), np.zeros(len(residuals), int))
