"""Independent Gaussian draws around the trained parameters.

    θ = θ₀ + scale · unit · ξ,    ξ ~ N(0, I)

`unit` says what a scale of 1 means for each parameter: 1 (absolute), the root mean square of its tensor (relative), or
the posterior standard deviation under a diagonal curvature. Draw i depends on nothing but the key and i, so a run in
pieces equals a run in one, and nothing needs to be stored but the key.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from madjax.sampling.draws import NumberedDraws
from madjax.types import Batch, LossFn, Params

Noise = Literal["absolute", "relative", "curvature"]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["rng_key", "center", "unit", "scales", "numbers"],
    meta_fields=["drawn", "antithetic"],
)
@dataclasses.dataclass(frozen=True)
class GaussianDraws(NumberedDraws):
    """Gaussian draws; see the module's docstring.

    Attributes:
      center: the trained parameters.
      unit: one array for each drawn leaf, broadcastable to it.
      scales: float32 `[num_draws]`: one multiple of `unit` a draw.
      drawn: which leaves of `center` are drawn, in flattening order.
      antithetic: whether draw 2i + 1 is draw 2i mirrored at the center.
      numbers: int32 `[num_leaves]`: where the leaves stand among those of the whole, of which this is a `part`; None
        for the whole.
    """

    rng_key: jax.Array
    center: Params
    unit: tuple[jax.Array, ...]
    scales: jax.Array
    drawn: tuple[bool, ...]
    antithetic: bool = False
    numbers: jax.Array | None = None

    @property
    def num_draws(self) -> int:
        return self.scales.shape[0]

    def with_scale(self, scale: float, num_draws: int | None = None) -> GaussianDraws:
        """The same noise, multiplied by `scale`; `num_draws` of them where given."""
        scales = jnp.full((num_draws or self.num_draws,), scale, jnp.float32)
        return dataclasses.replace(self, scales=scales)

    def params(self, item: jax.Array) -> Params:
        scale = self.scales[item]
        if self.antithetic:
            item, scale = item // 2, jnp.where(item % 2, -scale, scale)
        key = jax.random.fold_in(self.rng_key, item)
        leaves, treedef = jax.tree.flatten(self.center)
        units = iter(self.unit)
        for index, (leaf, is_drawn) in enumerate(zip(leaves, self.drawn, strict=True)):
            if is_drawn:
                number = index if self.numbers is None else self.numbers[index]
                noise = jax.random.normal(jax.random.fold_in(key, number), leaf.shape, jnp.float32)
                leaves[index] = (leaf + scale * next(units) * noise).astype(leaf.dtype)
        return jax.tree.unflatten(treedef, leaves)

    def part(self, numbers: Any) -> GaussianDraws:
        """The same draws of some leaves: `numbers` is a pytree of int, where they stand in flattening order."""
        leaves, chosen = jax.tree.leaves(self.center), jax.tree.leaves(numbers)
        units = dict(zip(np.flatnonzero(self.drawn), self.unit, strict=True))
        return dataclasses.replace(
            self, center=jax.tree.map(leaves.__getitem__, numbers), numbers=jnp.array(chosen, jnp.int32),
            unit=tuple(units[i] for i in chosen if i in units), drawn=tuple(self.drawn[i] for i in chosen),
        )  # fmt: skip


def gaussian(
    rng_key: jax.Array,
    center: Params,
    scale: float | np.ndarray | jax.Array,
    *,
    num_draws: int,
    mask: Any,
    noise: Noise = "absolute",
    curvature: Params | None = None,
    antithetic: bool = False,
) -> GaussianDraws:
    """`num_draws` independent draws around `center`.

    Args:
      scale: a scalar, or one value for each draw.
      mask: pytree of bool like `center`: the leaves to draw (`drawn_parameters` makes it).
      noise: what a scale of 1 means. "absolute": a standard deviation of 1. "relative": each tensor's root mean
        square. "curvature": (h / mean(h) + 1)^-1/2 of each parameter, h from `diagonal_curvature`, times its tensor's
        root mean square: flat directions move as in "relative", steep ones less.
      curvature: the diagonal curvature, for noise="curvature".
      antithetic: see `GaussianDraws`.
    """
    if num_draws < 1:
        raise ValueError(f"num_draws: wanted at least 1, got {num_draws}")
    leaves, drawn = jax.tree.leaves(center), tuple(jax.tree.leaves(mask))
    if noise == "curvature" and curvature is None:
        raise ValueError("curvature: noise='curvature' needs diagonal_curvature(...), got None")
    steepness = jax.tree.leaves(curvature) if noise == "curvature" else leaves
    unit = tuple(
        _unit(leaf, steep, noise) for leaf, steep, is_drawn in zip(leaves, steepness, drawn, strict=True) if is_drawn
    )
    scales = jnp.broadcast_to(jnp.asarray(scale, jnp.float32), (num_draws,))
    return GaussianDraws(rng_key, center, unit, scales, drawn, antithetic)


def _unit(leaf: jax.Array, steepness: jax.Array, noise: Noise) -> jax.Array:
    if noise == "absolute":
        return jnp.ones((), jnp.float32)
    rms = jnp.sqrt(jnp.mean(jnp.square(leaf.astype(jnp.float32))))
    if noise == "relative":
        return rms
    return rms / jnp.sqrt(1 + steepness / jnp.maximum(jnp.mean(steepness), jnp.finfo(jnp.float32).tiny))


def diagonal_curvature(loss_fn: LossFn, params: Params, examples: Batch, *, batch_size: int = 1) -> Params:
    """Empirical Fisher diagonal: the mean over examples of the squared gradient of the loss, like `params`.

    With `batch_size` b > 1 the gradient of each batch's mean is squared and multiplied by b: the same expectation where
    the mean gradient is near zero, as at trained parameters, at 1/b of the cost.
    """
    squared = jax.jit(
        lambda params, batch: jax.tree.map(
            lambda g: jnp.square(g) * batch_size, jax.grad(lambda p: loss_fn(p, batch).mean())(params)
        )
    )
    count = jax.tree.leaves(examples)[0].shape[0] // batch_size
    if count < 1:
        raise ValueError(f"batch_size: {batch_size} is more than the number of examples")
    total: Any = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), params)
    for index in range(count):
        batch = jax.tree.map(lambda x, start=index * batch_size: x[start : start + batch_size], examples)
        total = jax.tree.map(jnp.add, total, squared(params, batch))
    return jax.tree.map(lambda leaf: leaf / count, total)
