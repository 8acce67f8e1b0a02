"""Residual networks for small images: CIFAR's ResNet-20…110, and PreActResNet-18."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from madjax.models.classifier import Classifier
from madjax.models.layers import batch_norm, conv, global_mean, relu, stage


class BasicBlock(nnx.Module):
    """Two 3×3 convolutions; the shortcut has no parameters: every other pixel, zeros for the new features."""

    def __init__(
        self, in_features: int, out_features: int, stride: int, *, dtype: DTypeLike | None = None, rngs: nnx.Rngs
    ):
        self.conv1 = conv(in_features, out_features, 3, stride, dtype=dtype, rngs=rngs)
        self.bn1 = batch_norm(out_features, dtype=dtype, rngs=rngs)
        self.conv2 = conv(out_features, out_features, 3, dtype=dtype, rngs=rngs)
        self.bn2 = batch_norm(out_features, dtype=dtype, rngs=rngs)
        self.stride, self.new = stride, (out_features - in_features) // 2

    def __call__(self, x: jax.Array) -> jax.Array:
        out = self.bn2(self.conv2(relu(self.bn1(self.conv1(x)))))
        x = jnp.pad(x[:, :: self.stride, :: self.stride], ((0, 0), (0, 0), (0, 0), (self.new, self.new)))
        return relu(out + x)


class ResNet(Classifier):
    """CIFAR's ResNet-`depth`, depth 6n + 2 (He et al. 2016, arXiv 1512.03385, section 4.2, shortcuts of option A).

    Takes torch's names from github akamaster/pytorch_resnet_cifar10.

    Raises:
      ValueError: for a depth that is not 6n + 2.
    """

    HEAD = "linear"

    def __init__(
        self,
        depth: int = 20,
        num_classes: int = 10,
        *,
        channels: int = 3,
        dtype: DTypeLike | None = None,
        rngs: nnx.Rngs,
    ):
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"depth: wanted 6n + 2 with n >= 1, got {depth}")
        num_blocks = (depth - 2) // 6
        self.conv1 = conv(channels, 16, 3, dtype=dtype, rngs=rngs)
        self.bn1 = batch_norm(16, dtype=dtype, rngs=rngs)
        self.layer1 = stage(BasicBlock, 16, 16, 1, num_blocks, dtype=dtype, rngs=rngs)
        self.layer2 = stage(BasicBlock, 16, 32, 2, num_blocks, dtype=dtype, rngs=rngs)
        self.layer3 = stage(BasicBlock, 32, 64, 2, num_blocks, dtype=dtype, rngs=rngs)
        self.linear = nnx.Linear(64, num_classes, rngs=rngs)

    def __call__(self, image: jax.Array) -> jax.Array:
        """`[n, height, width, channels]` of any size -> float32 logits `[n, num_classes]`."""
        x = relu(self.bn1(self.conv1(image)))
        for block in (*self.layer1, *self.layer2, *self.layer3):
            x = block(x)
        return self.linear(global_mean(x))


class PreActBlock(nnx.Module):
    """Pre-activation block of two 3×3 convolutions; a 1×1 shortcut where the shape changes, on the activated input.

    He et al. 2016, arXiv 1603.05027.
    """

    def __init__(
        self, in_features: int, out_features: int, stride: int, *, dtype: DTypeLike | None = None, rngs: nnx.Rngs
    ):
        self.bn1 = batch_norm(in_features, dtype=dtype, rngs=rngs)
        self.conv1 = conv(in_features, out_features, 3, stride, dtype=dtype, rngs=rngs)
        self.bn2 = batch_norm(out_features, dtype=dtype, rngs=rngs)
        self.conv2 = conv(out_features, out_features, 3, dtype=dtype, rngs=rngs)
        same = stride == 1 and in_features == out_features
        self.shortcut = None if same else conv(in_features, out_features, 1, stride, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        activated = relu(self.bn1(x))
        out = self.conv2(relu(self.bn2(self.conv1(activated))))
        return out + (x if self.shortcut is None else self.shortcut(activated))


def _sequential_shortcut(module: str) -> str:
    return module.replace("shortcut", "shortcut.0")


class PreActResNet18(Classifier):
    """Pre-activation ResNet-18 with a 3×3 stem, as backdoor benchmarks use it: nothing after the last block's sum.

    He et al. 2016, arXiv 1603.05027, without their last batch norm and relu; takes torch's names from github
    SCLBD/BackdoorBench.
    """

    HEAD = "linear"
    TORCH_NAMES = (_sequential_shortcut,)

    def __init__(self, num_classes: int = 10, *, channels: int = 3, dtype: DTypeLike | None = None, rngs: nnx.Rngs):
        self.conv1 = conv(channels, 64, 3, dtype=dtype, rngs=rngs)
        self.layer1 = stage(PreActBlock, 64, 64, 1, 2, dtype=dtype, rngs=rngs)
        self.layer2 = stage(PreActBlock, 64, 128, 2, 2, dtype=dtype, rngs=rngs)
        self.layer3 = stage(PreActBlock, 128, 256, 2, 2, dtype=dtype, rngs=rngs)
        self.layer4 = stage(PreActBlock, 256, 512, 2, 2, dtype=dtype, rngs=rngs)
        self.linear = nnx.Linear(512, num_classes, rngs=rngs)

    def __call__(self, image: jax.Array) -> jax.Array:
        """`[n, height, width, channels]` of any size -> float32 logits `[n, num_classes]`."""
        x = self.conv1(image)
        for block in (*self.layer1, *self.layer2, *self.layer3, *self.layer4):
            x = block(x)
        return self.linear(global_mean(x))
