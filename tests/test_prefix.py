"""Activations that no draw changes are computed once."""

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from madjax import from_linen, from_nnx, loss_matrix
from madjax.models import build_model
from madjax.prefix import FrozenLoss, freeze
from madjax.sampling import drawn_parameters, gaussian
from tests import oracles
from tests.conftest import to_unit


def draws_of(loss_fn, params, pattern, num_draws=3):
    mask = drawn_parameters(params, pattern, loss_fn.is_trainable(params))
    return gaussian(jax.random.key(0), params, 0.1, num_draws=num_draws, mask=mask)


def frozen(loss_fn, params, pattern, examples):
    return freeze(loss_fn, lambda: params, draws_of(loss_fn, params, pattern).drawn, examples, batch_size=16)


def flops(loss_fn, params, examples):
    few = jax.tree.map(lambda leaf: leaf[:8], examples)
    return jax.jit(loss_fn).lower(params, few).compile().cost_analysis()["flops"]


@pytest.mark.parametrize("pattern", ["^output/", "^hidden/|^output/", "conv2", "bias$", None])
def test_the_matrix_is_that_of_the_whole_loss(digits_model, examples, pattern):
    loss_fn, params = digits_model
    draws = draws_of(loss_fn, params, pattern)
    whole = oracles.loss_matrix(loss_fn, draws, examples)
    np.testing.assert_allclose(loss_matrix(loss_fn, draws, examples, batch_size=8), whole, rtol=5e-6, atol=5e-6)


def test_what_is_kept_is_the_input_of_the_first_drawn_layer(digits_model, examples):
    loss_fn, params = digits_model
    rest, activations = frozen(loss_fn, params, "^output/", examples)
    assert isinstance(rest, FrozenLoss)
    width = params["output"]["kernel"].shape[0]
    assert sorted(leaf.shape for leaf in jax.tree.leaves(activations)) == [(37,), (37, width)]
    assert flops(rest, params, activations) < flops(loss_fn, params, examples) / 50


def test_nothing_is_kept_where_the_first_layer_is_drawn(digits_model, examples):
    loss_fn, params = digits_model
    # a normalized image takes four times the memory of the image
    assert frozen(loss_fn, params, None, examples) == (loss_fn, examples)
    assert frozen(loss_fn, params, "^conv1/", examples) == (loss_fn, examples)


def test_too_much_memory_is_not_taken(digits_model, examples, monkeypatch):
    loss_fn, params = digits_model
    monkeypatch.setattr("madjax.prefix._MOST_BYTES", 37 * 4)
    assert frozen(loss_fn, params, "^output/", examples) == (loss_fn, examples)


@pytest.mark.parametrize(
    ("name", "pattern", "ratio"), [("preact_resnet18", "^layer4|^linear", 4), ("resnet20", "^layer3|^linear", 3)]
)
def test_a_last_stage(name, pattern, ratio):
    model = build_model(name, 10, (32, 32, 3), rngs=nnx.Rngs(0))
    loss_fn, params = from_nnx(model, preprocess=to_unit)
    rng = np.random.default_rng(0)
    examples = {
        "image": rng.integers(0, 256, (8, 32, 32, 3)).astype(np.uint8),
        "label": rng.integers(0, 10, 8).astype(np.int32),
    }
    rest, activations = freeze(
        loss_fn, lambda: params, draws_of(loss_fn, params, pattern).drawn, examples, batch_size=8
    )
    np.testing.assert_allclose(rest(params, activations), loss_fn(params, examples), rtol=1e-5, atol=1e-5)
    assert flops(loss_fn, params, examples) / flops(rest, params, activations) > ratio


def test_a_program_that_is_called_twice_and_loops(examples):
    @jax.jit
    def layer(kernel, x):
        return jnp.tanh(x @ kernel)

    def loss_fn(params, batch):
        x = batch["image"].reshape(len(batch["image"]), -1).astype("float32") / 255
        x = layer(params["b"], layer(params["a"], x))
        x, _ = jax.lax.scan(lambda x, kernel: (layer(kernel, x), None), x, jnp.stack([params["b"], params["b"]]))
        return (x @ params["c"]).sum(1) + batch["label"]

    rng = np.random.default_rng(0)
    params = {"a": rng.normal(size=(64, 8)), "b": rng.normal(size=(8, 8)), "c": rng.normal(size=(8, 2))}
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)
    rest, activations = freeze(loss_fn, lambda: params, [False, False, True], examples, batch_size=16)
    assert sorted(leaf.shape for leaf in jax.tree.leaves(activations)) == [(37,), (37, 8)]
    np.testing.assert_allclose(rest(params, activations), loss_fn(params, examples), rtol=1e-6, atol=1e-6)


def test_linen(examples):
    class Network(flax.linen.Module):
        @flax.linen.compact
        def __call__(self, x):
            x = flax.linen.Dense(16, name="first")(x.reshape(x.shape[0], -1))
            return flax.linen.Dense(10, name="last")(flax.linen.relu(x))

    module = Network()
    loss_fn, params = from_linen(module, module.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1))), preprocess=to_unit)
    rest, activations = frozen(loss_fn, params, "last", examples)
    assert sorted(leaf.shape for leaf in jax.tree.leaves(activations)) == [(37,), (37, 16)]
    np.testing.assert_allclose(rest(params, activations), loss_fn(params, examples), rtol=1e-6, atol=1e-6)
