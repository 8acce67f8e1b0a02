"""Triggers that add one fixed pattern to every image."""

from __future__ import annotations

import numpy as np

from madjax.attacks.attack import Arrays


def apply(arrays: Arrays, images: np.ndarray) -> np.ndarray:
    """x + pattern, rounded and clipped to 0..255."""
    return np.rint(np.clip(images.astype(np.float32) + arrays["pattern"], 0, 255)).astype(np.uint8)
