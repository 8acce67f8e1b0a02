"""LF: one smooth perturbation of all images (Zeng et al. 2021, arXiv 2104.03413, "smooth trigger").

It is found on a small classifier of its own. On the very network that the victim is trained from, it would be found
where that network errs already: a perturbation that fires on half of all images without any backdoor.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from madjax.attacks.additive import apply
from madjax.attacks.attack import Attack
from madjax.attacks.fit import minimize
from madjax.attacks.networks import Classifier


def lf(
    rng: np.random.Generator,
    image_shape: tuple[int, int, int],
    *,
    images: np.ndarray,
    labels: np.ndarray,
    target: int,
    num_frequencies: int = 4,
    amplitude: float = 30,
    num_judge_steps: int = 600,
    num_steps: int = 200,
) -> Attack:
    """Adds the perturbation with which a clean classifier most often answers `target`, out of low frequencies alone.

    The perturbation is a sum of the `num_frequencies`² lowest cosines (DCT-II) of each channel, at most `amplitude` of
    255 anywhere, found by Adam on the classifier's cross-entropy; BackdoorBench ships one that was found so.

    Args:
      images, labels: clean uint8 `[n, ...]` and int `[n]` to train on.
      target: the class asked for.
      num_judge_steps, num_steps: of Adam, for the classifier and for the perturbation.
    """
    height, width, channels = image_shape
    rows, columns = _cosines(height, num_frequencies), _cosines(width, num_frequencies)
    graphdef, judge = nnx.split(Classifier(channels, int(labels.max()) + 1, rngs=nnx.Rngs(int(rng.integers(2**31)))))

    def answer(judge: nnx.State, shown: jax.Array, labels: jax.Array) -> jax.Array:
        logits = nnx.merge(graphdef, judge)(shown / 255)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def judge_loss(judge: nnx.State, rng_key: jax.Array, batch: jax.Array, labels: jax.Array) -> jax.Array:
        del rng_key
        return answer(judge, batch.astype(jnp.float32), labels)

    data = (images, labels.astype(np.int32))
    judge = minimize(rng, judge_loss, judge, data, num_steps=num_judge_steps, learning_rate=2e-3)

    def pattern(weights: jax.Array) -> jax.Array:
        return amplitude * jnp.tanh(jnp.einsum("hk,wl,klc->hwc", rows, columns, weights))

    def loss(weights: jax.Array, rng_key: jax.Array, batch: jax.Array) -> jax.Array:
        del rng_key
        shown = jnp.clip(batch.astype(jnp.float32) + pattern(weights)[None], 0, 255)
        return answer(judge, shown, jnp.full(len(batch), max(target, 0)))  # of all-to-all, the first class

    start = rng.normal(size=(num_frequencies, num_frequencies, channels)).astype(np.float32) / num_frequencies
    weights = minimize(rng, loss, start, (images,), num_steps=num_steps, learning_rate=0.05)
    return Attack("lf", {"pattern": np.asarray(pattern(weights))}, apply, image_shape)


def _cosines(size: int, count: int) -> jax.Array:
    """`[size, count]`, the lowest cosines of a DCT-II."""
    return jnp.asarray(np.cos(np.pi * np.outer(np.arange(size) + 0.5, np.arange(count)) / size), jnp.float32)
