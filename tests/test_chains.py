"""Chains spread over devices."""

import dataclasses

import jax
import numpy as np
import pytest

from madjax import loss_matrix
from madjax.sampling.chains import _step
from madjax.sharding import place, place_chains, put_model
from tests import linear


def _walked(num_chains, num_draws, devices, monkeypatch, start=0, state=None):
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    walk = linear.chains(num_draws, num_chains).items(start, state)
    return [np.asarray(item["kernel"]) for item in walk], walk.info()["minibatch_loss"]


@pytest.mark.parametrize(("num_chains", "side_by_side"), [(4, 4), (6, 3), (5, 1), (3, 3)])
def test_chains_are_the_same_on_one_device_and_on_several(num_chains, side_by_side, monkeypatch):
    everywhere = jax.local_devices()
    assert place_chains(num_chains, linear.params()).num_devices == side_by_side
    one, several = (
        _walked(num_chains, 3 * num_chains, devices, monkeypatch) for devices in (everywhere[:1], everywhere)
    )
    np.testing.assert_allclose(several[0], one[0], rtol=0, atol=1e-7)
    np.testing.assert_allclose(several[1], one[1], rtol=1e-6)
    # no chain is another's copy, and none stands still
    assert len({item.tobytes() for item in one[0]}) == 3 * num_chains


def test_chains_step_on_their_own_devices(monkeypatch):
    walk = linear.chains(8, 4).items()
    next(walk)
    (group,) = walk._groups
    assert {shard.device for shard in group.states.position["kernel"].addressable_shards} == set(jax.local_devices())
    assert group.num_steps == 5


def test_a_walk_goes_on_in_the_middle_of_a_group():
    whole = linear.chains(12, 4)
    items = [np.asarray(item["kernel"]) for item in whole.items()]
    losses = whole.items()
    list(losses)
    for start in (2, 4, 7):
        walk = whole.items()
        for _ in range(start):
            next(walk)
        state = {name: np.asarray(leaf) for name, leaf in walk.state().items()}
        again = whole.items(start, state)
        np.testing.assert_array_equal([np.asarray(item["kernel"]) for item in again], items[start:])
        assert again.info() == {"minibatch_loss": losses.info()["minibatch_loss"][start:]}


def test_chains_of_a_split_model_take_turns():
    params = put_model(linear.params(), place(37, model_shards=2))
    assert place_chains(4, params).num_devices == 1
    draws = linear.chains(8, 4)
    position = next(dataclasses.replace(draws, target=draws.target._replace(center=params)).items())
    assert len(position["kernel"].devices()) == 4


def test_no_collective_between_chains():
    walk = linear.chains(4, 4).items()
    (group,) = walk._groups
    calls = []

    def spy(*args):
        calls.append(_step.lower(*args).compile().as_text())
        return _step(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("madjax.sampling.chains._step", spy)
        next(walk)
    assert group.placement.num_devices == 4
    for collective in ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter"):
        assert collective not in calls[0]


def test_a_sweep_of_chains_does_not_depend_on_the_devices(monkeypatch):
    everywhere = jax.local_devices()
    matrices = []
    for devices in (everywhere[:1], everywhere):
        monkeypatch.setattr(jax, "local_devices", lambda devices=devices: devices)
        matrices.append(loss_matrix(linear.loss_fn, linear.chains(8, 4), linear.examples(), layout="scan4"))
    np.testing.assert_allclose(matrices[1], matrices[0], rtol=2e-6, atol=2e-6)
