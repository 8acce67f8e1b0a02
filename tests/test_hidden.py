"""Rivals that look at the hidden states of a language model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.spatial.distance import cdist

from madjax.baselines import HIDDEN, Baseline, Mahalanobis, lookup
from madjax.baselines.hidden import HiddenStates
from madjax.baselines.model import Model
from madjax.losses import from_decoder, sequence_positions
from madjax.models.decoder import Decoder, DecoderConfig
from madjax.models.generate import completion_batch, prompt_batch

CONFIG = DecoderConfig(
    vocab_size=48, size=16, hidden_size=24, num_layers=5, num_heads=4, num_kv_heads=2, head_size=4, context=40
)


@pytest.fixture(scope="module")
def model():
    network = Decoder(CONFIG, rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(network)
    rng = np.random.default_rng(0)
    return nnx.merge(graphdef, jax.tree.map(lambda x: x + 0.3 * rng.normal(size=x.shape).astype("f"), state))


def batch(seed, count=60, prompt=9, completion=6):
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(1, 48, size).tolist() for size in rng.integers(2, 9, count)]
    completions = [rng.integers(1, 48, size).tolist() for size in rng.integers(1, 6, count)]
    return prompt_batch(prompts, prompt) | completion_batch(completions, completion)


def states_behind(model, tokens, layer):
    """`[length, size]` of one sequence without padding, layer by layer."""
    tokens = jnp.asarray([tokens])
    positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    seen = []
    model.hidden(tokens, positions, model.empty_cache(*tokens.shape), lambda index, state: seen.append(state[0]))
    return np.asarray(seen[layer])


@pytest.mark.parametrize("place", ["last", "prompt", "completion"])
def test_states_are_those_of_each_sequence_by_itself(model, place):
    given = batch(0, count=7)
    read = Model(*from_decoder(model), batch_size=4).read(HiddenStates(place), given)
    assert list(read) == ["layer002", "layer004"]
    for index in range(7):
        size, more = int(given["prompt_length"][index]), int(given["completion_length"][index])
        tokens = [*given["prompt"][index][-size:], *given["completion"][index][:more]]
        for name, layer in (("layer002", 1), ("layer004", 3)):
            states = states_behind(model, tokens, layer)
            wanted = {"last": states[size - 1], "prompt": states[:size].mean(0), "completion": states[size:].mean(0)}
            np.testing.assert_allclose(read[name][index], wanted[place], atol=2e-4)


def test_layers_are_scored_one_by_one(model):
    trusted, test = batch(0), batch(1, count=11)
    loss_fn, params = from_decoder(model)
    baseline = Baseline.fit(lookup("mahalanobis_prompt"), loss_fn, params, trusted)
    scores = baseline.score(test)
    assert scores.prediction is None
    reader, by_hand = Model(loss_fn, params), []
    known, asked = (reader.read(HiddenStates("prompt"), given) for given in (trusted, test))
    for name in known:
        one = {"logits": np.zeros((60, 1)), "features": known[name]}
        by_hand.append(Mahalanobis().fit(one)({"features": asked[name]}))
    np.testing.assert_allclose(scores.anomaly_score, np.mean(by_hand, axis=0), rtol=1e-6)


def test_ranks_of_the_nearest_of_the_layer_before(model):
    """TED's score is a function of the ranks alone: equal ranks, equal scores."""
    trusted, test = batch(0), batch(1, count=40)
    reader = Model(*from_decoder(model))
    known, asked = (reader.read(HiddenStates("last"), given) for given in (trusted, test))
    scores = HIDDEN["ted_last"].fit(known)(asked)
    before, after = (cdist(asked[name].astype(float), known[name].astype(float)) for name in known)
    ranks = np.array([(row < row[near]).sum() for row, near in zip(after, before.argmin(1), strict=True)])
    for rank in np.unique(ranks):
        assert np.ptp(scores[ranks == rank]) < 1e-9
    assert len(np.unique(scores.round(9))) == len(np.unique(ranks))


def test_states_that_the_trusted_never_have_stand_out(model):
    reader = Model(*from_decoder(model))
    known, usual = (reader.read(HiddenStates("prompt"), given) for given in (batch(0, count=120), batch(1, count=40)))
    strange = {name: 4 * states for name, states in usual.items()}
    for name in ("mahalanobis_prompt", "vae_prompt", "beatrix_prompt"):
        anomaly = HIDDEN[name].fit(known)
        assert (anomaly(strange)[:, None] > anomaly(usual)).mean() > 0.9, name


def test_padding_changes_nothing(model):
    loss_fn, params = from_decoder(model)
    for place in ("last", "prompt", "completion"):
        short, long = (
            Model(loss_fn, params).read(HiddenStates(place), batch(0, 5, *sizes)) for sizes in ((9, 6), (12, 8))
        )
        np.testing.assert_allclose(short["layer004"], long["layer004"], atol=2e-4)
    positions, _ = sequence_positions(batch(0, 5))
    assert positions.shape == (5, 15)


def test_sequences_have_no_classes(model):
    with pytest.raises(ValueError, match=r"^per_class: wanted a classifier, got a language model"):
        Baseline.fit(lookup("vae_last"), *from_decoder(model), batch(0), per_class=True)
    two = Decoder(DecoderConfig(**{**vars(CONFIG), "num_layers": 3}), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"^model: wanted four layers at least"):
        Baseline.fit(lookup("ted_last"), *from_decoder(two), batch(0))
