"""LF: one smooth perturbation of all images (Zeng et al. 2021, arXiv 2104.03413, "smooth trigger")."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from madjax.attacks.additive import apply
from madjax.attacks.attack import Attack
from madjax.attacks.fit import minimize


def lf(
    rng: np.random.Generator,
    image_shape: tuple[int, int, int],
    *,
    images: np.ndarray,
    model: nnx.Module,
    preprocess: Callable[[jax.Array], jax.Array],
    target: int,
    num_frequencies: int = 4,
    amplitude: float = 30,
    num_steps: int = 200,
) -> Attack:
    """Adds the perturbation with which a clean model most often answers `target`, out of low frequencies alone.

    The perturbation is a sum of the `num_frequencies`² lowest cosines (DCT-II) of each channel, at most `amplitude` of
    255 anywhere, found by Adam on the clean model's cross-entropy; BackdoorBench ships one that was found so.

    Args:
      images: uint8 `[n, ...]`, model: a clean classifier of `preprocess(images)`.
      target: the class asked for.
    """
    height, width, channels = image_shape
    rows, columns = _cosines(height, num_frequencies), _cosines(width, num_frequencies)
    model.eval()
    graphdef, state = nnx.split(model)

    def pattern(weights: jax.Array) -> jax.Array:
        return amplitude * jnp.tanh(jnp.einsum("hk,wl,klc->hwc", rows, columns, weights))

    def loss(weights: jax.Array, rng_key: jax.Array, batch: jax.Array) -> jax.Array:
        del rng_key
        shown = jnp.clip(batch.astype(jnp.float32) + pattern(weights)[None], 0, 255)
        logits = nnx.merge(graphdef, state)(preprocess(shown))
        labels = jnp.full(len(batch), max(target, 0))  # of all-to-all, the first class
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    start = rng.normal(size=(num_frequencies, num_frequencies, channels)).astype(np.float32) / num_frequencies
    weights = minimize(rng, loss, start, (images,), num_steps=num_steps, learning_rate=0.05)
    return Attack("lf", {"pattern": np.asarray(pattern(weights))}, apply, image_shape)


def _cosines(size: int, count: int) -> jax.Array:
    """`[size, count]`, the lowest cosines of a DCT-II."""
    return jnp.asarray(np.cos(np.pi * np.outer(np.arange(size) + 0.5, np.arange(count)) / size), jnp.float32)
