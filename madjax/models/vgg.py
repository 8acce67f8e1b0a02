"""VGG-19 with batch norm (Simonyan and Zisserman 2015, arXiv 1409.1556)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from madjax.models.classifier import Classifier
from madjax.models.layers import batch_norm, conv, global_mean, max_pool, relu


def _torchvision_name(module: str) -> str:
    linear = {"fc1": "classifier.0", "fc2": "classifier.3", "head": "classifier.6"}
    return linear.get(module, module.replace(".layers", ""))


def _one_linear_name(module: str) -> str:
    return "classifier" if module == "head" else module.replace(".layers", "")


class VGG19BN(Classifier):
    """Sixteen 3×3 convolutions with batch norm and relu, five times pooled, and a classifier of linear layers.

    The classifier is torchvision's, which BackdoorBench trains: three linear layers after an average pool to 7×7, where
    the 1×1 of a 32×32 image is repeated; its dropout is left out. Without `hidden` it is the one linear layer that
    github kuangliu/pytorch-cifar has, on the mean over positions. Takes torch's names from both.

    Args:
      image_shape: (height, width, channels), at least 32×32.
      hidden: features of the two hidden linear layers.

    Raises:
      ValueError: for images of less than 32×32.
    """

    HEAD = "head"
    TORCH_NAMES = (_torchvision_name, _one_linear_name)

    def __init__(
        self,
        image_shape: tuple[int, int, int] = (32, 32, 3),
        num_classes: int = 10,
        *,
        hidden: int | None = 4096,
        dtype: DTypeLike | None = None,
        rngs: nnx.Rngs,
    ):
        if min(image_shape[:2]) < 32:
            raise ValueError(f"image_shape: VGG-19 wanted at least 32x32, got {tuple(image_shape)}")
        layers, in_features = [], image_shape[-1]
        for features, count in ((64, 2), (128, 2), (256, 4), (512, 4), (512, 4)):
            for _ in range(count):
                layers += [
                    conv(in_features, features, 3, use_bias=True, dtype=dtype, rngs=rngs),
                    batch_norm(features, dtype=dtype, rngs=rngs),
                    relu,
                ]
                in_features = features
            layers.append(max_pool)
        self.features = nnx.Sequential(*layers)  # of torch's length, so that the positions are its names
        self.fc1 = None if hidden is None else nnx.Linear(512 * 7 * 7, hidden, dtype=dtype, rngs=rngs)
        self.fc2 = None if hidden is None else nnx.Linear(hidden, hidden, dtype=dtype, rngs=rngs)
        self.head = nnx.Linear(hidden or 512, num_classes, rngs=rngs)

    def __call__(self, image: jax.Array) -> jax.Array:
        """`[n, height, width, channels]` -> float32 logits `[n, num_classes]`."""
        x = self.features(image)
        if self.fc1 is None or self.fc2 is None:
            return self.head(global_mean(x))
        # channels first, as the published weights of the first linear layer expect
        x = jnp.transpose(_adaptive_mean(x, 7), (0, 3, 1, 2)).reshape(x.shape[0], -1)
        return self.head(relu(self.fc2(relu(self.fc1(x)))).astype(jnp.float32))


def _adaptive_mean(x: jax.Array, size: int) -> jax.Array:
    """`[n, height, width, c]` -> `[n, size, size, c]`: means over bins that overlap where sizes do not divide."""
    rows, columns = (jnp.asarray(_bins(length, size), x.dtype) for length in x.shape[1:3])
    return jnp.einsum("ih,jw,nhwc->nijc", rows, columns, x)


def _bins(length: int, num_bins: int) -> np.ndarray:
    index, position = np.arange(num_bins)[:, None], np.arange(length)
    start, stop = index * length // num_bins, -(-(index + 1) * length // num_bins)
    inside = (start <= position) & (position < stop)
    return inside / inside.sum(axis=1, keepdims=True)
