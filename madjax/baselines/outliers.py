"""Outlier detectors of scikit-learn on features, with its defaults."""

from __future__ import annotations

import dataclasses

from sklearn.ensemble import IsolationForest
from sklearn.neighbors import LocalOutlierFactor

from madjax.baselines.baseline import Anomaly, Observed
from madjax.baselines.features import OfFeatures, check_varies


@dataclasses.dataclass(frozen=True)
class LOF(OfFeatures):
    """Local outlier factor (Breunig et al. 2000).

    Attributes:
      num_neighbors: at most one less than there are trusted examples.
    """

    num_neighbors: int = 20

    def fit(self, trusted: Observed) -> Anomaly:
        """Fits the local densities.

        Raises:
          ValueError: where the features are constant.
        """
        check_varies(trusted["features"])
        count = min(self.num_neighbors, len(trusted["features"]) - 1)
        factor = LocalOutlierFactor(n_neighbors=count, novelty=True).fit(trusted["features"])
        return lambda observed: -factor.score_samples(observed["features"])


@dataclasses.dataclass(frozen=True)
class Isolation(OfFeatures):
    """Isolation forest (Liu et al. 2008).

    Attributes:
      seed: of the trees.
    """

    seed: int = 0

    def fit(self, trusted: Observed) -> Anomaly:
        """Grows the trees.

        Raises:
          ValueError: where the features are constant.
        """
        check_varies(trusted["features"])
        forest = IsolationForest(random_state=self.seed).fit(trusted["features"])
        return lambda observed: -forest.score_samples(observed["features"])
