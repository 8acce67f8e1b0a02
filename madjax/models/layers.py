"""Convolutions, batch norms and pooling as torch has them, and the stages that residual networks are made of."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.custom_derivatives import SymbolicZero
from jax.typing import DTypeLike

# one object, so that two models of one architecture compare equal; He et al. 2015, arXiv 1502.01852
_HE_NORMAL = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")
# products summed up for a pixel, of which the CPU is quicker one by one: up to 3×3 pixels of a colour image
_FEW_PRODUCTS = 27


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


def convolve(x: jax.Array, kernel: jax.Array, strides: Any, padding: Any, **settings: Any) -> jax.Array:
    """What `nnx.Conv` takes `conv_general_dilated` for, made quicker on a CPU in two places.

    XLA's CPU code for the first layer of a network takes three to six times as long as a sum of shifted images does;
    for its gradient it is the quicker one. And under `vmap`, the gradient of one image by the kernel becomes a grouped
    convolution, which takes two to eight times as long as a product of matrices (`docs/performance.md`).
    """
    steps = {*(settings.get("lhs_dilation") or ()), *(settings.get("rhs_dilation") or ())}
    whole = steps <= {1} and settings.get("feature_group_count", 1) == 1
    few = math.prod(kernel.shape[:-1]) <= _FEW_PRODUCTS and set(strides) == {1}
    if not whole or not (few or x.shape[0] == 1) or jax.default_backend() != "cpu":
        return jax.lax.conv_general_dilated(x, kernel, strides, padding, **settings)
    if isinstance(padding, str):
        padding = jax.lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], strides, padding)
    return _convolve(x, kernel, _Window(tuple(strides), tuple(map(tuple, padding)), few))


class _Window(NamedTuple):
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    is_small: bool  # few enough products for a sum of shifted images


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def _convolve(x: jax.Array, kernel: jax.Array, window: _Window) -> jax.Array:
    return (_sum_of_shifted if window.is_small else _plain)(x, kernel, window)


@partial(_convolve.defjvp, symbolic_zeros=True)
def _derivative(window: _Window, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (x, kernel), (along_x, along_kernel) = primals, tangents
    result = _convolve(x, kernel, window)
    # images are seldom derived by, and a convolution of zeros takes as long as another one
    parts = [] if type(along_x) is SymbolicZero else [_plain(along_x, kernel, window)]
    if type(along_kernel) is not SymbolicZero:
        # JAX transposes what is linear in the kernel: this is where its gradient gets its form
        linear = _plain if window.is_small or x.shape[0] > 1 else _by_rows
        parts.append(linear(x, along_kernel, window))
    return result, sum(parts, jnp.zeros_like(result))


def _plain(x: jax.Array, kernel: jax.Array, window: _Window) -> jax.Array:
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, window.strides, window.padding, dimension_numbers=numbers)


def _sum_of_shifted(x: jax.Array, kernel: jax.Array, window: _Window) -> jax.Array:
    padded = jnp.pad(x, ((0, 0), *window.padding, (0, 0))).astype(jnp.float32)
    height, width = (size - extent + 1 for size, extent in zip(padded.shape[1:3], kernel.shape[:2], strict=True))
    rows = []
    for row in range(kernel.shape[0]):
        total = jnp.zeros((), jnp.float32)
        for column, channel in np.ndindex(*kernel.shape[1:3]):
            shifted = padded[:, row : row + height, column : column + width, channel, None]
            total = total + shifted * kernel[None, None, None, row, column, channel].astype(jnp.float32)
        rows.append(total)  # sums of their own, which need not wait for each other
    return sum(rows, jnp.zeros((), jnp.float32)).astype(x.dtype)


def _by_rows(x: jax.Array, kernel: jax.Array, window: _Window) -> jax.Array:
    """One product of matrices: of images shifted to the kernel's columns, by all its rows at once, then summed up."""
    padded = jnp.pad(x, ((0, 0), *window.padding, (0, 0)))
    rows, columns, inputs, outputs = kernel.shape

    def shifts(axis: int) -> list[slice]:
        room, step = padded.shape[1 + axis] - kernel.shape[axis] + 1, window.strides[axis]
        return [slice(start, start + room, step) for start in range(kernel.shape[axis])]

    shifted = jnp.concatenate([padded[:, :, across] for across in shifts(1)], axis=-1)
    products = shifted @ kernel.transpose(1, 2, 0, 3).reshape(columns * inputs, rows * outputs)
    products = products.reshape(*products.shape[:3], rows, outputs)
    return reduce(jnp.add, [products[:, down, :, row] for row, down in enumerate(shifts(0))])


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
