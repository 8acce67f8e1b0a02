"""Virtual-logit matching (Wang et al. 2022, arXiv 2203.10807)."""

from __future__ import annotations

import dataclasses
import warnings

import numpy as np
from scipy.special import logsumexp

from madjax.baselines.baseline import Anomaly, Observed, Statistic
from madjax.baselines.features import means, moments
from madjax.baselines.model import Layers, Model


@dataclasses.dataclass(frozen=True)
class ViM(Statistic):
    """How far features lie outside of the trusted ones' principal subspace, scaled to a logit, less the energy.

    Features are the input of the last linear layer, from the point where all its outputs are zero.

    Attributes:
      num_dimensions: of the subspace; by the paper's code 1000 of 2048 features and more, 512 of 768 and more, else
        half of them. Half the trusted examples at most, for in a subspace that they fill they have no residual.
    """

    num_dimensions: int | None = None

    def observe(self, model: Model, images: np.ndarray, trusted: np.ndarray) -> Observed:
        """Logits `[n, num_classes]` and features `[n, num_features]` from that point."""
        layer = model.find(None, images)
        observed = model.read(Layers((layer,)), images)
        kernel, bias = model.head_weights(images)
        origin = -np.linalg.pinv(kernel.T) @ bias
        observed[layer] -= origin.astype(np.float32)
        return {"logits": observed["logits"], "features": observed[layer]}

    def fit(self, trusted: Observed) -> Anomaly:
        """Fits the subspace and the scale of the virtual logit.

        Raises:
          ValueError: where no feature varies, or the subspace takes all dimensions there are.
        """
        features = trusted["features"]
        count, size = features.shape
        wanted = self.num_dimensions or (1000 if size >= 2048 else 512 if size >= 768 else size // 2)
        if not 0 < wanted < size:
            raise ValueError(f"num_dimensions: wanted 1 to {size - 1} of {size} features, got {wanted}")
        dimensions = min(wanted, max(1, count // 2))
        if dimensions < wanted:
            warnings.warn(
                f"trusted: {count} examples for a subspace of {wanted} dimensions; it gets {dimensions}", stacklevel=2
            )
        one = np.zeros(count, int)
        # around the origin and not around their mean, as in the paper
        _, axes = np.linalg.eigh(moments(features, np.zeros((1, size)), one).covariance)
        rest = axes[:, : size - dimensions]  # eigenvalues ascend
        residual = _norm(features, rest).mean()
        if not residual > 1e-6 * np.linalg.norm(means(np.abs(features), one)):
            raise ValueError("layer: the trusted features are constant or have no residual, wanted ones that vary")
        alpha = trusted["logits"].max(axis=1).mean(dtype=np.float64) / residual

        def anomaly(observed: Observed) -> np.ndarray:
            return alpha * _norm(observed["features"], rest) - logsumexp(observed["logits"].astype(np.float64), axis=1)

        return anomaly


def _norm(features: np.ndarray, axes: np.ndarray) -> np.ndarray:
    return np.linalg.norm(features.astype(np.float64) @ axes, axis=1)
