"""Small convolutional classifiers: the digits' own, and the two-convolution network of the BadNets checkpoints."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx


class DigitsCNN(nnx.Module):
    """Two 3×3 convolutions with batch norm, a hidden layer of 128: 8×8 grey images in [0, 1], 57 k parameters or so."""

    def __init__(self, num_classes: int = 10, *, rngs: nnx.Rngs):
        self.conv1 = nnx.Conv(1, 16, (3, 3), use_bias=False, rngs=rngs)
        self.norm1 = nnx.BatchNorm(16, momentum=0.9, rngs=rngs)
        self.conv2 = nnx.Conv(16, 32, (3, 3), use_bias=False, rngs=rngs)
        self.norm2 = nnx.BatchNorm(32, momentum=0.9, rngs=rngs)
        self.hidden = nnx.Linear(4 * 4 * 32, 96, rngs=rngs)
        self.output = nnx.Linear(96, num_classes, rngs=rngs)

    def __call__(self, image: jax.Array) -> jax.Array:
        """`[n, 8, 8, 1]` -> logits `[n, num_classes]`."""
        x = nnx.relu(self.norm1(self.conv1(image)))
        x = nnx.relu(self.norm2(self.conv2(x)))
        x = nnx.max_pool(x, (2, 2), strides=(2, 2))
        return self.output(nnx.relu(self.hidden(x.reshape(x.shape[0], -1))))


class BadNetsCNN(nnx.Module):
    """Two valid 5×5 convolutions, each with relu and 2×2 average pooling, then two linear layers.

    The network of the public badnets-pytorch checkpoints, for 28×28 and 32×32 images.
    """

    def __init__(self, image_shape: tuple[int, int, int], num_classes: int = 10, *, rngs: nnx.Rngs):
        height, width, channels = image_shape
        size = ((height - 4) // 2 - 4) // 2 * (((width - 4) // 2 - 4) // 2)
        self.conv1 = nnx.Conv(channels, 16, (5, 5), padding="VALID", rngs=rngs)
        self.conv2 = nnx.Conv(16, 32, (5, 5), padding="VALID", rngs=rngs)
        self.fc1 = nnx.Linear(32 * size, 512, rngs=rngs)
        self.fc2 = nnx.Linear(512, num_classes, rngs=rngs)

    def __call__(self, image: jax.Array) -> jax.Array:
        """`[n, height, width, channels]` -> logits `[n, num_classes]`."""
        x = nnx.avg_pool(nnx.relu(self.conv1(image)), (2, 2), strides=(2, 2))
        x = nnx.avg_pool(nnx.relu(self.conv2(x)), (2, 2), strides=(2, 2))
        # channels first, as the published weights of fc1 expect
        x = jnp.transpose(x, (0, 3, 1, 2)).reshape(x.shape[0], -1)
        return self.fc2(nnx.relu(self.fc1(x)))
