import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from madjax import loss_matrix, sharding, sweep
from madjax.sampling import ChainDraws, StoredDraws, Target, gaussian, sgld
from tests import oracles


@pytest.fixture(scope="module")
def draws(digits_model):
    loss_fn, params = digits_model
    return gaussian(jax.random.key(0), params, 0.1, num_draws=7, mask=loss_fn.is_trainable(params))


@pytest.fixture(scope="module")
def expected(digits_model, draws, examples):
    return oracles.loss_matrix(digits_model[0], draws, examples)


@pytest.mark.parametrize(
    ("layout", "num_devices", "batch_size"),
    [*itertools.product(["host", "scan3", "vmap4"], [1, 4], [5, 256]), ("auto", 4, 5)],
)
def test_every_layout_equals_a_double_loop(digits_model, draws, examples, expected, layout, num_devices, batch_size):
    matrix = loss_matrix(
        digits_model[0], draws, examples, layout=layout, batch_size=batch_size, devices=jax.devices()[:num_devices]
    )
    assert matrix.dtype == np.float32
    assert matrix.shape == (7, 37)
    np.testing.assert_allclose(matrix, expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("layout", ["auto", "host", "scan3", "vmap4"])
def test_draws_are_split_where_examples_are_few(digits_model, draws, examples, expected, layout):
    few = {k: v[:3] for k, v in examples.items()}
    np.testing.assert_allclose(
        loss_matrix(digits_model[0], draws, few, layout=layout), expected[:, :3], rtol=2e-6, atol=2e-6
    )


@pytest.mark.parametrize("layout", ["host", "scan3", "vmap4"])
@pytest.mark.parametrize("num_model", [2, 4])
def test_a_model_split_over_devices(digits_model, draws, examples, expected, layout, num_model):
    matrix = loss_matrix(digits_model[0], draws, examples, layout=layout, batch_size=8, model_shards=num_model)
    np.testing.assert_allclose(matrix, expected, rtol=2e-6, atol=2e-6)


def test_each_device_holds_its_part_of_a_split_model(digits_model, draws):
    _, params = digits_model
    sizes = {}
    for shards in (1, 4):
        placed = sharding.put_model(params, sharding.place(64, model_shards=shards))
        first = jax.devices()[0]
        sizes[shards] = sum(
            shard.data.nbytes for leaf in jax.tree.leaves(placed) for shard in leaf.addressable_shards
            if shard.device == first
        )  # fmt: skip
    assert sizes[4] < 0.3 * sizes[1]  # all but biases


def test_examples_are_split_first_then_draws():
    def shape(*args, **kwargs):
        return tuple(sharding.place(*args, **kwargs).mesh.shape.values())

    assert shape(37) == (4, 1, 1)
    assert shape(3) == (2, 2, 1)
    assert shape(1) == (1, 4, 1)
    assert shape(37, model_shards=2) == (2, 1, 2)
    assert shape(37, jax.devices()[:2]) == (2, 1, 1)
    with pytest.raises(ValueError, match="model_shards: wanted a divisor of the 4 devices of a host, got 3"):
        sharding.place(37, model_shards=3)


def test_examples_that_do_not_fit_the_device_go_in_chunks(digits_model, draws, examples, expected, monkeypatch):
    monkeypatch.setattr(sweep, "_CHUNK", 8)
    np.testing.assert_allclose(
        loss_matrix(digits_model[0], draws, examples, layout="host", batch_size=2), expected, rtol=2e-6, atol=2e-6
    )


def test_chains_and_stored_draws(digits_model, examples):
    loss_fn, params = digits_model
    chain = ChainDraws(
        jax.random.key(0), sgld(loss_fn, loss_fn.is_trainable(params)), Target(params, 10.0, 100.0), examples,
        num_draws=6, num_chains=2, num_burnin_steps=2, num_steps_between_draws=2, step_size=1e-4, batch_size=16,
    )  # fmt: skip
    stored = StoredDraws(jax.tree.map(lambda *x: jnp.stack(x), *chain.items()))
    whole = oracles.loss_matrix(loss_fn, stored, examples)
    for layout in ("host", "scan4"):
        np.testing.assert_allclose(loss_matrix(loss_fn, chain, examples, layout=layout), whole, rtol=2e-6, atol=2e-6)
    np.testing.assert_allclose(loss_matrix(loss_fn, stored, examples, layout="host"), whole, rtol=2e-6, atol=2e-6)
    assert not np.allclose(whole[0], whole[1], atol=1e-4)  # two chains


def test_the_program_does_not_grow_with_draws(digits_model):
    loss_fn, params = digits_model
    sizes = []
    for count in (8, 64):
        many = gaussian(jax.random.key(0), params, 0.1, num_draws=count, mask=loss_fn.is_trainable(params))
        placement = sweep.place(37)
        program = sweep._block.lower(loss_fn, "scan", 8, placement, many, np.arange(4), examples_for(placement))
        sizes.append(program.compile().memory_analysis().temp_size_in_bytes)
    assert sizes[0] == sizes[1]


def examples_for(placement):
    rng = np.random.default_rng(0)
    batch = {"image": rng.integers(0, 256, (64, 8, 8, 1)).astype(np.uint8), "label": np.zeros(64, np.int32)}
    return sweep.put_examples(batch, placement)


def test_no_collective_in_the_program(digits_model, draws):
    placement = sweep.place(64)
    assert placement.num_devices == 4
    lowered = sweep._block.lower(digits_model[0], "scan", 8, placement, draws, np.arange(4), examples_for(placement))
    text = lowered.compile().as_text()
    for collective in ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter"):
        assert collective not in text


def test_bad_input(digits_model, draws, examples):
    loss_fn, _ = digits_model
    with pytest.raises(ValueError, match=r"layout: wanted auto, host, layers, scanK or vmapK .* got 'pmap'"):
        loss_matrix(loss_fn, draws, examples, layout="pmap")
    with pytest.raises(ValueError, match="examples: wanted at least one, got none"):
        loss_matrix(loss_fn, draws, {k: v[:0] for k, v in examples.items()})
    with pytest.raises(ValueError, match=r"examples: wanted arrays with one common leading axis.*37.*36"):
        loss_matrix(loss_fn, draws, {**examples, "label": examples["label"][:-1]})
    with pytest.raises(ValueError, match=r"loss_fn: wanted one loss an example, \[10\] .* got shape \(\)"):
        loss_matrix(lambda p, b: loss_fn(p, b).mean(), draws, examples, layout="host", batch_size=10)
    with pytest.raises(FloatingPointError, match=r"losses of draw 0: wanted finite numbers, got nan at index \(3,\)"):
        loss_matrix(lambda p, b: jnp.where(b["label"] == 77, jnp.nan, loss_fn(p, b)), draws,
                    {**examples, "label": np.where(np.arange(37) == 3, 77, examples["label"])},
                    layout="host")  # fmt: skip
