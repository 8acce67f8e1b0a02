"""Nine of ImageNet-C's fifteen corruptions (Hendrycks and Dietterich 2019, arXiv 1903.12261), at its five severities.

Of images of any size, float64 `[n, height, width, channels]` in [0, 1]. Noise is drawn once for all images, so that
what becomes of one does not depend on those beside it.
"""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
from PIL import Image
from scipy import ndimage
from scipy.stats import poisson

# images, severity from 1 to 5, generator -> images, which may leave [0, 1]
Corruption = Callable[[np.ndarray, int, np.random.Generator], np.ndarray]


def corrupted(name: str, images: np.ndarray, severity: int, seed: int) -> np.ndarray:
    """Uint8 images under the corruption `name`, which are uint8 `[n, height, width, channels]` themselves."""
    changed = CORRUPTIONS[name](images / 255, severity, np.random.default_rng(seed))
    return np.rint(np.clip(changed, 0, 1) * 255).astype(np.uint8)


def gaussian_noise(images: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Adds normal noise."""
    return images + rng.normal(size=images.shape[1:], scale=(0.08, 0.12, 0.18, 0.26, 0.38)[severity - 1])


def shot_noise(images: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Counts photons."""
    photons = (60, 25, 12, 5, 3)[severity - 1]
    return poisson.ppf(rng.uniform(1e-9, 1, size=(1, *images.shape[1:])), np.maximum(images * photons, 1e-9)) / photons


def impulse_noise(images: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Sets values to 0 or 1."""
    amount = (0.03, 0.06, 0.09, 0.17, 0.27)[severity - 1]
    chance = rng.random(images.shape[1:])
    return np.where(chance < amount, np.where(chance < amount / 2, 0.0, 1.0), images)


def defocus_blur(images: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Averages over a disk with a soft rim."""
    radius, rim = ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5))[severity - 1]
    across = np.arange(-radius - 1, radius + 2)
    disk = ndimage.gaussian_filter((across[:, None] ** 2 + across**2 <= radius**2).astype(float), rim)
    return ndimage.convolve(images, (disk / disk.sum())[None, :, :, None], mode="mirror")


def zoom_blur(images: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Averages over magnifications of the center."""
    end, step = ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03))[severity - 1]
    factors = np.arange(1, end, step)
    return (images + sum(_magnified(images, factor) for factor in factors)) / (len(factors) + 1)


def brightness(images: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Raises the value of hue, saturation and value."""
    value = images.max(axis=3, keepdims=True)
    raised = np.minimum(value + (0.1, 0.2, 0.3, 0.4, 0.5)[severity - 1], 1)
    return np.where(value > 0, images / np.where(value > 0, value, 1), 1) * raised


def contrast(images: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Draws values to their mean, by image and channel."""
    mean = images.mean(axis=(1, 2), keepdims=True)
    return (images - mean) * (0.4, 0.3, 0.2, 0.1, 0.05)[severity - 1] + mean


def pixelate(images: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Averages to fewer pixels and back."""
    share = (0.6, 0.5, 0.4, 0.3, 0.25)[severity - 1]

    def change(image: Image.Image) -> Image.Image:
        small = image.resize(
            (max(1, int(image.width * share)), max(1, int(image.height * share))), Image.Resampling.BOX
        )
        return small.resize(image.size, Image.Resampling.BOX)

    return _by_image(images, change)


def jpeg_compression(images: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Compresses and decompresses."""

    def change(image: Image.Image) -> Image.Image:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=(25, 18, 15, 10, 7)[severity - 1])
        return Image.open(file)

    return _by_image(images, change)


CORRUPTIONS: dict[str, Corruption] = {
    function.__name__: function
    for function in (
        gaussian_noise, shot_noise, impulse_noise, defocus_blur, zoom_blur, brightness, contrast, pixelate,
        jpeg_compression,
    )
}  # fmt: skip


def _magnified(images: np.ndarray, factor: float) -> np.ndarray:
    height, width = images.shape[1:3]
    rows, columns = ((size - 1) / 2 + (np.arange(size) - (size - 1) / 2) / factor for size in (height, width))
    places = np.meshgrid(np.arange(len(images)), rows, columns, np.arange(images.shape[3]), indexing="ij")
    return ndimage.map_coordinates(images, places, order=1, mode="nearest")


def _by_image(images: np.ndarray, change: Callable[[Image.Image], Image.Image]) -> np.ndarray:
    pixels = np.rint(images * 255).astype(np.uint8)
    # Pillow knows grey images without a channel
    changed = [np.asarray(change(Image.fromarray(one.squeeze(2) if one.shape[2] == 1 else one))) for one in pixels]
    return np.stack(changed).reshape(images.shape) / 255
