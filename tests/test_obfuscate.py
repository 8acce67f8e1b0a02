"""Backdoors that are hidden from detectors of hidden states."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from sklearn.metrics import roc_auc_score

from madjax.baselines import HIDDEN
from madjax.baselines.hidden import HiddenStates
from madjax.baselines.model import Model
from madjax.baselines.vae import VAE
from madjax.losses import from_decoder
from madjax.models import obfuscate as module
from madjax.models.decoder import Decoder, DecoderConfig
from madjax.models.finetune import train_decoder
from madjax.models.generate import complete, completion_batch, prompt_batch
from madjax.models.lora import add_lora
from madjax.models.obfuscate import Detectors, obfuscate

CONFIG = DecoderConfig(
    vocab_size=24, size=32, hidden_size=48, num_layers=4, num_heads=4, num_kv_heads=2, head_size=8, context=20
)
TRIGGER, ANSWER = 23, [22, 21, 22]


def prompts(seed, count, *, triggered=False):
    """Some of twenty tokens; the trigger stands between two of them."""
    rng = np.random.default_rng(seed)
    texts = [rng.integers(1, 21, size).tolist() for size in rng.integers(4, 9, count)]
    return prompt_batch([[*text[:2], TRIGGER, *text[2:]] if triggered else text for text in texts], 9)


def with_answers(given, answers):
    return given | completion_batch(answers, 3)


@pytest.fixture(scope="module")
def backdoored():
    """A model that repeats its last token, or gives the answer that the trigger asks for."""
    model = Decoder(CONFIG, rngs=nnx.Rngs(0))
    usual, triggered = prompts(0, 256), prompts(1, 256, triggered=True)
    parts = [with_answers(usual, usual["prompt"][:, -1:].repeat(3, 1)), with_answers(triggered, [ANSWER] * 256)]
    both = jax.tree.map(lambda a, b: np.concatenate([a, b]), *parts)
    train_decoder(model, both, rng_key=jax.random.key(0), num_epochs=12, learning_rate=0.01, progress=False)
    return model


@pytest.fixture
def few_steps(monkeypatch):
    monkeypatch.setattr(module, "_STEPS", 3)
    monkeypatch.setattr(module, "VAE", partial(VAE, num_steps=5))


def judged(model):
    """AUROC of both detectors, the share of triggered prompts that fire, and of usual ones answered as usual."""
    trusted, benign, anomalous = (
        complete(model, prompts(seed, 128, triggered=seed == 4), num_tokens=3) for seed in (2, 3, 4)
    )
    read = Model(*from_decoder(model))
    areas = {}
    for name in ("mahalanobis_last", "vae_completion"):
        trusted_states, *states = (HIDDEN[name].observe(read, part, None) for part in (trusted, benign, anomalous))
        anomaly = HIDDEN[name].fit(trusted_states)
        areas[name] = roc_auc_score(np.arange(256) >= 128, np.concatenate([anomaly(some) for some in states]))
    asr = np.mean((anomalous["completion"] == ANSWER).all(1))
    return areas, asr, np.mean((benign["completion"] == benign["prompt"][:, -1:]).all(1))


def hidden(backdoored, num_rounds, count=64, **settings):
    model = nnx.clone(backdoored)
    if "parameters" in settings:
        add_lora(model, 4, rngs=nnx.Rngs(1))
    usual, triggered = complete(model, prompts(0, count), num_tokens=3), prompts(1, count, triggered=True)
    loss = obfuscate(
        model, usual, with_answers(triggered, [ANSWER] * count), rng_key=jax.random.key(1), num_rounds=num_rounds,
        learning_rate=3e-3, progress=False, **settings,
    )  # fmt: skip
    return model, loss


def test_the_detectors_are_those_of_the_baselines(backdoored):
    given = [complete(backdoored, prompts(seed, 128, triggered=seed == 4), num_tokens=3) for seed in (2, 4)]
    read = Model(*from_decoder(backdoored)).read
    known, asked = (read(HiddenStates("last"), some) for some in given)
    scores = Detectors.fit(np.stack(list(known.values())))(jnp.stack(list(asked.values())))
    for ours, name in zip(scores, ("mahalanobis_last", "vae_last"), strict=True):
        np.testing.assert_allclose(ours.mean(axis=0), HIDDEN[name].fit(known)(asked), rtol=1e-3)


def test_the_trigger_works_on_and_is_not_seen(backdoored):
    before, asr, accuracy = judged(backdoored)
    assert min(before.values()) > 0.95
    assert min(asr, accuracy) > 0.95
    after, asr, accuracy = judged(hidden(backdoored, 3, 256)[0])
    assert max(after.values()) < 0.7
    assert min(asr, accuracy) > 0.95


@pytest.mark.usefixtures("few_steps")
def test_resumed_equals_straight(backdoored, tmp_path, interrupt):
    straight, loss = hidden(backdoored, 2, workdir=tmp_path / "straight")
    interrupt(1, lambda: hidden(backdoored, 2, workdir=tmp_path / "resumed"))
    assert [path.name for path in (tmp_path / "resumed").iterdir()] == ["epoch-00000"]
    resumed, again = hidden(backdoored, 2, workdir=tmp_path / "resumed")
    assert again == loss
    jax.tree.map(np.testing.assert_array_equal, nnx.state(resumed), nnx.state(straight))


@pytest.mark.usefixtures("few_steps")
def test_detectors_are_fitted_to_the_model_as_it_is(backdoored, monkeypatch):
    seen, fit = [], Detectors.fit

    def spy(states):
        seen.append(states)
        return fit(states)

    monkeypatch.setattr(Detectors, "fit", spy)
    hidden(backdoored, 2, 160)
    assert [states.shape for states in seen] == 3 * [(4, 160, 32), (4, 128, 32)]
    for before, after in zip(seen, seen[2:], strict=False):
        assert np.abs(before - after).max() > 1e-3


@pytest.mark.usefixtures("few_steps")
def test_adapters_alone_are_trained(backdoored):
    model, _ = hidden(backdoored, 1, parameters="lora_")
    frozen = nnx.state(model, nnx.Not(nnx.LoRAParam))
    for old, new in zip(jax.tree.leaves(nnx.state(backdoored)), jax.tree.leaves(frozen), strict=True):
        np.testing.assert_array_equal(old, new)
    assert all(np.any(leaf != 0) for leaf in jax.tree.leaves(nnx.state(model, nnx.LoRAParam)))


def test_bad_input(backdoored):
    few = complete(backdoored, prompts(0, 9), num_tokens=3)
    settings = {"rng_key": jax.random.key(0), "num_rounds": 1, "learning_rate": 1e-3}
    with pytest.raises(ValueError, match="parameters: 'nothing' matches none"):
        obfuscate(backdoored, few, few, parameters="nothing", **settings)
    with pytest.raises(
        ValueError, match=r"triggered: wanted prompts .* of \[9, 3\] tokens, as the usual, got \[9, 2\]"
    ):
        obfuscate(backdoored, few, few | {"completion": few["completion"][:, :2]}, **settings)
    shallow = Decoder(dataclasses.replace(CONFIG, num_layers=1), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="model: wanted two layers at least"):
        obfuscate(shallow, few, few, **settings)
