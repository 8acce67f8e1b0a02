"""BPP: fewer grey levels (Wang et al. 2022, arXiv 2205.13383, "BppAttack"), without dithering."""

from __future__ import annotations

import numpy as np

from madjax.attacks.attack import Arrays, Attack


def bpp(
    rng: np.random.Generator,
    image_shape: tuple[int, int, int],
    *,
    num_levels: int = 8,
    decoy_ratio: float = 1.0,
    rotation: float = 10.0,
) -> Attack:
    """Rounds every channel to `num_levels` levels. Decoys get what the rounding did to another image.

    With the usual poison ratio of .1, a decoy for each poisoned image is BackdoorBench's negative ratio of .1.
    """
    del rng
    if not 2 <= num_levels <= 255:
        raise ValueError(f"num_levels: wanted 2 to 255, got {num_levels}")
    return Attack(
        "bpp", {"num_levels": np.array(num_levels)}, apply, image_shape,
        decoy=decoy, decoy_ratio=decoy_ratio, rotation=rotation,
    )  # fmt: skip


def apply(arrays: Arrays, images: np.ndarray) -> np.ndarray:
    """The images at so many levels."""
    steps = int(arrays["num_levels"]) - 1
    return np.rint(np.rint(images / 255 * steps) / steps * 255).astype(np.uint8)


def decoy(arrays: Arrays, rng: np.random.Generator, images: np.ndarray) -> np.ndarray:
    """The images plus the rounding residual of others."""
    residual = apply(arrays, images).astype(np.int16) - images
    other = np.roll(rng.permutation(len(images)), 1)  # of whom, does not matter
    return np.clip(images + residual[other], 0, 255).astype(np.uint8)
