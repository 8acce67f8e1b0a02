"""Small convolutional classifiers: the digits' own, and the two-convolution network of the BadNets checkpoints."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from madjax.models.classifier import Classifier
from madjax.models.convolution import convolve
from madjax.models.layers import avg_pool, batch_norm, max_pool, relu


class DigitsCNN(Classifier):
    """Two 3×3 convolutions with batch norm, a hidden layer of 96: 55 k parameters for 8×8 grey images.

    Its hidden layer reads features in the order height, width, channel; no torch checkpoint of it is known.
    """

    HEAD = "output"

    def __init__(
        self,
        num_classes: int = 10,
        image_shape: tuple[int, int, int] = (8, 8, 1),
        *,
        dtype: DTypeLike | None = None,
        rngs: nnx.Rngs,
    ):
        height, width, channels = image_shape
        self.conv1 = nnx.Conv(
            channels, 16, (3, 3), use_bias=False, dtype=dtype, rngs=rngs, conv_general_dilated=convolve
        )
        self.norm1 = batch_norm(16, dtype=dtype, rngs=rngs)
        self.conv2 = nnx.Conv(16, 32, (3, 3), use_bias=False, dtype=dtype, rngs=rngs)
        self.norm2 = batch_norm(32, dtype=dtype, rngs=rngs)
        self.hidden = nnx.Linear((height // 2) * (width // 2) * 32, 96, dtype=dtype, rngs=rngs)
        self.output = nnx.Linear(96, num_classes, rngs=rngs)

    def __call__(self, image: jax.Array) -> jax.Array:
        """`[n, height, width, channels]` -> float32 logits `[n, num_classes]`."""
        x = relu(self.norm1(self.conv1(image)))
        x = relu(self.norm2(self.conv2(x)))
        x = max_pool(x)
        return self.output(relu(self.hidden(x.reshape(x.shape[0], -1))).astype(jnp.float32))


def _sequential_name(module: str) -> str:
    return f"{module}.0"


class BadNetsCNN(Classifier):
    """Two valid 5×5 convolutions, each with relu and 2×2 average pooling, then two linear layers.

    The network of github verazuo/badnets-pytorch, whose names it takes, for images of at least 16×16.

    Raises:
      ValueError: for images of less than 16×16.
    """

    HEAD = "fc2"
    TORCH_NAMES = (_sequential_name, str)

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        num_classes: int = 10,
        *,
        dtype: DTypeLike | None = None,
        rngs: nnx.Rngs,
    ):
        height, width, channels = image_shape
        if min(height, width) < 16:
            raise ValueError(f"image_shape: the BadNets CNN wanted at least 16x16, got {tuple(image_shape)}")
        size = ((height - 4) // 2 - 4) // 2 * (((width - 4) // 2 - 4) // 2)
        self.conv1 = nnx.Conv(
            channels, 16, (5, 5), padding="VALID", dtype=dtype, rngs=rngs, conv_general_dilated=convolve
        )
        self.conv2 = nnx.Conv(16, 32, (5, 5), padding="VALID", dtype=dtype, rngs=rngs)
        self.fc1 = nnx.Linear(32 * size, 512, dtype=dtype, rngs=rngs)
        self.fc2 = nnx.Linear(512, num_classes, rngs=rngs)

    def __call__(self, image: jax.Array) -> jax.Array:
        """`[n, height, width, channels]` -> float32 logits `[n, num_classes]`."""
        x = avg_pool(relu(self.conv1(image)))
        x = avg_pool(relu(self.conv2(x)))
        # channels first, as the published weights of fc1 expect
        x = jnp.transpose(x, (0, 3, 1, 2)).reshape(x.shape[0], -1)
        return self.fc2(relu(self.fc1(x)).astype(jnp.float32))
