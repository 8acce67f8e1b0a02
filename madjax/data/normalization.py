"""From uint8 pixels to a model's input: the usual means and standard deviations of each data set's channels."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

# (mean, standard deviation) of pixels in 0..1, as published with the models trained on each set
NORMALIZATIONS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "none": ((0.0,), (1.0,)),
    "symmetric": ((0.5,), (0.5,)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "gtsrb": ((0.0,), (1.0,)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "tiny_imagenet": ((0.4802, 0.4481, 0.3975), (0.2302, 0.2265, 0.2262)),
}


@dataclass(frozen=True)
class Normalize:
    """`(x / 255 - mean) / std`: pixels in 0..255 `[..., channels]` -> float32 of the same shape; runs under `jit`.

    Attributes:
      mean, std: a number for each channel, or one for all, of pixels in 0..1.

    Raises:
      ValueError: for numbers that are not finite, a `std` that is not positive, or images of other channels or dtype.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self):
        if not self.mean or not all(map(math.isfinite, self.mean)):
            raise ValueError(f"mean: got {self.mean}, wanted finite numbers")
        if not self.std or not all(math.isfinite(value) and value > 0 for value in self.std):
            raise ValueError(f"std: got {self.std}, wanted finite positive numbers")
        if 1 != len(self.mean) != len(self.std) != 1:
            raise ValueError(f"std: got {len(self.std)} numbers, wanted 1 or {len(self.mean)}, as many as means")

    def __call__(self, images: jax.Array | np.ndarray) -> jax.Array:
        # float pixels are those of a trigger that is being optimized
        if images.dtype not in (jnp.uint8, jnp.float32):
            raise ValueError(f"images: got {images.dtype}, wanted uint8, or float32 in 0..255")
        channels = max(len(self.mean), len(self.std))
        if not images.ndim or channels not in (1, images.shape[-1]):
            raise ValueError(f"images: got shape {images.shape}, wanted {channels} channels last")
        return (jnp.asarray(images, jnp.float32) / 255 - _last(self.mean, images)) / _last(self.std, images)


def parse_normalization(text: str) -> Normalize:
    """A name in `NORMALIZATIONS`, or numbers as `m1,m2,m3/s1,s2,s3`.

    Raises:
      ValueError: for anything else.

    >>> parse_normalization("0.5/0.25")
    Normalize(mean=(0.5,), std=(0.25,))
    """
    if text in NORMALIZATIONS:
        return Normalize(*NORMALIZATIONS[text])
    try:
        mean, std = (tuple(float(number) for number in half.split(",")) for half in text.split("/"))
    except ValueError:
        names = ", ".join(NORMALIZATIONS)
        raise ValueError(f"normalization: got {text!r}, wanted one of {names}, or m1,m2,m3/s1,s2,s3") from None
    return Normalize(mean, std)


def _last(values: tuple[float, ...], images: jax.Array | np.ndarray) -> np.ndarray:
    """Along the last axis, with the rank of the images: JAX may be told not to promote ranks."""
    return np.asarray(values, np.float32).reshape((1,) * (images.ndim - 1) + (-1,))
