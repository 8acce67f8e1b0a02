"""Random crop, flip and rotation of images on the device, inside the compiled training step."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Augmentation(NamedTuple):
    """BackdoorBench's: crop after padding with zeros for all data, flip for natural images, rotation for some attacks.

    Attributes:
      crop: pixels of padding on every side, of which a random window is kept.
      flip: left to right, with probability a half.
      rotation: degrees at most, to either side, bilinear, zeros outside.
    """

    crop: int = 4
    flip: bool = False
    rotation: float = 0.0

    def __call__(self, rng_key: jax.Array, images: jax.Array) -> jax.Array:
        """Images `[n, height, width, channels]` of any dtype; the same shape and dtype."""
        keys = jax.random.split(rng_key, 3)
        if self.rotation:
            images = _rotate(keys[0], images, self.rotation)
        if self.crop:
            images = _crop(keys[1], images, self.crop)
        if self.flip:
            chosen = jax.random.bernoulli(keys[2], shape=(len(images), 1, 1, 1))
            images = jnp.where(chosen, images[:, :, ::-1], images)
        return images


def _crop(rng_key: jax.Array, images: jax.Array, pixels: int) -> jax.Array:
    _, height, width, channels = images.shape
    padded = jnp.pad(images, ((0, 0), (pixels, pixels), (pixels, pixels), (0, 0)))
    offsets = jax.random.randint(rng_key, (len(images), 2), 0, 2 * pixels + 1)

    def window(image: jax.Array, offset: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(image, (offset[0], offset[1], 0), (height, width, channels))

    return jax.vmap(window)(padded, offsets)


def _rotate(rng_key: jax.Array, images: jax.Array, degrees: float) -> jax.Array:
    _, height, width, _ = images.shape
    angles = jnp.deg2rad(jax.random.uniform(rng_key, (len(images),), minval=-degrees, maxval=degrees))
    rows, columns = jnp.meshgrid(
        jnp.arange(height) - (height - 1) / 2, jnp.arange(width) - (width - 1) / 2, indexing="ij"
    )

    def one(image: jax.Array, angle: jax.Array) -> jax.Array:
        cos, sin = jnp.cos(angle), jnp.sin(angle)
        at = [cos * rows - sin * columns + (height - 1) / 2, sin * rows + cos * columns + (width - 1) / 2]

        def channel(values: jax.Array) -> jax.Array:
            return jax.scipy.ndimage.map_coordinates(values, at, order=1, mode="constant")

        return jax.vmap(channel, in_axes=-1, out_axes=-1)(image)

    turned = jax.vmap(one)(images.astype(jnp.float32), angles)
    whole = jnp.issubdtype(images.dtype, jnp.integer)
    return (jnp.rint(turned) if whole else turned).astype(images.dtype)
