"""Wide residual networks, WRN-d-k (Zagoruyko and Komodakis 2016, arXiv 1605.07146)."""

from __future__ import annotations

import re

import jax
from flax import nnx
from jax.typing import DTypeLike

from madjax.models.classifier import Classifier
from madjax.models.layers import batch_norm, conv, global_mean, relu, stage
from madjax.models.resnet import PreActBlock


def _abl_name(module: str) -> str:
    return re.sub(r"^(block\d)", r"\1.layer", module).replace("shortcut", "convShortcut")


class WideResNet(Classifier):
    """WRN-`depth`-`width`: three stages of (depth - 4) / 6 blocks with 16, 32 and 64 × `width` features.

    Takes torch's names from github bboylyg/ABL, or those of its own modules.

    Raises:
      ValueError: for a depth that is not 6n + 4, or no width.
    """

    HEAD = "fc"
    TORCH_NAMES = (_abl_name, str)

    def __init__(
        self,
        depth: int = 16,
        width: int = 1,
        num_classes: int = 10,
        *,
        channels: int = 3,
        dtype: DTypeLike | None = None,
        rngs: nnx.Rngs,
    ):
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"depth: wanted 6n + 4 with n >= 1, got {depth}")
        if width < 1:
            raise ValueError(f"width: wanted at least 1, got {width}")
        num_blocks = (depth - 4) // 6
        self.conv1 = conv(channels, 16, 3, dtype=dtype, rngs=rngs)
        self.block1 = stage(PreActBlock, 16, 16 * width, 1, num_blocks, dtype=dtype, rngs=rngs)
        self.block2 = stage(PreActBlock, 16 * width, 32 * width, 2, num_blocks, dtype=dtype, rngs=rngs)
        self.block3 = stage(PreActBlock, 32 * width, 64 * width, 2, num_blocks, dtype=dtype, rngs=rngs)
        self.bn1 = batch_norm(64 * width, dtype=dtype, rngs=rngs)
        self.fc = nnx.Linear(64 * width, num_classes, rngs=rngs)

    def __call__(self, image: jax.Array) -> jax.Array:
        """`[n, height, width, channels]` of any size -> float32 logits `[n, num_classes]`."""
        x = self.conv1(image)
        for block in (*self.block1, *self.block2, *self.block3):
            x = block(x)
        return self.fc(global_mean(relu(self.bn1(x))))
