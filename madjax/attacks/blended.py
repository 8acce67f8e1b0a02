"""Blended: one fixed image mixed into every pixel (Chen et al. 2017, arXiv 1712.05526)."""

from __future__ import annotations

import numpy as np

from madjax.attacks.attack import Arrays, Attack


def blended(rng: np.random.Generator, image_shape: tuple[int, int, int], *, alpha: float = 0.2) -> Attack:
    """x' = (1 - alpha) x + alpha p, with p one image of uniform noise drawn from `rng` (the paper's second pattern)."""
    pattern = rng.integers(0, 256, size=image_shape).astype(np.float32)
    return Attack("blended", {"pattern": pattern, "alpha": np.array(alpha)}, apply, image_shape)


def apply(arrays: Arrays, images: np.ndarray) -> np.ndarray:
    """The images with the pattern mixed in."""
    alpha = float(arrays["alpha"])
    return np.rint((1 - alpha) * images.astype(np.float32) + alpha * arrays["pattern"]).astype(np.uint8)
