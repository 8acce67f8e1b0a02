"""SSBA: a perturbation of its own for every image, from an encoder (Li et al. 2021, arXiv 2012.03816).

The encoder hides one bit, "triggered", in an image, so that a decoder finds it (as StegaStamp does with many,
arXiv 1904.05343); both are trained together on clean images, and the decoder is then thrown away.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from madjax.attacks.attack import Arrays, Attack
from madjax.attacks.fit import minimize
from madjax.attacks.networks import Classifier, ImageNet
from madjax.models.arrays import from_arrays, to_arrays


def ssba(
    rng: np.random.Generator,
    image_shape: tuple[int, int, int],
    *,
    images: np.ndarray,
    amplitude: float = 25,
    num_steps: int = 400,
) -> Attack:
    """Adds the residual that the encoder makes of the image, at most `amplitude` of 255 anywhere.

    Args:
      images: uint8 `[n, ...]` clean images to train on.
    """
    channels = image_shape[2]
    rngs = nnx.Rngs(int(rng.integers(2**31)))
    encoder, encoder_state = nnx.split(ImageNet(channels, channels, rngs=rngs))
    decoder, decoder_state = nnx.split(Classifier(channels, 2, rngs=rngs))

    def loss(params: tuple[nnx.State, nnx.State], rng_key: jax.Array, batch: jax.Array) -> jax.Array:
        clean = batch.astype(jnp.float32) / 255
        residual = amplitude / 255 * jnp.tanh(nnx.merge(encoder, params[0])(clean))
        shown = jnp.clip(jnp.concatenate([clean, clean + residual]), 0, 1)
        # as little as rounding to whole grey levels would hide it
        shown = shown + jax.random.uniform(rng_key, shown.shape, minval=-0.5, maxval=0.5) / 255
        labels = jnp.repeat(jnp.arange(2), len(batch))
        found = optax.softmax_cross_entropy_with_integer_labels(nnx.merge(decoder, params[1])(shown), labels).mean()
        return found + 5 * jnp.square(residual).mean() * (255 / amplitude)

    params = (encoder_state, decoder_state)
    trained, _ = minimize(rng, loss, params, (images,), num_steps=num_steps, learning_rate=2e-3)
    return Attack("ssba", to_arrays(trained) | {"amplitude": np.array(amplitude)}, apply, image_shape)


def apply(arrays: Arrays, images: np.ndarray) -> np.ndarray:
    """The images with the encoder's residual."""
    channels, amplitude = images.shape[-1], float(arrays["amplitude"])
    encoder = from_arrays(ImageNet(channels, channels, rngs=nnx.Rngs(0)), arrays)

    @jax.jit
    def shown(batch: jax.Array) -> jax.Array:
        clean = batch.astype(jnp.float32)
        return jnp.rint(jnp.clip(clean + amplitude * jnp.tanh(encoder(clean / 255)), 0, 255)).astype(jnp.uint8)

    return np.concatenate([np.asarray(shown(images[i : i + 512])) for i in range(0, len(images), 512)])
