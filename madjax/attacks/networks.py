"""The small networks that attacks train: image to image, and a classifier to train them against."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx


class ImageNet(nnx.Module):
    """Image to image of one size: convolutions at half resolution around a skip connection at full."""

    def __init__(self, in_channels: int, out_channels: int, width: int = 12, *, rngs: nnx.Rngs):
        self.stem = nnx.Conv(in_channels, width, (3, 3), rngs=rngs)
        self.down = nnx.Conv(width, 2 * width, (3, 3), strides=2, rngs=rngs)
        self.middle = nnx.Conv(2 * width, 2 * width, (3, 3), rngs=rngs)
        self.output = nnx.Conv(3 * width, out_channels, (3, 3), rngs=rngs)

    def __call__(self, image: jax.Array) -> jax.Array:
        """`[n, height, width, in_channels]` -> `[n, height, width, out_channels]`, unbounded."""
        fine = nnx.relu(self.stem(image))
        coarse = nnx.relu(self.middle(nnx.relu(self.down(fine))))
        # an odd height or width comes back one too large
        wide = jnp.repeat(jnp.repeat(coarse, 2, axis=1), 2, axis=2)[:, : fine.shape[1], : fine.shape[2]]
        return self.output(jnp.concatenate([fine, wide], axis=-1))


class Classifier(nnx.Module):
    """Three strided convolutions and the mean over positions."""

    def __init__(self, channels: int, num_classes: int, width: int = 32, *, rngs: nnx.Rngs):
        self.conv1 = nnx.Conv(channels, width, (3, 3), strides=2, rngs=rngs)
        self.conv2 = nnx.Conv(width, 2 * width, (3, 3), strides=2, rngs=rngs)
        self.conv3 = nnx.Conv(2 * width, 4 * width, (3, 3), rngs=rngs)
        self.output = nnx.Linear(4 * width, num_classes, rngs=rngs)

    def __call__(self, image: jax.Array) -> jax.Array:
        """`[n, height, width, channels]` -> logits `[n, num_classes]`."""
        x = nnx.relu(self.conv2(nnx.relu(self.conv1(image))))
        return self.output(nnx.relu(self.conv3(x)).mean((1, 2)))
