"""A softmax regression: compiles in no time, for tests whose subject is not the model."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from madjax.sampling import ChainDraws, Target, gaussian, rmsprop_sgld


def loss_fn(params, batch):
    logits = batch["image"] @ params["kernel"] + params["bias"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])


def params():
    rng = np.random.default_rng(1)
    return {"kernel": jnp.asarray(rng.normal(size=(12, 10)), jnp.float32), "bias": jnp.zeros((1, 10))}


def examples(count=37):
    """No multiple of anything."""
    rng = np.random.default_rng(0)
    return {
        "image": rng.normal(size=(count, 12)).astype(np.float32),
        "label": rng.integers(0, 10, count).astype(np.int32),
    }


def independent(num_draws):
    return gaussian(jax.random.key(0), params(), 0.1, num_draws=num_draws, mask={"kernel": True, "bias": True})


def chains(num_draws, num_chains=2):
    return ChainDraws(
        jax.random.key(0), rmsprop_sgld(loss_fn, {"kernel": True, "bias": True}), Target(params(), 10.0, 100.0),
        examples(), num_draws=num_draws, num_chains=num_chains, num_burnin_steps=3, num_steps_between_draws=2,
        step_size=1e-4, batch_size=16,
    )  # fmt: skip
