"""A tangent's losses layer by layer, of a model that is too large to be passed forward and back at a time.

A program of the whole network holds the gradients of all drawn tensors, and with them all weights once more where a
device does not compute in their dtype; and XLA compiles a deep network layer by layer. Here the loop over layers is on
the host, as in `madjax.sampling.layerwise`, and one program serves all layers alike. Forward, what each layer is given
is kept. Backward, a layer is run again to be differentiated, its gradients become sketches, and they are gone before
the layer before it gets its turn; layers before the first that is drawn get none. The price is a fourth forward pass.
Batches are those of `madjax.losses.SequenceLoss.cut`: short examples are not padded to the longest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from madjax.sampling import tangent
from madjax.sampling.draws import Draws
from madjax.sampling.tangent import SMALLEST, TangentDraws, gradient_bytes, sketch
from madjax.types import Batch, LossFn, Params, Stage


class Layer(NamedTuple):
    """A stage of a loss with its own parameters.

    Attributes:
      run: `Stage.run`; drawn: which leaves of `params` are drawn.
      numbers: where those stand among all parameters.
    """

    run: Callable[[Params, Any], Any]
    params: Params
    drawn: tuple[bool, ...]
    numbers: list[int]


def layers(loss_fn: LossFn, draws: Draws) -> list[Layer] | None:
    """The stages of a loss at draws of a tangent; None where the model, in float32, is no larger than gradients may be,
    or loss or draws cannot be taken apart.

    A drawn tensor that is part of two stages, such as a tied embedding, cannot: neither knows the norm of the whole.
    """
    if not isinstance(draws, TangentDraws) or not hasattr(loss_fn, "stages"):
        return None
    if gradient_bytes(draws.center) <= tangent.MOST_BYTES:
        return None
    parts: list[Stage] | None = loss_fn.stages(draws.center)  # pyright: ignore[reportFunctionMemberAccess]
    if parts is None:
        return None
    leaves, result = jax.tree.leaves(draws.center), []
    for part in parts:
        own = jax.tree.leaves(part.numbers)
        drawn = tuple(draws.drawn[number] for number in own)
        params = jax.tree.map(leaves.__getitem__, part.numbers)
        result.append(Layer(part.run, params, drawn, [number for number in own if draws.drawn[number]]))
    numbers = [number for layer in result for number in layer.numbers]
    return result if len(set(numbers)) == len(numbers) else None


def most_at_a_time(layers: Sequence[Layer]) -> int:
    """How many examples may be passed back at a time on a device, one at least: `tangent.MOST_BYTES` of a layer."""
    return max(1, tangent.MOST_BYTES // max(gradient_bytes(layer.params) for layer in layers if any(layer.drawn)))


def losses(layers: Sequence[Layer], draws: TangentDraws, items: jax.Array, batches: Iterable[Batch]) -> list[jax.Array]:
    """`TangentDraws.losses` of each of the batches that the loss has cut; not traceable."""
    words = dict(zip(np.flatnonzero(draws.drawn).tolist(), _words(draws), strict=True))
    return [_from_sketches(draws, *_sketches(layers, draws, words, batch), items) for batch in batches]


def _sketches(
    layers: Sequence[Layer], draws: TangentDraws, words: dict[int, jax.Array], batch: Batch
) -> tuple[jax.Array, jax.Array]:
    """`TangentDraws.sketches`."""
    states = [jax.tree.map(lambda leaf: leaf[:, None], batch)]  # batches of one example
    for layer in layers:
        states.append(run_forward(layer.run, layer.params, states[-1]))
    center = states.pop()
    cotangents, sketches = [1 / (center + SMALLEST)], {}
    while len(sketches) < draws.num_parts:
        layer, given = layers[len(states) - 1], states.pop()
        of_layer, cotangents = run_backward(
            layer.run, layer.drawn, draws.draws_of_each, layer.params, [words[number] for number in layer.numbers],
            given, cotangents,
        )  # fmt: skip
        sketches |= zip(layer.numbers, of_layer, strict=True)
    return center[:, 0], jnp.stack([sketches[number] for number in sorted(sketches)], axis=1)


@jax.jit
def _words(draws: TangentDraws) -> list[jax.Array]:
    return draws.words()


@jax.jit
def _from_sketches(draws: TangentDraws, center: jax.Array, sketches: jax.Array, items: jax.Array) -> jax.Array:
    return draws.from_sketches(center, sketches, items)


@partial(jax.jit, static_argnums=0)
def run_forward(run: Callable[[Params, Any], Any], params: Params, states: Any) -> Any:
    """What a stage returns of each state, batches of one example along a leading axis."""
    return jax.vmap(partial(run, params))(states)


@partial(jax.jit, static_argnums=(0, 1, 2))
def run_backward(
    run: Callable[[Params, Any], Any],
    drawn: tuple[bool, ...],
    draws_of_each: int,
    params: Params,
    words: list[jax.Array],
    states: Any,
    cotangents: list[jax.Array],
) -> tuple[list[jax.Array], list[jax.Array]]:
    """Sketches `[n, draws_of_each]` of the drawn parameters' gradients, and cotangents of the states' `floats`."""
    leaves, structure = jax.tree.flatten(params)

    def of_one(state: Any, cotangents: list[jax.Array]) -> tuple[list[jax.Array], list[jax.Array]]:
        given, given_structure = jax.tree.flatten(state)

        def outputs(moved: list[jax.Array], moved_state: list[jax.Array]) -> list[jax.Array]:
            own, state = _put(moved, leaves, drawn), _put(moved_state, given, list(map(_is_float, given)))
            return floats(run(structure.unflatten(own), given_structure.unflatten(state)))

        moved = [leaf for leaf, is_drawn in zip(leaves, drawn, strict=True) if is_drawn]
        _, pull_back = jax.vjp(outputs, moved, floats(state))
        gradients, cotangents = pull_back(cotangents)
        return [sketch(*each, draws_of_each) for each in zip(gradients, words, strict=True)], cotangents

    return jax.vmap(of_one)(states, cotangents)


def _put(some: Sequence[jax.Array], leaves: Sequence[jax.Array], chosen: Sequence[bool]) -> list[jax.Array]:
    """The leaves, with `some` in the places of those chosen."""
    rest = iter(some)
    return [next(rest) if is_chosen else leaf for leaf, is_chosen in zip(leaves, chosen, strict=True)]


def floats(tree: Any) -> list[jax.Array]:
    """The floating leaves, which have cotangents."""
    return [leaf for leaf in jax.tree.leaves(tree) if _is_float(leaf)]


def _is_float(leaf: jax.Array) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating)
