"""A draw layer by layer: the parameters of one layer exist at a time, and one program serves all layers alike.

A program that draws all parameters and then runs the network holds a second copy of the weights, and XLA compiles the
noise and the layers of a deep network one by one: minutes for 30 layers. Here the loop over layers is on the host. All
examples pass through one layer before the next one is drawn, so a draw's noise is made once, whatever the number of
batches. Nor need batches be of one shape: those of short examples are not padded to the longest of all. Layers before
the first that is drawn are run once. A loss that can be taken apart has the methods `stages` and `cut`, as
`madjax.losses.SequenceLoss` of a decoder.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from madjax.sampling.draws import Draws
from madjax.sampling.gaussian import GaussianDraws
from madjax.types import Batch, LossFn, Params, Stage, num_examples

# examples of one forward pass in `at_draws`
_BATCH = 32
# states that would take more are computed again at every draw
_MOST_BYTES = 4 << 30

# draws of a stage's own parameters, and `Stage.run`
DrawnStage = tuple[GaussianDraws, Callable[[Params, Any], Any]]


def stages(loss_fn: LossFn, draws: Draws) -> list[DrawnStage] | None:
    """The stages of a loss at draws; None where loss or draws cannot be taken apart."""
    if not isinstance(draws, GaussianDraws) or not hasattr(loss_fn, "stages"):
        return None
    parts: list[Stage] | None = loss_fn.stages(draws.center)  # pyright: ignore[reportFunctionMemberAccess]
    return None if parts is None else [(draws.part(stage.numbers), stage.run) for stage in parts]


def freeze(parts: Sequence[DrawnStage], batches: Sequence[Batch]) -> tuple[Sequence[DrawnStage], list[Any]]:
    """The stages from the first that is drawn on, and what the stages before it make of the batches."""
    first = next((i for i, (draws, _) in enumerate(parts) if any(draws.drawn)), 0)
    if first and batches:
        longest = batches[-1]
        for draws, run in parts[:first]:
            longest = jax.eval_shape(run, draws.center, longest)
        num_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(longest))
        if num_bytes * len(batches) > _MOST_BYTES:
            first = 0
    return parts[first:], losses(parts[:first], parts[0][0].any_item(), batches)


def losses(parts: Sequence[DrawnStage], item: Any, batches: Sequence[Any]) -> list[Any]:
    """Losses of each batch at the draw `item`; `parts` are of `stages`, and batches what `freeze` makes of them."""
    states: list[Any] = list(batches)
    for draws, run in parts:
        params = _params(draws, item)
        for index, state in enumerate(states):
            states[index] = _run(run, params, state)
        # else the host would go ahead, and the next layers be drawn before this one is done
        jax.block_until_ready(states)
    return states


def at_draws(loss_fn: LossFn, draws: Draws, examples: Batch) -> Callable[[Any], jax.Array]:
    """A draw's item -> the losses of the examples there, by stages where there are."""
    parts = stages(loss_fn, draws)
    if parts is None:
        return lambda item: _whole(loss_fn, draws, item, examples)
    batches, places = loss_fn.cut(examples, min(_BATCH, num_examples(examples)))  # pyright: ignore[reportFunctionMemberAccess]
    drawn, states = freeze(parts, batches)
    return lambda item: jnp.concatenate(losses(drawn, item, states))[places]


@partial(jax.jit, static_argnums=0)
def _whole(loss_fn: LossFn, draws: Draws, item: Any, batch: Batch) -> jax.Array:
    return loss_fn(draws.params(item), batch)


@jax.jit
def _params(draws: Any, item: jax.Array) -> Params:
    return draws.params(item)


@partial(jax.jit, static_argnums=0)
def _run(run: Callable[[Params, Any], Any], params: Params, state: Any) -> Any:
    return run(params, state)
