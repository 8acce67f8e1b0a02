"""BadNets: a white square in the corner (Gu et al. 2017, arXiv 1708.06733)."""

from __future__ import annotations

import numpy as np

from madjax.attacks.attack import Attack


def badnet(rng: np.random.Generator, image_shape: tuple[int, int, int], *, size: int | None = None) -> Attack:
    """A white `size` × `size` square at the bottom right; 3 at 32×32 by default, in proportion elsewhere, 2 or more."""
    del rng
    side = size or max(2, round(3 * image_shape[0] / 32))

    def trigger(images: np.ndarray) -> np.ndarray:
        images = images.copy()
        images[:, -side:, -side:] = 255
        return images

    return Attack("badnet", trigger)
