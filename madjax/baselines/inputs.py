"""What the model says of changed images: STRIP, TeCo and SCALE-UP. Images are uint8, `[n, height, width, channels]`."""

from __future__ import annotations

import dataclasses

import numpy as np
from scipy.special import log_softmax

from madjax.baselines.baseline import Anomaly, Observed, Statistic, predicted
from madjax.baselines.corruptions import CORRUPTIONS, corrupted
from madjax.baselines.model import Layers, Model


@dataclasses.dataclass(frozen=True)
class STRIP(Statistic):
    """Minus the mean entropy of the output for the image plus each of some trusted ones (Gao et al. 2019, 1902.06531).

    A trigger survives the sum and keeps the output, so its entropy is low. Images are added as in the published code,
    and clipped. Every image gets the same partners, but for itself.

    Attributes:
      num_overlays: 100 in the paper; at most one less than there are trusted images.
      seed: of the choice of partners.
    """

    num_overlays: int = 100
    seed: int = 0

    @property
    def forwards(self) -> int:
        """With that of the image itself."""
        return 1 + self.num_overlays

    def observe(self, model: Model, images: np.ndarray, trusted: np.ndarray) -> Observed:
        """Logits, and "entropy" `[n]` in nats."""
        check_images(images)
        observed = model.read(Layers(), images)
        count = min(self.num_overlays, len(trusted) - 1)
        partners = trusted[np.random.default_rng(self.seed).permutation(len(trusted))[: count + 1]]
        left, total = np.full(len(images), count), np.zeros(len(images))
        for partner in partners:
            other = (images != partner).reshape(len(images), -1).any(axis=1) & (left > 0)
            mixed = np.minimum(images.astype(np.uint16) + partner, 255).astype(np.uint8)
            total += np.where(other, _entropy(model.read(Layers(), mixed)["logits"]), 0)
            left -= other
        return observed | {"entropy": total / (count - left)}

    def fit(self, trusted: Observed) -> Anomaly:
        """Nothing is fitted."""
        return lambda observed: -observed["entropy"]


@dataclasses.dataclass(frozen=True)
class ScaleUp(Statistic):
    """Share of brightened images with the same output, standardized by predicted class (Guo et al. 2023, 2302.03251).

    The published scales, and its "data-limited" setting with clean images at hand. A class with fewer than two trusted
    examples takes mean and deviation of all.

    Attributes:
      scales: factors of the pixels, which are clipped at 255.
    """

    scales: tuple[int, ...] = (3, 5, 7, 9, 11)

    @property
    def forwards(self) -> int:
        """With that of the image itself."""
        return 1 + len(self.scales)

    def observe(self, model: Model, images: np.ndarray, trusted: np.ndarray) -> Observed:
        """Logits, and "consistency" `[n]`, 0 to 1."""
        check_images(images)
        observed = model.read(Layers(), images)
        own = predicted(observed)
        brightened = (np.minimum(images.astype(np.uint16) * scale, 255).astype(np.uint8) for scale in self.scales)
        same = [predicted(model.read(Layers(), one)) == own for one in brightened]
        return observed | {"consistency": np.mean(same, axis=0)}

    def fit(self, trusted: Observed) -> Anomaly:
        """Fits mean and deviation by class."""
        values, classes = trusted["consistency"], predicted(trusted)
        known = {label: values[classes == label] for label in np.unique(classes) if (classes == label).sum() > 1}

        def anomaly(observed: Observed) -> np.ndarray:
            own = [known.get(label, values) for label in predicted(observed)]
            mean, deviation = np.array([(one.mean(), one.std()) for one in own]).T
            # where all trusted ones agree, the least step there is takes the place of the deviation
            return (observed["consistency"] - mean) / np.maximum(deviation, 1 / len(self.scales))

        return anomaly


@dataclasses.dataclass(frozen=True)
class TeCo(Statistic):
    """Deviation, over corruptions, of the severity at which the output first changes (Liu et al. 2023, 2303.18191).

    A triggered image is robust to some corruptions and not to others. Not all that is published: of its fifteen
    corruptions these are the nine of `corruptions.py`, without snow, frost, fog, glass and motion blur and elastic
    transform. In BackdoorBench every severity is put on top of those before it; here each on the image itself.

    Attributes:
      seed: of the noise, which is the same for every image.
    """

    seed: int = 0

    @property
    def forwards(self) -> int:
        """With that of the image itself."""
        return 1 + 5 * len(CORRUPTIONS)

    def observe(self, model: Model, images: np.ndarray, trusted: np.ndarray) -> Observed:
        """Logits, and "severity" `[n, num_corruptions]`, at which the output changes, 6 where it never does."""
        check_images(images)
        observed = model.read(Layers(), images)
        own, first = predicted(observed), np.full((len(images), len(CORRUPTIONS)), 6)
        for index, name in enumerate(CORRUPTIONS):
            for severity in (5, 4, 3, 2, 1):
                changed = corrupted(name, images, severity, self.seed)
                first[predicted(model.read(Layers(), changed)) != own, index] = severity
        return observed | {"severity": first}

    def fit(self, trusted: Observed) -> Anomaly:
        """Nothing is fitted."""
        return lambda observed: observed["severity"].std(axis=1)


def check_images(images: np.ndarray) -> None:
    """Raises ValueError unless images are uint8 `[n, height, width, channels]`."""
    if images.dtype != np.uint8 or images.ndim != 4:
        raise ValueError(
            f"image: wanted uint8 [n, height, width, channels] to change, got {images.dtype} {list(images.shape)}"
        )


def _entropy(logits: np.ndarray) -> np.ndarray:
    log_p = log_softmax(logits.astype(np.float64), axis=1)
    return -(np.exp(log_p) * log_p).sum(axis=1)
