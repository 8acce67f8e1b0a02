"""Convolutions that are quicker on a CPU than XLA's own code: of few channels, and the gradient of one image.

Everywhere else, and on other devices, they are XLA's.
"""

from __future__ import annotations

import math
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero

# products summed up for a pixel, of which the CPU is quicker one by one: up to 3×3 pixels of a colour image
_FEW_PRODUCTS = 27


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
