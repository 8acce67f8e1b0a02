"""WaNet: a small smooth warp of the whole image (Nguyen and Tran 2021, arXiv 2102.10369)."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from madjax.attacks.attack import Arrays, Attack


def wanet(
    rng: np.random.Generator,
    image_shape: tuple[int, int, int],
    *,
    strength: float = 0.5,
    grid_size: int = 4,
    decoy_ratio: float = 2.0,
    rotation: float = 10.0,
) -> Attack:
    """Moves every pixel along a field that is drawn on a `grid_size`² grid and interpolated by cubic splines.

    A mean displacement of `strength` / height in coordinates from -1 to 1 is `strength` (height - 1) / (2 height)
    pixels, a quarter of one by default. Decoys are warped by the field plus noise of their own at every pixel.
    """
    height, width, _ = image_shape
    noise = rng.uniform(-1, 1, size=(2, grid_size, grid_size))
    noise /= np.abs(noise).mean()
    at = np.meshgrid(np.linspace(0, grid_size - 1, height), np.linspace(0, grid_size - 1, width), indexing="ij")
    field = np.stack([ndimage.map_coordinates(part, at, order=3, mode="nearest") for part in noise])
    return Attack(
        "wanet", {"shift": strength * field / height * _half(height, width)}, apply, image_shape,
        decoy=decoy, decoy_ratio=decoy_ratio, rotation=rotation,
    )  # fmt: skip


def apply(arrays: Arrays, images: np.ndarray) -> np.ndarray:
    """The images warped by the field; arrays["shift"] is `[2, height, width]`, pixels down and to the right."""
    return _warp(images, np.broadcast_to(arrays["shift"], (len(images), *arrays["shift"].shape)))


def decoy(arrays: Arrays, rng: np.random.Generator, images: np.ndarray) -> np.ndarray:
    """The images warped by the field and noise."""
    height, width = images.shape[1:3]
    noise = rng.uniform(-1, 1, size=(len(images), 2, height, width)) / height * _half(height, width)
    return _warp(images, arrays["shift"] + noise)


def _half(height: int, width: int) -> np.ndarray:
    """Pixels in a unit of coordinates from -1 to 1, down and to the right."""
    return (np.array([height, width]) - 1)[:, None, None] / 2


def _warp(images: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """Bilinear and clamped to the border; shift `[n, 2, height, width]` in pixels, down and to the right."""
    n, height, width, _ = images.shape
    rows = np.clip(np.arange(height)[:, None] + shift[:, 0], 0, height - 1)
    columns = np.clip(np.arange(width) + shift[:, 1], 0, width - 1)
    top, left = (np.minimum(x.astype(int), limit) for x, limit in ((rows, height - 2), (columns, width - 2)))
    down, right = (rows - top)[..., None], (columns - left)[..., None]
    index = np.arange(n)[:, None, None]
    upper = images[index, top, left] * (1 - right) + images[index, top, left + 1] * right
    lower = images[index, top + 1, left] * (1 - right) + images[index, top + 1, left + 1] * right
    return np.rint(upper * (1 - down) + lower * down).astype(np.uint8)
