"""The loop with which attacks train what they are made of: Adam on minibatches of images."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax


def minimize(
    rng: np.random.Generator,
    loss: Callable[..., jax.Array],
    params: Any,
    data: tuple[np.ndarray, ...],
    *,
    num_steps: int,
    learning_rate: float,
    batch_size: int = 64,
) -> Any:
    """Params after `num_steps` of Adam on `loss(params, rng_key, *batch)`, a scalar.

    Args:
      data: arrays `[n, ...]`, of which every step sees the same `batch_size` rows.

    Raises:
      FloatingPointError: the loss is not finite at the end.
    """
    optimizer = optax.adam(learning_rate)

    @partial(jax.jit, donate_argnums=0)
    def step(state: Any, rng_key: jax.Array, batch: tuple[jax.Array, ...]) -> Any:
        params, moments = state
        value, gradient = jax.value_and_grad(loss)(params, rng_key, *batch)
        updates, moments = optimizer.update(gradient, moments, params)
        return (optax.apply_updates(params, updates), moments), value

    state = jax.tree.map(jnp.array, (params, optimizer.init(params)))
    rng_key, value = jax.random.key(rng.integers(2**31)), jnp.zeros(())
    for index in range(num_steps):
        rows = rng.choice(len(data[0]), size=min(batch_size, len(data[0])), replace=False)
        state, value = step(state, jax.random.fold_in(rng_key, index), tuple(jnp.asarray(x[rows]) for x in data))
    if not np.isfinite(float(value)):
        raise FloatingPointError(f"learning_rate: {learning_rate} made the attack's loss {float(value)}")
    return state[0]
