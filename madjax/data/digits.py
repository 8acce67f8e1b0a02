"""scikit-learn's digits: 1,797 scans of handwritten digits, 8×8 pixels, shipped with the package."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.datasets import load_digits


def digits() -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 `[1797, 8, 8, 1]` in 0..255 and labels int32 `[1797]`, in the order of the original file."""
    data: Any = load_digits()
    images = np.rint(data.images * (255 / 16)).astype(np.uint8)
    return images[..., None], data.target.astype(np.int32)
