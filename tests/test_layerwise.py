import jax
import numpy as np
import pytest
from flax import nnx

from madjax import Detector, loss_matrix
from madjax.losses import TokenLoss, from_decoder
from madjax.models.decoder import Decoder, DecoderConfig
from madjax.models.generate import completion_batch, prompt_batch
from madjax.models.lora import add_lora
from madjax.sampling import StoredDraws, drawn_parameters, gaussian, layerwise
from tests import oracles

SIZES = {
    "vocab_size": 48, "size": 16, "hidden_size": 32, "num_layers": 5, "num_heads": 4, "num_kv_heads": 2, "head_size": 4,
}  # fmt: skip
LLAMA = DecoderConfig(**SIZES)
GEMMA2 = DecoderConfig(
    **SIZES, tied=False, unit_offset=True, post_norms=True, window=3, attention_cap=5.0, logit_cap=3.0,
    activation="gelu",
)  # fmt: skip


def make(config, rank=0):
    model = Decoder(config, rngs=nnx.Rngs(0))
    if rank:
        add_lora(model, rank, rngs=nnx.Rngs(1))
    return from_decoder(model)


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 48, size).tolist() for size in rng.integers(2, 7, 13)]
    completions = [rng.integers(0, 48, size).tolist() for size in rng.integers(1, 5, 13)]
    return prompt_batch(prompts) | completion_batch(completions)


def around(loss_fn, params, mask=None, num_draws=3):
    mask = loss_fn.is_trainable(params) if mask is None else mask
    return gaussian(jax.random.key(0), params, 0.2, num_draws=num_draws, mask=mask)


@pytest.mark.parametrize(("config", "num_devices"), [(LLAMA, 4), (GEMMA2, 1)], ids=["llama", "gemma2"])
def test_layer_by_layer_equals_a_double_loop(config, num_devices, batch):
    loss_fn, params = make(config, rank=2)
    draws = around(loss_fn, params)
    devices = jax.devices()[:num_devices]
    matrix = loss_matrix(loss_fn, draws, batch, layout="layers", batch_size=2, devices=devices)
    np.testing.assert_allclose(matrix, oracles.loss_matrix(loss_fn, draws, batch), rtol=1e-5, atol=1e-5)


def make_batch(prompts):
    return prompt_batch(prompts) | completion_batch([[place] for place in range(len(prompts))])


def test_batches_are_as_long_as_their_examples():
    rng = np.random.default_rng(0)
    lengths = [40, 3, 9, 5, 4, 11, 2, 25, 1, 12, 3]
    examples = make_batch([rng.integers(0, 48, size).tolist() for size in lengths])
    batches, places = make(LLAMA)[0].cut(examples, 4)
    # of 40 tokens, an eighth is 5; the last batch holds 12, 25 and, twice, 40
    assert [part["prompt"].shape for part in batches] == [(4, 5), (4, 15), (4, 40)]
    joined = [row for part in batches for row in zip(part["prompt"], part["prompt_length"], strict=True)]
    completions = np.concatenate([part["completion"] for part in batches])
    for (row,), (prompt, length) in zip(completions, joined, strict=True):
        np.testing.assert_array_equal(prompt[-length:], examples["prompt"][row, -length:])
    np.testing.assert_array_equal(completions[places], examples["completion"])


@pytest.mark.parametrize("config", [LLAMA, GEMMA2], ids=["llama", "gemma2"])
def test_what_prompts_begin_with_is_computed_once(config):
    rng = np.random.default_rng(0)
    lengths = [6, 2, 1, 4, 3, 9, 2, 2, 5, 1]
    examples = make_batch([[7, 3, 3, 8, 5, 1, *rng.integers(9, 48, size).tolist()] for size in lengths])
    loss_fn, params = make(config)
    batches, _ = loss_fn.cut(examples, 5)
    # six tokens are shared, and of them four taken; of the eleven others an eighth is two
    assert [part["shared"].tolist() for part in batches] == [[[7, 3, 3, 8]] * 5] * 2
    assert [part["prompt"].shape for part in batches] == [(5, 4), (5, 11)]
    draws = around(loss_fn, params)
    matrix = loss_matrix(loss_fn, draws, examples, layout="layers", batch_size=5, devices=jax.devices()[:1])
    np.testing.assert_allclose(matrix, oracles.loss_matrix(loss_fn, draws, examples), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("prompts", "shared"),
    [
        ([[1, 2, 3, 4, 5]] * 8, 4),
        ([[1, 2, 3, 4]] * 8, 0),  # the last token is asked for what follows it
        ([[1, 2, 3, 4, 5]] * 7, 0),  # too few to tell
        ([[9, 2, 3, 4, 5, 6], *([[1, 2, 3, 4, 5, 6]] * 9)], 0),
    ],
)
def test_what_prompts_share(prompts, shared):
    batches, _ = make(LLAMA)[0].cut(make_batch(prompts), 4)
    assert {part["shared"].shape for part in batches} == {(4, shared)}


