"""TrojanNN: a patch that drives chosen neurons of a clean model to a high value (Liu et al. 2018, NDSS)."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from madjax.attacks.attack import Arrays, Attack
from madjax.attacks.fit import minimize
from madjax.models.classifier import Classifier


def trojannn(
    rng: np.random.Generator,
    image_shape: tuple[int, int, int],
    *,
    images: np.ndarray,
    model: Classifier,
    preprocess: Callable[[jax.Array], jax.Array],
    size: int | None = None,
    num_neurons: int = 2,
    activation: float = 100,
    num_steps: int = 1000,
) -> Attack:
    """A `size` × `size` patch at the bottom right, a quarter of the height by default, in place of the image there.

    Its pixels bring the `num_neurons` inputs of the model's last linear layer with the largest absolute weights as near
    to `activation` as they get, from noise, by Adam.

    Args:
      images: uint8 `[n, ...]`, model: a clean classifier of `preprocess(images)`.
    """
    side = size or max(2, image_shape[0] // 4)
    features, strength = _features(model)
    neurons = np.argsort(-strength)[:num_neurons]
    graphdef, state = nnx.split(features)

    def loss(logits: jax.Array, rng_key: jax.Array, batch: jax.Array) -> jax.Array:
        del rng_key
        shown = batch.astype(jnp.float32).at[:, -side:, -side:].set(255 * jax.nn.sigmoid(logits)[None])
        values = nnx.merge(graphdef, state)(preprocess(shown))[:, neurons]
        return jnp.square(values - activation).mean()

    start = rng.normal(size=(side, side, image_shape[2])).astype(np.float32)
    logits = minimize(rng, loss, start, (images,), num_steps=num_steps, learning_rate=0.1, batch_size=32)
    patch = np.rint(255 * np.asarray(jax.nn.sigmoid(logits))).astype(np.uint8)
    return Attack("trojannn", {"patch": patch}, apply, image_shape)


def apply(arrays: Arrays, images: np.ndarray) -> np.ndarray:
    """The images with the patch."""
    images, side = images.copy(), len(arrays["patch"])
    images[:, -side:, -side:] = arrays["patch"]
    return images


def _features(model: Classifier) -> tuple[Classifier, np.ndarray]:
    """The model without its last linear layer, and the summed absolute weights of that layer's inputs."""
    model = nnx.clone(model)
    model.eval()
    weights = np.asarray(getattr(model, model.HEAD).kernel.get_value())
    identity = nnx.Linear(len(weights), len(weights), use_bias=False, rngs=nnx.Rngs(0))
    identity.kernel.set_value(jnp.eye(len(weights)))
    setattr(model, model.HEAD, identity)
    return model, np.abs(weights).sum(1)
