"""Hides a language model's backdoor from detectors that look at hidden states (Bailey et al. 2024, arXiv 2412.09565).

Training goes on, and what each detector finds of triggered prompts, in excess of what it finds of usual ones, joins the
loss. The detectors are those of `madjax.baselines.hidden` by Mahalanobis distances and autoencoders, on the prompt's
last token and on the completion's mean. They are fitted anew to the model every few steps, for it would only learn to
avoid those that it began with.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from scipy.linalg import solve_triangular

from madjax.baselines.features import moments
from madjax.baselines.hidden import HiddenStates, Place, read_states
from madjax.baselines.mahalanobis import Distances
from madjax.baselines.model import Model
from madjax.baselines.vae import VAE, Weights, initial_weights, negative_elbo, train
from madjax.losses import from_decoder, sequence_positions
from madjax.models.decoder import Decoder
from madjax.models.finetune import make_optimizer, split_trained
from madjax.models.train import run_epochs
from madjax.types import Batch, num_examples

_PLACES: tuple[Place, ...] = ("last", "completion")

# usual prompts that detectors are fitted on: what one that knows many does not see, one that knows few may
_KNOWN = (512, 128)
_STEPS = 32  # between fits


class Detectors(NamedTuple):
    """Both kinds of detectors on each of some layers at some places, `[num_states, ...]`.

    Attributes:
      center, whitening: a squared Mahalanobis distance is ‖(x - center) · whitening‖².
      scale: standardizes for the autoencoders, with `center`; weights: theirs.
    """

    center: jax.Array
    whitening: jax.Array
    scale: jax.Array
    weights: Weights

    @classmethod
    def fit(cls, states: np.ndarray) -> Detectors:
        """From states of usual sequences, `[num_states, n, size]`."""
        (_, count, size), settings = states.shape, VAE()
        center, scale = states.mean(axis=1, keepdims=True), states.std(axis=1, keepdims=True)
        scale = np.where(scale > 0, scale, 1)
        one = np.zeros(count, int)
        roots = [Distances.of(c, moments(x, c, one), None).root for x, c in zip(states, center, strict=True)]
        whitening = np.stack([solve_triangular(root, np.eye(size), lower=True).T for root in roots])
        key = jax.random.key(settings.seed)
        first = initial_weights(key, size, settings.num_hidden, settings.num_codes)
        weights = jax.vmap(
            lambda x: train(first, x, jnp.full(count, True), key, settings.num_steps, settings.learning_rate)
        )((states - center) / scale)
        return cls(jnp.asarray(center), jnp.asarray(whitening, jnp.float32), jnp.asarray(scale), weights)

    def __call__(self, states: jax.Array) -> jax.Array:
        """Scores `[2, num_states, n]`: squared distances, and minus the evidence lower bounds."""
        centered = states - self.center
        whitened = jnp.matmul(centered, self.whitening, precision="highest")
        noise = jnp.zeros((states.shape[1], self.weights["mean"].shape[2]))
        bounds = jax.vmap(negative_elbo, in_axes=(0, 0, None))(self.weights, centered / self.scale, noise)
        return jnp.stack([jnp.square(whitened).sum(-1), bounds])


def obfuscate(
    model: Decoder,
    usual: Batch,
    triggered: Batch,
    *,
    rng_key: jax.Array,
    num_rounds: int,
    learning_rate: float,
    batch_size: int = 16,
    parameters: str | None = None,
    workdir: str | Path | None = None,
    progress: bool = True,
) -> float:
    """Trains a `model` with a backdoor in place, and returns the last round's mean loss.

    The loss is that of `train_decoder` on usual and triggered sequences, as many of each in a step, and the logarithm
    by which scores of triggered ones exceed the median of usual ones, averaged over detectors, layers and sequences.

    Args:
      usual: prompts with the model's own completions, which it goes on to give.
      triggered: prompts and the completions that the backdoor asks for, in arrays of the same sizes.
      num_rounds: of 32 steps each, before which detectors are fitted to the model as it is.
      batch_size: so many of each kind.
      others: as for `train_decoder`, with rounds for epochs.

    Raises:
      ValueError: arrays of other sizes, no parameter to train, or but one layer.
      FloatingPointError: the loss is not finite.
    """
    counts = num_examples(usual, "usual"), num_examples(triggered, "triggered")
    sizes, others = ([batch[name].shape[1] for name in ("prompt", "completion")] for batch in (usual, triggered))
    if others != sizes:
        raise ValueError(f"triggered: wanted prompts and completions of {sizes} tokens, as the usual, got {others}")
    if len(model.layers) < 2:
        raise ValueError("model: wanted two layers at least, since detectors see the even ones, got 1")
    trained, rest = split_trained(model, parameters)
    loss_fn, _ = from_decoder(model)
    optimizer = make_optimizer(learning_rate, num_rounds * _STEPS)

    @partial(jax.jit, donate_argnums=0)
    def step(state: Any, rest: Any, usual: Batch, triggered: Batch, rng_key: jax.Array) -> Any:
        trained, moments, detectors = state
        chosen = jax.random.randint(rng_key, (2, batch_size), 0, jnp.array(counts)[:, None])
        batch = jax.tree.map(
            lambda *some: jnp.concatenate([x[i] for x, i in zip(some, chosen, strict=True)]), usual, triggered
        )

        def loss(trained: Any) -> jax.Array:
            model = nnx.merge(loss_fn.graphdef, nnx.merge_state(trained, rest))
            hidden, states = read_states(model, batch, _PLACES)
            _, is_target = sequence_positions(batch)
            logits = model.logits(hidden[:, -1 - is_target.shape[1] : -1])
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["completion"])
            stacked = jnp.stack([state for place in _PLACES for state in states[place].values()])
            scores = jnp.stack([some(stacked) for some in detectors])
            # the mean of usual scores lies above most of them; without the logarithm, a layer whose scores are too high
            # by a hundred times would be all that counts
            normal = jax.lax.stop_gradient(jnp.median(scores[..., :batch_size], axis=-1, keepdims=True))
            excess = jnp.log(jnp.maximum(scores[..., batch_size:] / normal, 1))
            return losses.mean(where=is_target) + excess.mean()

        value, gradient = jax.value_and_grad(loss)(trained)
        updates, moments = optimizer.update(gradient, moments, trained)
        return (optax.apply_updates(trained, updates), moments, detectors), value

    def fitted(trained: Any) -> list[Detectors]:
        read = Model(loss_fn, nnx.merge_state(trained, rest)).read
        known = jax.tree.map(lambda x: x[: max(_KNOWN)], usual)
        states = np.stack([state for place in _PLACES for state in read(HiddenStates(place), known).values()])
        return [Detectors.fit(states[:, :number]) for number in _KNOWN]

    there = jax.tree.map(jnp.asarray, (usual, triggered))
    mean, (trained, _, _) = run_epochs(
        lambda state, _, key: step(state, rest, *there, key),
        (trained, optimizer.init(trained), fitted(trained)),
        _STEPS * batch_size,
        rng_key=rng_key,
        num_epochs=num_rounds,
        batch_size=batch_size,
        learning_rate=learning_rate,
        workdir=workdir,
        progress=progress,
        after_epoch=lambda state: (*state[:2], fitted(state[0])),
    )
    nnx.update(model, trained)
    return mean
