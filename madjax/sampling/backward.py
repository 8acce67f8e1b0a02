"""A tangent's losses layer by layer, of a model whose gradient is too large to exist at a time.

A program that passes a whole network forward and back holds a gradient as large as the model, and XLA compiles a deep
network layer by layer. Here the loop over layers is on the host, as in `madjax.sampling.layerwise`, and one program
serves all layers alike. Forward, what each layer is given is kept. Backward, a layer is run again to be differentiated,
its gradients become sketches, and they are gone before the layer before it gets its turn; layers before the first that
is drawn get none. The price is a fourth forward pass. Batches are those of `madjax.losses.SequenceLoss.cut`: short
examples are not padded to the longest.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from madjax.sampling import tangent
from madjax.sampling.draws import Draws
from madjax.sampling.tangent import SMALLEST, TangentDraws, sketch
from madjax.types import Batch, LossFn, Params, Stage


def stages(loss_fn: LossFn, draws: Draws) -> list[Stage] | None:
    """The stages of a loss at draws of a tangent; None where the gradient fits, or loss or draws cannot be taken apart.

    A drawn tensor that is part of two stages, such as a tied embedding, cannot: neither knows the norm of the whole.
    """
    if not isinstance(draws, TangentDraws) or not hasattr(loss_fn, "stages"):
        return None
    if _bytes(draws, range(len(draws.drawn))) <= tangent.MOST_BYTES:
        return None
    parts: list[Stage] | None = loss_fn.stages(draws.center)  # pyright: ignore[reportFunctionMemberAccess]
    uses = Counter(number for part in parts or [] for number in jax.tree.leaves(part.numbers))
    return None if any(draws.drawn[number] for number, count in uses.items() if count > 1) else parts


def most_at_a_time(parts: Sequence[Stage], draws: TangentDraws) -> int:
    """Of how many examples the largest layer's gradients may exist at a time on a device, one at least."""
    largest = max(_bytes(draws, jax.tree.leaves(part.numbers)) for part in parts)
    return max(1, tangent.MOST_BYTES // largest)


def _bytes(draws: TangentDraws, numbers: Iterable[int]) -> int:
    """Of a gradient of the drawn tensors among these, in float32."""
    leaves = jax.tree.leaves(draws.center)
    return sum(4 * leaves[number].size for number in numbers if draws.drawn[number])


def losses(parts: Sequence[Stage], draws: TangentDraws, items: jax.Array, batch: Batch) -> jax.Array:
    """`TangentDraws.losses` of a batch that the loss has cut; not traceable."""
    leaves = jax.tree.leaves(draws.center)
    words = dict(zip(np.flatnonzero(draws.drawn).tolist(), _words(draws), strict=True))
    params = [jax.tree.map(leaves.__getitem__, part.numbers) for part in parts]
    states = [jax.tree.map(lambda leaf: leaf[:, None], batch)]  # batches of one example
    for part, own in zip(parts, params, strict=True):
        states.append(run_forward(part.run, own, states[-1]))
    center = states.pop()
    cotangents, sketches = [1 / (center + SMALLEST)], {}
    while len(sketches) < draws.num_parts:
        part, own, given = parts[len(states) - 1], params[len(states) - 1], states.pop()
        numbers = jax.tree.leaves(part.numbers)
        drawn = tuple(draws.drawn[number] for number in numbers)
        numbers = [number for number in numbers if draws.drawn[number]]
        of_part, cotangents = run_backward(
            part.run, drawn, draws.draws_of_each, own, [words[number] for number in numbers], given, cotangents
        )
        sketches |= zip(numbers, of_part, strict=True)
    stacked = jnp.stack([sketches[number] for number in sorted(sketches)], axis=1)
    return _from_sketches(draws, center[:, 0], stacked, items)


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
    """Sketches `[n, draws_of_each]` of the drawn parameters' gradients, and the cotangents of what the stage was given.

    Cotangents are of the floating leaves alone.
    """
    leaves, structure = jax.tree.flatten(params)

    def of_one(state: Any, cotangents: list[jax.Array]) -> tuple[list[jax.Array], list[jax.Array]]:
        given, given_structure = jax.tree.flatten(state)

        def outputs(moved: list[jax.Array], floats: list[jax.Array]) -> list[jax.Array]:
            own, state = _put(moved, leaves, drawn), _put(floats, given, list(map(_is_float, given)))
            return _floats(run(structure.unflatten(own), given_structure.unflatten(state)))

        moved = [leaf for leaf, is_drawn in zip(leaves, drawn, strict=True) if is_drawn]
        _, pull_back = jax.vjp(outputs, moved, _floats(state))
        gradients, cotangents = pull_back(cotangents)
        return [sketch(*each, draws_of_each) for each in zip(gradients, words, strict=True)], cotangents

    return jax.vmap(of_one)(states, cotangents)


def _put(some: Sequence[jax.Array], leaves: Sequence[jax.Array], chosen: Sequence[bool]) -> list[jax.Array]:
    """The leaves, with `some` in the places of those chosen."""
    rest = iter(some)
    return [next(rest) if is_chosen else leaf for leaf, is_chosen in zip(leaves, chosen, strict=True)]


def _floats(tree: Any) -> list[jax.Array]:
    return [leaf for leaf in jax.tree.leaves(tree) if _is_float(leaf)]


def _is_float(leaf: jax.Array) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating)
