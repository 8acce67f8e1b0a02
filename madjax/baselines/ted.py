"""Topological evolution dynamics (Mo et al. 2024, arXiv 2312.02673)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.decomposition import PCA
from sklearn.metrics import pairwise_distances
from sklearn.preprocessing import StandardScaler

from madjax.baselines.baseline import Anomaly, Observed, Statistic, predicted
from madjax.baselines.model import Layers, Model

_MAX_FEATURES = 1024


@dataclasses.dataclass(frozen=True)
class TED(Statistic):
    """How unusual the ranks are that the nearest trusted example of the predicted class has, layer by layer.

    The ranks over all layers are judged by PyOD's detector with principal components, as published: distances to the
    components, each divided by its share of the variance. An example of a class that no trusted one has gets the last
    rank. Unlike there, layers of more than 1024 values are averaged over 2×2 positions until they have fewer.
    """

    def observe(self, model: Model, images: np.ndarray, trusted: np.ndarray) -> Observed:
        """Logits, and every layer's output, "layers" `[n, num_features]` each."""
        layers = model.outputs(images)
        observed = model.read(Layers(layers, coarse), images)
        return {"logits": observed["logits"], "layers": {name: observed[name] for name in layers}}

    def fit(self, trusted: Observed) -> Anomaly:
        """Fits the components on the ranks of the trusted examples, each left out of its own."""
        classes = predicted(trusted)

        def ranks(observed: Observed, *, own: bool) -> np.ndarray:
            same = predicted(observed)[:, None] == classes
            result = []
            for name, values in trusted["layers"].items():  # in one order, whatever that of the observed is
                distances = distances_to(observed["layers"][name], values, own=own)
                nearest = np.where(same, distances, np.inf).min(axis=1, keepdims=True)
                rank = (distances < nearest).sum(axis=1)
                result.append(np.where(np.isinf(nearest[:, 0]), len(classes), rank))
            return np.stack(result, axis=1).astype(np.float64)

        judge = judged_by_components(ranks(trusted, own=True))
        return lambda observed: judge(ranks(observed, own=False))


def distances_to(values: np.ndarray, trusted: np.ndarray, *, own: bool) -> np.ndarray:
    """Distances `[n, num_trusted]`, float64; infinite to itself where the values are the trusted ones' `own`."""
    distances = pairwise_distances(values.astype(np.float64), trusted.astype(np.float64))
    if own:
        np.fill_diagonal(distances, np.inf)
    return distances


def judged_by_components(trajectories: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Ranks `[n, num_layers]` -> anomaly scores `[n]`, by the principal components of the trusted trajectories.

    Raises:
      ValueError: where all trusted trajectories are the same.
    """
    scaler = StandardScaler().fit(trajectories)
    components = PCA().fit(scaler.transform(trajectories))
    share = components.explained_variance_ratio_
    # of what does not vary among the trusted examples, nothing can be said in these units
    varies = np.nan_to_num(share) > 1e-6
    axes, share = np.asarray(components.components_)[varies], share[varies]
    if not len(axes):
        raise ValueError("trusted: all have the same rank in every layer, wanted more examples or other ones")
    return lambda ranks: (pairwise_distances(scaler.transform(ranks), axes) / share).sum(axis=1)


def coarse(array: jax.Array) -> jax.Array:
    """`[n, ..., c]` -> float32 `[n, num_features]`, positions side by side."""
    array = array.astype(jnp.float32)
    while array.ndim == 4 and array[0].size > _MAX_FEATURES and min(array.shape[1:3]) > 1:
        height, width = (size // 2 * 2 for size in array.shape[1:3])
        cropped = array[:, :height, :width]
        array = cropped.reshape(len(array), height // 2, 2, width // 2, 2, -1).mean(axis=(2, 4))
    return array.reshape(len(array), -1)
