"""SIG: a sinusoid across the image, on images of the target class alone (Barni et al. 2019, arXiv 1902.11237)."""

from __future__ import annotations

import numpy as np

from madjax.attacks.additive import apply
from madjax.attacks.attack import Attack


def sig(
    rng: np.random.Generator,
    image_shape: tuple[int, int, int],
    *,
    delta: float = 40,
    frequency: float = 6,
    clean_label: bool = True,
) -> Attack:
    """x'[i, j] = x[i, j] + delta sin(2π j frequency / width), clipped to 0..255.

    `frequency` is in cycles an image. An image narrower than 3 `frequency` cannot carry them (at 2 samples a cycle or
    fewer the sinusoid vanishes or folds back), so there it carries width / 4. `clean_label=False` poisons images of all
    classes and changes their label, for data whose classes are too easy for a clean-label trigger to be learned.
    """
    del rng
    width = image_shape[1]
    cycles = frequency if width >= 3 * frequency else width / 4
    wave = delta * np.sin(2 * np.pi * np.arange(width) * cycles / width)[None, :, None]
    return Attack("sig", {"pattern": wave.astype(np.float32)}, apply, image_shape, clean_label)