def test_a_host_without_examples_has_no_batches(batch):
    batches, places = make(LLAMA)[0].cut(jax.tree.map(lambda leaf: leaf[:0], batch), 1)
    assert (batches, len(places)) == ([], 0)


def test_every_token_has_its_own_loss(batch):
    loss_fn, params = make(GEMMA2)
    draws = around(loss_fn, params)
    each = layerwise.at_draws(TokenLoss(loss_fn), draws, batch)(np.int32(1))
    np.testing.assert_allclose(each, loss_fn.tokens(draws.params(1), batch), rtol=1e-5, atol=1e-5)
    mean = np.asarray(each).sum(1) / batch["completion_length"]
    np.testing.assert_allclose(mean, loss_fn(draws.params(1), batch), rtol=1e-5, atol=1e-5)


def test_a_part_has_the_draws_of_the_whole():
    loss_fn, params = make(LLAMA)
    mask = drawn_parameters(params, r"layers/3/.*kernel|norm")
    draws = around(loss_fn, params, mask)
    whole = jax.tree.leaves(draws.params(1))
    drawn = np.flatnonzero(jax.tree.leaves(mask))
    numbers = [int(drawn[5]), int(np.flatnonzero(~np.array(jax.tree.leaves(mask)))[0]), int(drawn[2])]
    part = draws.part({"some": numbers[0], "others": numbers[1:]}).params(1)
    for number, leaf in zip(numbers, [part["some"], *part["others"]], strict=True):
        np.testing.assert_array_equal(leaf, whole[number])


def test_layers_alike_share_their_programs(batch):
    before = layerwise._run._cache_size(), layerwise._params._cache_size()
    loss_fn, params = make(DecoderConfig(**SIZES | {"size": 24}))
    loss_matrix(loss_fn, around(loss_fn, params), batch, layout="layers", batch_size=13, devices=jax.devices()[:1])
    # the embedding, a layer, the logits
    assert (layerwise._run._cache_size(), layerwise._params._cache_size()) == (before[0] + 3, before[1] + 3)


@pytest.mark.parametrize("most_bytes", [1 << 30, 100])
def test_layers_before_the_first_that_is_drawn_are_run_once(batch, monkeypatch, most_bytes):
    monkeypatch.setattr(layerwise, "_MOST_BYTES", most_bytes)
    runs = []
    monkeypatch.setattr(layerwise, "_run", lambda *args, own=layerwise._run: runs.append(args) or own(*args))
    loss_fn, params = make(LLAMA)
    draws = around(loss_fn, params, drawn_parameters(params, "layers/3"))
    matrix = loss_matrix(loss_fn, draws, batch, batch_size=2, devices=jax.devices()[:1])
    # seven batches; seven stages, of which layer 3 is the fifth
    assert len(runs) == (7 * 4 + 3 * 7 * 3 if most_bytes > 100 else 3 * 7 * 7)
    np.testing.assert_allclose(matrix, oracles.loss_matrix(loss_fn, draws, batch), rtol=1e-5, atol=1e-5)


def test_auto_goes_by_layers(batch, monkeypatch):
    calls = []
    monkeypatch.setattr(layerwise, "losses", lambda *args, own=layerwise.losses: calls.append(args) or own(*args))
    loss_fn, params = make(LLAMA)
    loss_matrix(loss_fn, around(loss_fn, params), batch)
    assert len(calls) == 1 + 3  # nothing is frozen, and three draws


def test_a_detector_of_a_decoder(batch):
    loss_fn, params = make(LLAMA)
    fitted = [
        Detector.fit(jax.random.key(1), loss_fn, params, batch, num_draws=4, coupling="topk_ccc", layout=layout)
        for layout in ("layers", "host")
    ]
    scores = [detector.score(batch).anomaly_score for detector in fitted]
    np.testing.assert_allclose(*scores, atol=1e-4)


def test_bad_input(digits_model, examples, batch):
    loss_fn, params = digits_model
    with pytest.raises(ValueError, match="layout: layers is for Gaussian draws of a loss that has stages"):
        loss_matrix(loss_fn, around(loss_fn, params), examples, layout="layers")
    loss_fn, params = make(LLAMA)
    stored = StoredDraws(jax.tree.map(lambda leaf: np.stack([leaf] * 2), params))
    with pytest.raises(ValueError, match="layout: layers is for Gaussian draws"):
        loss_matrix(loss_fn, stored, batch, layout="layers")
