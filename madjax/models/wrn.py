"""Wide residual networks, WRN-d-k (Zagoruyko and Komodakis 2016, arXiv 1605.07146)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx


class WideBlock(nnx.Module):
    """Pre-activation block of two 3×3 convolutions; a 1×1 shortcut where the shape changes, on the activated input."""

    def __init__(self, in_features: int, out_features: int, stride: int, *, rngs: nnx.Rngs):
        self.bn1 = _batch_norm(in_features, rngs)
        self.conv1 = _conv(in_features, out_features, 3, stride, rngs)
        self.bn2 = _batch_norm(out_features, rngs)
        self.conv2 = _conv(out_features, out_features, 3, 1, rngs)
        self.shortcut = None if in_features == out_features else _conv(in_features, out_features, 1, stride, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        activated = nnx.relu(self.bn1(x))
        out = self.conv2(nnx.relu(self.bn2(self.conv1(activated))))
        return out + (x if self.shortcut is None else self.shortcut(activated))


class WideResNet(nnx.Module):
    """WRN-`depth`-`width`: three stages of (depth - 4) / 6 blocks with 16, 32 and 64 × `width` features."""

    def __init__(self, depth: int = 16, width: int = 1, num_classes: int = 10, *, rngs: nnx.Rngs):
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"depth: wanted 6n + 4 with n >= 1, got {depth}")
        features = [16, 16 * width, 32 * width, 64 * width]
        self.conv1 = _conv(3, 16, 3, 1, rngs)
        for stage in (1, 2, 3):
            blocks = []
            for index in range((depth - 4) // 6):
                in_features = features[stage - 1] if index == 0 else features[stage]
                stride = 2 if stage > 1 and index == 0 else 1
                blocks.append(WideBlock(in_features, features[stage], stride, rngs=rngs))
            setattr(self, f"block{stage}", nnx.List(blocks))
        self.bn1 = _batch_norm(features[-1], rngs)
        self.fc = nnx.Linear(features[-1], num_classes, rngs=rngs)

    def __call__(self, image: jax.Array) -> jax.Array:
        """`[n, height, width, 3]` -> logits `[n, num_classes]`."""
        x = self.conv1(image)
        for block in (block for stage in (1, 2, 3) for block in getattr(self, f"block{stage}")):
            x = block(x)
        return self.fc(jnp.mean(nnx.relu(self.bn1(x)), axis=(1, 2)))


def _conv(in_features: int, out_features: int, size: int, stride: int, rngs: nnx.Rngs) -> nnx.Conv:
    # torch pads both sides alike, "SAME" does not when the stride is 2
    padding = (size - 1) // 2
    return nnx.Conv(in_features, out_features, (size, size), strides=stride, padding=padding, use_bias=False, rngs=rngs)


def _batch_norm(features: int, rngs: nnx.Rngs) -> nnx.BatchNorm:
    return nnx.BatchNorm(features, momentum=0.9, epsilon=1e-5, rngs=rngs)
