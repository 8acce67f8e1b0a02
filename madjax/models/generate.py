"""Sequences as arrays, and the model's own completions of prompts: greedy, with a cache of keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from madjax.coupling import CLASS_PEERS
from madjax.losses import sequence_positions
from madjax.models.decoder import Decoder
from madjax.types import Batch, num_examples


def prompt_batch(prompts: Sequence[Sequence[int]], length: int | None = None) -> Batch:
    """`prompt` int32 `[n, length]`, padded on the left, and `prompt_length` int32 `[n]`.

    Args:
      length: at least the longest prompt's; that where None.
    """
    rows, lengths = _padded(prompts, length, "prompts", left=True)
    return {"prompt": rows, "prompt_length": lengths}


def completion_batch(completions: Sequence[Sequence[int]], length: int | None = None) -> Batch:
    """`completion` int32 `[n, length]`, padded on the right, and `completion_length` int32 `[n]`."""
    rows, lengths = _padded(completions, length, "completions", left=False)
    return {"completion": rows, "completion_length": lengths}


def _padded(
    sequences: Sequence[Sequence[int]], length: int | None, name: str, left: bool
) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.array([len(sequence) for sequence in sequences], np.int32)
    if not len(lengths) or lengths.min() < 1:
        where = f"none at {int(lengths.argmin())}" if len(lengths) else f"no {name}"
        raise ValueError(f"{name}: wanted at least one token in each, got {where}")
    length = length or int(lengths.max())
    if lengths.max() > length:
        raise ValueError(f"length: {length} is less than the {lengths.max()} tokens of the longest of {name}")
    rows = np.zeros((len(lengths), length), np.int32)
    for row, sequence in zip(rows, sequences, strict=True):
        row[length - len(sequence) if left else 0 :][: len(sequence)] = sequence
    return rows, lengths


def complete(
    model: Decoder, prompts: Batch, *, num_tokens: int, end_tokens: Sequence[int] = (), batch_size: int = 64
) -> Batch:
    """The prompts with the model's own greedy completion of each: at every token the likeliest.

    Args:
      prompts: of `prompt_batch`.
      num_tokens: at most so many; end_tokens: any of them ends a completion, and belongs to it.

    Returns:
      `prompts` with `completion` int32 `[n, num_tokens]` and `completion_length` int32 `[n]`, on the host.

    Raises:
      ValueError: where prompt and completion exceed the model's context.
    """
    length = prompts["prompt"].shape[1] + num_tokens
    if length > model.config.context:
        raise ValueError(
            f"num_tokens: prompts of {prompts['prompt'].shape[1]} tokens and {num_tokens} more exceed the context of "
            f"{model.config.context}"
        )
    graphdef, state = nnx.split(model)
    count = num_examples(prompts, "prompts")
    parts = []
    for start in range(0, count, batch_size):
        # the last batch repeats its last prompt, so that one program serves all
        chosen = np.minimum(np.arange(start, start + batch_size), count - 1)
        part = _complete(graphdef, num_tokens, tuple(end_tokens), state, jax.tree.map(lambda x: x[chosen], prompts))  # noqa: B023
        parts.append(jax.tree.map(lambda x: np.asarray(x)[: count - start], part))  # noqa: B023
    return {**prompts, **jax.tree.map(lambda *some: np.concatenate(some), *parts)}


def answer_classes(batch: Batch, trusted: Batch) -> np.ndarray:
    """Int32 `[n]`: a number of each completion that `CLASS_PEERS` of `trusted` have at least, -1 of others.

    As `label` of a batch they are the classes of its outputs; both batches hold completions of `complete`.
    """
    known, rows = (np.column_stack([each["completion"], each["completion_length"]]) for each in (trusted, batch))
    answers, counts = np.unique(known, axis=0, return_counts=True)
    answers = answers[counts >= CLASS_PEERS]
    is_equal = (rows[:, None] == answers[None]).all(-1)
    return np.where(is_equal.any(1), is_equal.argmax(1) if len(answers) else -1, -1).astype(np.int32)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _complete(graphdef: Any, num_tokens: int, end_tokens: tuple[int, ...], state: Any, prompts: Batch) -> Batch:
    model = nnx.merge(graphdef, state)
    tokens, lengths = prompts["prompt"], prompts["prompt_length"]
    n, prompt_size = tokens.shape
    positions, _ = sequence_positions(prompts | {"completion": tokens[:, :0], "completion_length": lengths * 0})
    cache = model.empty_cache(n, prompt_size + num_tokens)
    hidden, cache = model.hidden(tokens, positions, cache)
    first = _likeliest(model, hidden)

    def is_end(token: jax.Array) -> jax.Array:
        return jnp.isin(token, jnp.array(end_tokens, jnp.int32))

    def goes_on(carry: Any) -> jax.Array:
        step, _, _, _, ended, _ = carry
        return (step < num_tokens) & ~ended.all()

    def one_more(carry: Any) -> Any:
        step, written, last, cache, ended, counts = carry
        hidden, cache = model.hidden(last[:, None], (lengths + step - 1)[:, None], cache)
        token = jnp.where(ended, 0, _likeliest(model, hidden))
        written = jax.lax.dynamic_update_slice(written, token[:, None], (0, step))
        return step + 1, written, token, cache, ended | is_end(token), counts + ~ended

    written = jnp.zeros((n, num_tokens), jnp.int32).at[:, 0].set(first)
    carry = (jnp.int32(1), written, first, cache, is_end(first), jnp.ones(n, jnp.int32))
    _, written, _, _, _, counts = jax.lax.while_loop(goes_on, one_more, carry)
    return {"completion": written, "completion_length": counts}


def _likeliest(model: Decoder, hidden: jax.Array) -> jax.Array:
    return jnp.argmax(model.logits(hidden[:, -1:])[:, 0], axis=-1).astype(jnp.int32)
