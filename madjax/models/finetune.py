"""Trains a language model on prompts and answers: AdamW, warm-up and a cosine, all parameters or a part."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from madjax.losses import from_decoder
from madjax.models.decoder import Decoder
from madjax.models.train import run_epochs
from madjax.types import Batch, num_examples


def train_decoder(
    model: Decoder,
    examples: Batch,
    *,
    rng_key: jax.Array,
    num_epochs: int,
    learning_rate: float,
    batch_size: int = 16,
    weight_decay: float = 0.01,
    parameters: str | None = None,
    workdir: str | Path | None = None,
    progress: bool = True,
) -> float:
    """Trains `model` in place to give the completions, and returns the last epoch's mean loss in nats a token.

    Args:
      examples: prompts and completions, see `madjax.losses.SequenceLoss`; each token of a completion counts alike.
      parameters: regular expression of the paths to train, `"lora_"` for adapters; None for all.
      workdir: as for `madjax.models.train_classifier`.

    Raises:
      ValueError: fewer examples than a batch, or no parameter to train.
      FloatingPointError: the loss is not finite.
    """
    count = num_examples(examples)
    if count < batch_size:
        raise ValueError(f"batch_size: {batch_size} is more than the {count} examples")

    trained, rest = split_trained(model, parameters)
    loss_fn, _ = from_decoder(model)
    optimizer = make_optimizer(learning_rate, num_epochs * (count // batch_size), weight_decay)

    @partial(jax.jit, donate_argnums=0)
    def step(state: Any, rest: Any, examples: Batch, index: jax.Array) -> Any:
        trained, moments = state
        batch = jax.tree.map(lambda leaf: leaf[index], examples)

        def mean_loss(trained: Any) -> jax.Array:
            losses = loss_fn.tokens(nnx.merge_state(trained, rest), batch)
            return losses.sum() / batch["completion_length"].sum()

        loss, gradient = jax.value_and_grad(mean_loss)(trained)
        updates, moments = optimizer.update(gradient, moments, trained)
        return (optax.apply_updates(trained, updates), moments), loss

    there = jax.tree.map(jnp.asarray, examples)
    mean, (trained, _) = run_epochs(
        lambda state, index, _: step(state, rest, there, index),
        (trained, optimizer.init(trained)),
        count,
        rng_key=rng_key,
        num_epochs=num_epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        workdir=workdir,
        progress=progress,
    )
    nnx.update(model, trained)
    return mean


def split_trained(model: Decoder, parameters: str | None) -> tuple[Any, Any]:
    """The parameters whose path the regular expression `parameters` finds, all where it is None, and the rest."""

    def is_trained(path: tuple[Any, ...], value: Any) -> bool:
        return isinstance(value, nnx.Param) and re.search(parameters or "", "/".join(map(str, path))) is not None

    _, trained, rest = nnx.split(model, is_trained, ...)
    if not jax.tree.leaves(trained):
        raise ValueError(f"parameters: {parameters!r} matches none")
    return trained, rest


def make_optimizer(learning_rate: float, num_steps: int, weight_decay: float = 0.01) -> optax.GradientTransformation:
    """AdamW, warm-up and a cosine."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, num_steps // 20, num_steps)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.99, weight_decay=weight_decay))
