"""Stochastic gradient Langevin dynamics, plain and with RMSprop's preconditioner, as `(init, step)` pairs.

    θ ← θ - (ε/2) G [nβ g + γ (θ - θ₀)] + √ε √G ξ,    ξ ~ N(0, I)

with g the gradient of a minibatch's mean loss. Plain SGLD (Welling and Teh 2011) has G = 1; RMSprop's (Li et al. 2016,
arXiv 1512.07666) has G = 1 / (√V + eps), V ← decay · V + (1 - decay) g² from V = 0, without bias correction and without
the Γ(θ) term. ε here is twice blackjax's step size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from madjax.sampling.target import Target
from madjax.types import Batch, LossFn, Params


class ChainState(NamedTuple):
    """Where a chain is: its parameters, and V of each (a zero where there is none)."""

    position: Params
    second_moment: Params


class StepInfo(NamedTuple):
    """The minibatch's mean loss in nats, before the step."""

    loss: jax.Array


class Sampler(NamedTuple):
    """A kernel: `init(params) -> state`, `step(rng_key, state, target, minibatch, step_size) -> (state, info)`."""

    init: Callable[[Params], ChainState]
    step: Callable[[jax.Array, ChainState, Target, Batch, float | jax.Array], tuple[ChainState, StepInfo]]


def sgld(loss_fn: LossFn, mask: Any, *, drift: bool = False) -> Sampler:
    """Plain SGLD over the leaves that `mask` marks; arguments as for `rmsprop_sgld`."""
    return _langevin(loss_fn, tuple(jax.tree.leaves(mask)), drift, None, None)


def rmsprop_sgld(loss_fn: LossFn, mask: Any, *, decay: float = 0.99, eps: float = 0.1, drift: bool = False) -> Sampler:
    """RMSprop-preconditioned SGLD.

    Args:
      mask: pytree of bool like the parameters: the leaves that move.
      decay, eps: of the preconditioner; eps is outside the root.
      drift: gradients use the batch's own statistics and the running ones move on, as in the paper's code; needs a
        loss with a `drift` method, as `ClassificationLoss` has.
    """

    return _langevin(loss_fn, tuple(jax.tree.leaves(mask)), drift, decay, eps)


def langevin_update(
    position: jax.Array,
    gradient: jax.Array,
    noise: jax.Array,
    preconditioner: jax.Array,
    center: jax.Array,
    target: Target,
    step_size: float | jax.Array,
) -> jax.Array:
    """The module's formula for one array."""
    force = target.nbeta * gradient + target.localization * (position - center)
    return position - step_size / 2 * preconditioner * force + jnp.sqrt(step_size * preconditioner) * noise


# the same kernel for the same arguments, so that a second chain does not compile again
@functools.lru_cache(maxsize=16)
def _langevin(loss_fn: LossFn, drawn: tuple[bool, ...], drift: bool, decay: float | None, eps: float | None) -> Sampler:
    if drift and not hasattr(loss_fn, "drift"):
        raise ValueError(f"drift: {loss_fn} has no `drift` method, so its batch statistics cannot move")

    def precondition(gradient: jax.Array, second_moment: jax.Array) -> tuple[jax.Array, jax.Array]:
        if decay is None or eps is None:
            return jnp.ones(()), second_moment
        second_moment = decay * second_moment + (1 - decay) * jnp.square(gradient)
        return 1 / (jnp.sqrt(second_moment) + eps), second_moment

    def init(params: Params) -> ChainState:
        leaves, treedef = jax.tree.flatten(params)
        moments = [
            jnp.zeros(leaf.shape if is_drawn else (), jnp.float32) for leaf, is_drawn in zip(leaves, drawn, strict=True)
        ]
        return ChainState(params, jax.tree.unflatten(treedef, moments))

    def mean_loss(moving: list[jax.Array], position: Params, minibatch: Batch) -> tuple[jax.Array, Params]:
        leaves, treedef = jax.tree.flatten(position)
        values = iter(moving)
        leaves = [next(values) if is_drawn else leaf for leaf, is_drawn in zip(leaves, drawn, strict=True)]
        position = jax.tree.unflatten(treedef, leaves)
        if drift:
            loss, position = loss_fn.drift(position, minibatch)  # pyright: ignore[reportFunctionMemberAccess]
        else:
            loss = loss_fn(position, minibatch)
        return jnp.mean(loss), position

    def step(
        rng_key: jax.Array, state: ChainState, target: Target, minibatch: Batch, step_size: float | jax.Array
    ) -> tuple[ChainState, StepInfo]:
        moving = [leaf for leaf, is_drawn in zip(jax.tree.leaves(state.position), drawn, strict=True) if is_drawn]
        (loss, position), gradients = jax.value_and_grad(mean_loss, has_aux=True)(moving, state.position, minibatch)
        # statistics that drifted come back in `position`; the drawn leaves in it have not moved yet
        leaves, treedef = jax.tree.flatten(position)
        moments, centers = jax.tree.leaves(state.second_moment), jax.tree.leaves(target.center)
        gradient = iter(gradients)
        for index, is_drawn in enumerate(drawn):
            if is_drawn:
                g = next(gradient)
                scale, moments[index] = precondition(g, moments[index])
                noise = jax.random.normal(jax.random.fold_in(rng_key, index), g.shape)
                leaves[index] = langevin_update(leaves[index], g, noise, scale, centers[index], target, step_size)
        moments = jax.tree.unflatten(jax.tree.structure(state.second_moment), moments)
        return ChainState(jax.tree.unflatten(treedef, leaves), moments), StepInfo(loss)

    return Sampler(init, step)
