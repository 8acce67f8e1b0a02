"""Convolutions, batch norms and pooling as torch has them, and the stages that residual networks are made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from madjax.models.convolution import convolve

# one object, so that two models of one architecture compare equal; He et al. 2015, arXiv 1502.01852
_HE_NORMAL = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")


def conv(
    in_features: int,
    out_features: int,
    size: int,
    stride: int = 1,
    *,
    use_bias: bool = False,
    dtype: DTypeLike | None,
    rngs: nnx.Rngs,
) -> nnx.Conv:
    """A `size`×`size` convolution, initialized by He's rule for the fan out."""
    return nnx.Conv(
        in_features, out_features, (size, size), strides=stride, use_bias=use_bias, dtype=dtype, rngs=rngs,
        # torch pads both sides alike, "SAME" does not when the stride is 2
        padding=(size - 1) // 2, kernel_init=_HE_NORMAL, conv_general_dilated=convolve,
    )  # fmt: skip


def relu(x: jax.Array) -> jax.Array:
    """`max(x, 0)`, of derivative 0 at 0, as `nnx.relu` has it.

    On a CPU by a choice: XLA computes a maximum of one array anew wherever it is read, and with it the sums of all
    residual blocks before it, but a choice between two arrays only once (`docs/performance.md`).
    """
    return jnp.where(x <= 0, 0, x) if jax.default_backend() == "cpu" else nnx.relu(x)


def batch_norm(features: int, *, dtype: DTypeLike | None, rngs: nnx.Rngs) -> nnx.BatchNorm:
    """Batch norm with torch's momentum of 0.1 and epsilon of 1e-5, computed in float32 and returned as `dtype`.

    The running variance follows the batch's own variance, where torch takes n / (n - 1) of it.
    """
    return nnx.BatchNorm(features, momentum=0.9, epsilon=1e-5, dtype=dtype, promote_dtype=_float32, rngs=rngs)


def _float32(arrays: Any, /, *, dtype: Any = None, inexact: bool = True) -> Any:
    # without it, bfloat16 would round the running statistics before they are subtracted
    return tuple(array.astype(jnp.float32) for array in arrays)


def stage(
    block: Callable[..., nnx.Module],
    in_features: int,
    out_features: int,
    stride: int,
    num_blocks: int,
    *,
    dtype: DTypeLike | None,
    rngs: nnx.Rngs,
) -> nnx.List:
    """`num_blocks` residual blocks; the first one changes the features and has the stride."""
    first = block(in_features, out_features, stride, dtype=dtype, rngs=rngs)
    rest = (block(out_features, out_features, 1, dtype=dtype, rngs=rngs) for _ in range(num_blocks - 1))
    return nnx.List([first, *rest])


def global_mean(x: jax.Array) -> jax.Array:
    """`[n, height, width, features]` -> float32 `[n, features]`, so that the head and the logits are float32."""
    return jnp.mean(x, axis=(1, 2), dtype=jnp.float32)


def max_pool(x: jax.Array) -> jax.Array:
    """2×2 maxima with a stride of 2; a last odd row or column is dropped. Equal maxima share their gradient."""
    return _pool(jnp.maximum, x)


def avg_pool(x: jax.Array) -> jax.Array:
    """2×2 means with a stride of 2; a last odd row or column is dropped."""
    return _pool(jnp.add, x) / 4


def _pool(two: Callable[[jax.Array, jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """Of four slices: the CPU takes many times as long for windows, as `nnx.max_pool` has them, and their gradient."""
    height, width = (size // 2 * 2 for size in x.shape[1:3])
    rows = two(x[:, 0:height:2, :width], x[:, 1:height:2, :width])
    return two(rows[:, :, 0::2], rows[:, :, 1::2])
