"""BadNets: a white square in the corner (Gu et al. 2017, arXiv 1708.06733)."""

from __future__ import annotations

import numpy as np

from madjax.attacks.attack import Arrays, Attack


def badnet(rng: np.random.Generator, image_shape: tuple[int, int, int], *, size: int | None = None) -> Attack:
    """A white `size` × `size` square at the bottom right; 3 at 32×32 by default, in proportion elsewhere, 2 or more."""
    del rng
    side = size or max(2, round(3 * image_shape[0] / 32))
    return Attack("badnet", {"size": np.array(side)}, apply, image_shape)


def apply(arrays: Arrays, images: np.ndarray) -> np.ndarray:
    """The images with the square."""
    images, side = images.copy(), int(arrays["size"])
    images[:, -side:, -side:] = 255
    return images
