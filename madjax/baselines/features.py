"""What the statistics of one layer's features share: the observation, moments, and the shrinkage of a covariance."""

from __future__ import annotations

import dataclasses
import warnings
from typing import NamedTuple

import numpy as np

from madjax.baselines.baseline import Observed, Statistic
from madjax.baselines.model import Layers, Model
from madjax.losses import ClassificationLoss
from madjax.types import Batch, LossFn, Params

# moments are summed over so many numbers at a time
_BLOCK_ENTRIES = 4_000_000


@dataclasses.dataclass(frozen=True)
class OfFeatures(Statistic):
    """A statistic of the logits and of one layer's features, averaged over positions.

    Attributes:
      layer: its path, or `PATH:input`; None for the input of the last linear layer.
    """

    layer: str | None = None

    def observe(self, model: Model, images: np.ndarray, trusted: np.ndarray) -> Observed:
        """Logits `[n, num_classes]` and features `[n, num_features]`."""
        layer = model.find(self.layer, images)
        observed = model.read(Layers((layer,)), images)
        return {"logits": observed["logits"], "features": observed[layer]}


class Moments(NamedTuple):
    """Of features around centers.

    Attributes:
      covariance: float64 `[num_features, num_features]`, with 1 / n.
      count: how many examples.
    """

    covariance: np.ndarray
    count: int


def means(features: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Float64 `[num_groups, num_features]`; `groups` are numbers from 0 on, `[n]`, none of them empty."""
    total = np.zeros((groups.max() + 1, features.shape[1]))
    for part in _blocks(features):
        np.add.at(total, groups[part], features[part].astype(np.float64))
    return total / np.bincount(groups)[:, None]


def moments(features: np.ndarray, centers: np.ndarray, groups: np.ndarray) -> Moments:
    """Moments around the center of each example's group; features that lie on disk are read block by block."""
    total = np.zeros((features.shape[1],) * 2)
    for part in _blocks(features):
        residual = features[part].astype(np.float64) - centers[groups[part]]
        total += residual.T @ residual
    return Moments(total / len(features), len(features))


def shrunk(moments: Moments, shrinkage: float | None = None) -> np.ndarray:
    """The covariance, drawn towards trace / num_features on its diagonal.

    Args:
      shrinkage: how far, 0 to 1; None for the oracle approximating share (Chen et al. 2010, arXiv 0907.4698), which is
        sensible for two examples, too.

    Raises:
      ValueError: where the features are constant.
    """
    covariance, size = moments.covariance, len(moments.covariance)
    variance = np.trace(covariance) / size
    if not variance > 0:
        raise ValueError("layer: its features are constant over the trusted examples, wanted ones that vary")
    if shrinkage is None:
        spread = np.mean(covariance**2)
        excess = (moments.count + 1) * (spread - variance**2 / size)
        shrinkage = min(1.0, (spread + variance**2) / excess) if excess > 0 else 1.0
    return (1 - shrinkage) * covariance + shrinkage * variance * np.eye(size)


def tell_shrinkage(count: int, size: int, who: str = "trusted") -> None:
    """Warns of fewer examples than features."""
    if count <= size:
        text = f"{who}: {count} examples for {size} features; their covariance is shrunk towards trace / num_features"
        warnings.warn(text, stacklevel=4)


def can_read(loss_fn: LossFn, params: Params, examples: Batch) -> bool:
    """Whether images of a classifier have features: a layer's input that is read where no layer is named."""
    if not isinstance(loss_fn, ClassificationLoss):
        return False
    try:
        Model(loss_fn, params).head(examples["image"])
    except ValueError:
        return False
    return True


def check_varies(features: np.ndarray) -> None:
    """Raises ValueError where all trusted examples have the same features."""
    if not (features != features[:1]).any():
        raise ValueError("layer: its features are constant over the trusted examples, wanted ones that vary")


def numbered(classes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The classes there are, and the place of each example's class among them."""
    return np.unique(classes, return_inverse=True)


def _blocks(features: np.ndarray) -> list[slice]:
    size = max(1, _BLOCK_ENTRIES // features.shape[1])
    return [slice(start, start + size) for start in range(0, len(features), size)]
