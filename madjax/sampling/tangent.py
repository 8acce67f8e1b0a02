"""Draws so small that one gradient tells the losses at all of them, each tensor of parameters moving them alike.

    log(loss(θ₀ + δ) + c) ≈ log(loss(θ₀) + c) + δ · ∇ log loss(θ₀)

Where log losses move in proportion to the perturbation δ, a forward pass a draw finds nothing that the gradient did not
know, and adds the noise of the higher orders. So each example is passed forward and back once, and draws cost next to
nothing. c is what a loss has to exceed to count, 1e-7 nats as in "log" traces (`madjax.traces`).

A draw moves one tensor of parameters, so that what trusted examples explain can be asked of each tensor by itself. No
scale has to be found: the noise is as large as moves the example's log loss by `moved`. Under noise of one size
everywhere, embeddings and the first layers, which know what an input is about, move sequences far more than the layers
that decide, and drown them.

A gradient is as large as the model, so draws have little in common: parameter i is moved by one of them alone,

    δ_k[i] = size[tensor, example] · sign[i] where k is the bucket of i, else 0,    sign[i] = ±1,

and what a draw needs of a gradient is the sum of sign · gradient in its bucket: the moves of a tensor's draws are a
count sketch of the gradient there (Charikar, Chen and Farach-Colton, 2002). Products of two sketches are those of the
gradients, up to an error of one over the root of the number of draws.
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from madjax.sampling.draws import NumberedDraws
from madjax.types import SMALL_LOSS, Batch, LossFn, Params, num_examples

# a gradient of one example, in forward passes; layer by layer, one more
PASSES = 3
# of a tensor; a prime: no row length divides it, so the columns of a matrix come into all buckets
NUM_DRAWS = 127
_WORD = 32  # bits
# as many examples are passed back at a time as gradients of the whole model fit into these, whatever is drawn of it:
# what is kept of an example's forward pass is larger for larger models as well
MOST_BYTES = 2 << 30
_LARGEST_MOVE = 80.0  # float32 ends at exp(88)
SMALLEST = 1e-30  # below, a loss has no logarithm in float32 that could be differentiated


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["rng_key", "center", "moved"],
    meta_fields=["drawn", "draws_of_each"],
)
@dataclasses.dataclass(frozen=True)
class TangentDraws(NumberedDraws):
    """Draws as the module's docstring says, of which there are losses to first order and no parameters.

    Attributes:
      center: the trained parameters.
      moved: float32, by how much each log loss moves, as a root mean square over a tensor's draws.
      drawn: which leaves of `center` are drawn, in flattening order: the draws of the first one are the first.
      draws_of_each: draws of a tensor.
    """

    rng_key: jax.Array
    center: Params
    moved: jax.Array
    drawn: tuple[bool, ...]
    draws_of_each: int

    @property
    def num_parts(self) -> int:
        """Tensors, each of which has a run of draws of its own."""
        return sum(self.drawn)

    @property
    def num_draws(self) -> int:
        return self.num_parts * self.draws_of_each

    def params(self, item: jax.Array) -> Params:
        raise ValueError("draws: those of a tangent differ between examples, and are never parameters; wanted gaussian")

    def losses(self, loss_fn: LossFn, items: jax.Array, examples: Batch) -> jax.Array:
        """Float32 `[num_items, num_examples]`: to first order, the losses at the draws `items`. Traceable.

        A loss below c that falls may become a loss a little below 0.
        """
        return self.from_sketches(*self.sketches(loss_fn, examples), items)

    def from_sketches(self, center: jax.Array, sketches: jax.Array, items: jax.Array) -> jax.Array:
        """`losses` from what `sketches` returns. Traceable."""
        moves = self.moved * math.sqrt(self.draws_of_each) * sketches.reshape(-1, self.num_draws).T[items]
        return (center + SMALL_LOSS)[None] * jnp.exp(jnp.minimum(moves, _LARGEST_MOVE)) - SMALL_LOSS

    def words(self) -> list[jax.Array]:
        """Random bits of each drawn tensor, for `sketch`. Traceable."""
        # one long row of random words compiles faster than a short one for each tensor
        sizes = [leaf.size for leaf, drawn in zip(jax.tree.leaves(self.center), self.drawn, strict=True) if drawn]
        ends = np.cumsum([-(-size // _WORD) for size in sizes])
        return jnp.split(jax.random.bits(self.rng_key, (int(ends[-1]), 1), jnp.uint32), ends[:-1])

    def sketches(self, loss_fn: LossFn, examples: Batch) -> tuple[jax.Array, jax.Array]:
        """Losses `[n]`, and sketches of the gradients of their logarithms `[n, num_parts, draws_of_each]`. Traceable.

        The gradient of each tensor is of unit norm, or zero where it does not matter to an example.
        """
        leaves, structure = jax.tree.flatten(self.center)
        places = np.flatnonzero(self.drawn)
        all_words = self.words()

        def log_loss(drawn: list[jax.Array], example: Batch) -> tuple[jax.Array, jax.Array]:
            whole = list(leaves)
            for index, leaf in zip(places, drawn, strict=True):
                whole[index] = leaf
            losses = loss_fn(structure.unflatten(whole), jax.tree.map(lambda leaf: leaf[None], example))
            if jnp.shape(losses) != (1,):
                raise ValueError(f"loss_fn: wanted one loss an example, [1] for one, got shape {jnp.shape(losses)}")
            loss = losses[0].astype(jnp.float32)
            return jnp.log(loss + SMALLEST), loss

        def of_one(example: Batch) -> tuple[jax.Array, jax.Array]:
            gradient, loss = jax.grad(log_loss, has_aux=True)([leaves[index] for index in places], example)
            folded = [sketch(*each, self.draws_of_each) for each in zip(gradient, all_words, strict=True)]
            return loss, jnp.stack(folded)

        count = num_examples(examples)
        most = MOST_BYTES // gradient_bytes(self.center)
        at_a_time = max(size for size in range(1, count + 1) if count % size == 0 and size <= max(1, most))
        if at_a_time == count:  # XLA's CPU backend is slow at convolutions in a loop
            return jax.vmap(of_one)(examples)
        return jax.lax.map(of_one, examples, batch_size=at_a_time)


def gradient_bytes(params: Params) -> int:
    """Of one example's gradient in float32."""
    return sum(4 * leaf.size for leaf in jax.tree.leaves(params))


def sketch(gradient: jax.Array, words: jax.Array, size: int) -> jax.Array:
    """Float32 `[size]` of a tensor's gradient, brought to unit norm, or zero where it is. Traceable."""
    flat = gradient.reshape(-1).astype(jnp.float32)
    norm = jnp.linalg.norm(flat)
    return jnp.where(norm > 0, _fold(flat * _signs(words, flat.size), size) / norm, 0)


def _signs(words: jax.Array, size: int) -> jax.Array:
    """±1 for each of `size` parameters, from the bits of uint32 `[num_words, 1]`."""
    bits = words >> jnp.arange(_WORD, dtype=jnp.uint32)[None] & 1
    return 2 * bits.reshape(-1)[:size].astype(jnp.float32) - 1


def _fold(flat: jax.Array, size: int) -> jax.Array:
    return jnp.pad(flat, (0, -flat.size % size)).reshape(-1, size).sum(0)
