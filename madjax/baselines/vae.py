"""A variational autoencoder of features (Kingma and Welling 2014, arXiv 1312.6114)."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.preprocessing import StandardScaler

from madjax.baselines.baseline import Anomaly, Observed
from madjax.baselines.features import OfFeatures, check_varies

Weights = dict[str, jax.Array]

_MULTIPLE = 128
_MOST_LOG_VARIANCE = 60.0


@dataclasses.dataclass(frozen=True)
class VAE(OfFeatures):
    """Minus the evidence lower bound, in nats, at the mean code: reconstruction error and distance from the prior.

    Features are standardized; encoder and decoder have one hidden layer; every step sees all trusted examples.

    Attributes:
      num_codes, num_hidden: sizes of the code and of the hidden layers.
      num_steps, learning_rate: of Adam.
      seed: of weights and codes.
    """

    num_codes: int = 16
    num_hidden: int = 128
    num_steps: int = 300
    learning_rate: float = 1e-3
    seed: int = 0

    def fit(self, trusted: Observed) -> Anomaly:
        """Trains the autoencoder.

        Raises:
          ValueError: where the features are constant.
        """
        check_varies(trusted["features"])
        scaler = StandardScaler().fit(trusted["features"])

        def scaled(observed: Observed) -> jax.Array:
            return jnp.asarray(scaler.transform(observed["features"]), jnp.float32)

        x, key = scaled(trusted), jax.random.key(self.seed)
        weights = initial_weights(key, x.shape[1], self.num_hidden, self.num_codes)
        # to a multiple, so that one program serves fits on nearly as many
        padding = -len(x) % _MULTIPLE
        counts = jnp.arange(len(x) + padding) < len(x)
        x = jnp.pad(x, ((0, padding), (0, 0)))
        weights = train(weights, x, counts, key, self.num_steps, self.learning_rate)
        return lambda observed: np.asarray(_judge(weights, scaled(observed)))


def initial_weights(rng_key: jax.Array, size: int, num_hidden: int, num_codes: int) -> Weights:
    """Matrices by LeCun's rule, biases of zero."""
    shapes = {
        "encode": (size, num_hidden), "mean": (num_hidden, num_codes), "log_variance": (num_hidden, num_codes),
        "decode": (num_codes, num_hidden), "output": (num_hidden, size),
    }  # fmt: skip
    weights = {}
    for (name, shape), key in zip(shapes.items(), jax.random.split(rng_key, len(shapes)), strict=True):
        weights[name] = jax.random.normal(key, shape) / np.sqrt(shape[0])
        weights[f"{name}_bias"] = jnp.zeros((1, shape[1]))
    return weights


def negative_elbo(weights: Weights, x: jax.Array, noise: jax.Array) -> jax.Array:
    """Float32 `[n]`: ½‖x - x̂‖² and the code's KL divergence from the prior, in nats; constants are left out."""
    hidden = jax.nn.relu(x @ weights["encode"] + weights["encode_bias"])
    mean = hidden @ weights["mean"] + weights["mean_bias"]
    # what is far from all that was trained on would overflow
    log_variance = jnp.minimum(hidden @ weights["log_variance"] + weights["log_variance_bias"], _MOST_LOG_VARIANCE)
    code = mean + jnp.exp(log_variance / 2) * noise
    decoded = jax.nn.relu(code @ weights["decode"] + weights["decode_bias"]) @ weights["output"]
    error = jnp.square(x - decoded - weights["output_bias"]).sum(axis=1) / 2
    return error + (jnp.square(mean) + jnp.exp(log_variance) - 1 - log_variance).sum(axis=1) / 2


@partial(jax.jit, static_argnums=(4, 5))
def train(
    weights: Weights, x: jax.Array, counts: jax.Array, rng_key: jax.Array, num_steps: int, learning_rate: float
) -> Weights:
    """The weights after so many steps of Adam on the mean bound of those `x` that count."""
    optimizer = optax.adam(learning_rate)
    shape = (len(x), weights["mean"].shape[1])

    def step(state: Any, index: jax.Array) -> tuple[Any, None]:
        weights, moments = state
        noise = jax.random.normal(jax.random.fold_in(rng_key, index), shape)
        gradient = jax.grad(lambda weights: negative_elbo(weights, x, noise).mean(where=counts))(weights)
        updates, moments = optimizer.update(gradient, moments)
        return (optax.apply_updates(weights, updates), moments), None

    return jax.lax.scan(step, (weights, optimizer.init(weights)), jnp.arange(num_steps))[0][0]


@jax.jit
def _judge(weights: Weights, x: jax.Array) -> jax.Array:
    return negative_elbo(weights, x, jnp.zeros((len(x), weights["mean"].shape[1])))
