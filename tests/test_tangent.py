"""Losses of the tangent against gradients taken one by one, and against draws that are small."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from madjax import Detector, Tangent, loss_matrix, open_traces
from madjax.coupling import leave_one_out
from madjax.losses import OneTokenLoss
from madjax.metrics import auroc
from madjax.models.generate import completion_batch, prompt_batch
from madjax.sampling import TangentDraws, backward, drawn_parameters
from madjax.sampling.restrict import path_names
from madjax.sampling.tangent import NUM_DRAWS, _fold, _signs, gradient_bytes
from madjax.stopping import Sequential
from madjax.sweep import forward_passes
from madjax.types import SMALL_LOSS
from tests import linear
from tests.test_layerwise import GEMMA2, LLAMA, make
from tests.test_layerwise import batch as batch  # a fixture


def around(params, mask, draws_of_each=NUM_DRAWS, moved=0.3):
    return TangentDraws(jax.random.key(3), params, jnp.float32(moved), tuple(jax.tree.leaves(mask)), draws_of_each)


def of_linear(draws_of_each=NUM_DRAWS, moved=0.3, bias=True):
    return around(linear.params(), {"bias": bias, "kernel": True}, draws_of_each, moved)


def cosines(loss_fn, draws, examples):
    """For each tensor, the cosines between the gradients of two examples."""

    @jax.jit
    def one(example):
        gradient = jax.grad(lambda params: jnp.log(loss_fn(params, example)[0]))(draws.center)
        leaves = zip(jax.tree.leaves(gradient), draws.drawn, strict=True)
        rows = [leaf.reshape(-1) for leaf, is_drawn in leaves if is_drawn]
        return [row / jnp.maximum(jnp.linalg.norm(row), 1e-30) for row in rows]

    count = len(jax.tree.leaves(examples)[0])
    units = [one(jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], examples)) for i in range(count)]
    tensors = [np.stack(rows) for rows in zip(*units, strict=True)]
    return np.stack([rows @ rows.T for rows in tensors])


def products(sketches):
    return np.einsum("ipd,jpd->pij", sketches, sketches)


@pytest.mark.parametrize(("config", "pattern"), [(LLAMA, "kernel$"), (GEMMA2, "layers/[23]/")], ids=["llama", "gemma2"])
def test_sketches_have_the_products_of_a_decoders_gradients(config, pattern, batch):
    loss_fn, params = make(config)
    draws = around(params, drawn_parameters(params, pattern), 2039)
    losses, sketches = jax.jit(draws.sketches, static_argnums=0)(loss_fn, batch)
    np.testing.assert_allclose(losses, loss_fn(params, batch), rtol=1e-5)
    np.testing.assert_allclose(products(sketches), cosines(loss_fn, draws, batch), atol=0.1)


@pytest.fixture
def large(monkeypatch):
    """A gradient of a whole decoder is too large, one of a layer is not, and of two it is."""
    monkeypatch.setattr("madjax.sampling.tangent.MOST_BYTES", 4 * 3000)


@pytest.fixture(scope="module")
def few():
    """Of two lengths, after which batches are cut."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 48, size).tolist() for size in (3, 9, 3, 9, 2)]
    return prompt_batch(prompts) | completion_batch([[4, 1], [7], [5, 3], [2, 2], [1]])


@pytest.mark.parametrize(
    ("config", "pattern", "num_devices"), [(LLAMA, "layers/[23]/", 1), (GEMMA2, "kernel$", 4)], ids=["llama", "gemma2"]
)
def test_layer_by_layer_equals_the_whole(config, pattern, num_devices, few, large):
    loss_fn, params = make(config)
    draws = around(params, drawn_parameters(params, pattern), 31)
    assert backward.most_at_a_time(backward.layers(loss_fn, draws)) == 1
    matrix = loss_matrix(loss_fn, draws, few, batch_size=3, devices=jax.devices()[:num_devices])
    expected = draws.losses(loss_fn, jnp.arange(draws.num_draws), few)
    np.testing.assert_allclose(matrix, expected, rtol=1e-4, atol=1e-5)
    assert forward_passes(loss_fn, draws) == 4


def test_memory_goes_by_the_model_though_little_is_drawn(few, monkeypatch):
    def limit(num_bytes):
        monkeypatch.setattr("madjax.sampling.tangent.MOST_BYTES", num_bytes)

    def loops():
        return "scan[" in str(jax.make_jaxpr(lambda draws: draws.sketches(loss_fn, few))(draws))

    loss_fn, params = make(LLAMA)
    draws = around(params, drawn_parameters(params, "layers/2/attention/o/"), 31)
    limit(5 * gradient_bytes(params))
    assert backward.layers(loss_fn, draws) is None
    assert not loops()
    limit(gradient_bytes(params))
    assert backward.layers(loss_fn, draws) is None
    assert loops()
    limit(gradient_bytes(params) - 1)
    layers = backward.layers(loss_fn, draws)
    limit(3 * gradient_bytes(layers[3].params))  # behind the embedding
    assert [any(layer.drawn) for layer in layers].index(True) == 3
    assert backward.most_at_a_time(layers) == 3


def test_tokens_layer_by_layer(few, monkeypatch):
    loss_fn, params = make(LLAMA)
    draws = around(params, drawn_parameters(params, "layers/[234]/.*kernel$"), 31)
    one, tokens = OneTokenLoss(loss_fn), few | {"token": np.arange(5, dtype=np.int32) % few["completion_length"]}
    expected = loss_matrix(one, draws, tokens)
    monkeypatch.setattr("madjax.sampling.tangent.MOST_BYTES", 2 * 4 * (2304 + 2 * LLAMA.size))
    assert backward.most_at_a_time(backward.layers(one, draws)) == 2
    before = backward.run_forward._cache_size(), backward.run_backward._cache_size()
    matrix = loss_matrix(one, draws, tokens, devices=jax.devices()[:1])
    np.testing.assert_allclose(matrix, expected, rtol=1e-4, atol=1e-5)
    # of two lengths: the embedding, a layer and the logits; backward the logits and a layer
    now = backward.run_forward._cache_size(), backward.run_backward._cache_size()
    assert now == (before[0] + 2 * 3, before[1] + 2 * 2)


def test_what_cannot_be_passed_back_layer_by_layer(large):
    loss_fn, params = make(LLAMA)
    whole = around(params, drawn_parameters(params), 31)  # its embedding gives the logits as well
    for loss, draws in ((loss_fn, whole), (linear.loss_fn, of_linear()), (loss_fn, linear.independent(3))):
        assert backward.layers(loss, draws) is None


@pytest.mark.parametrize("bias", [True, False])
def test_sketches_have_the_products_of_gradients(bias):
    draws, examples = of_linear(bias=bias), linear.examples(9)
    _, sketches = draws.sketches(linear.loss_fn, examples)
    np.testing.assert_allclose(products(sketches), cosines(linear.loss_fn, draws, examples), atol=1e-5)


def test_a_small_draws_losses_are_those_of_the_tangent():
    """Of one tensor and one example the draws are parameters after all; each moves what stands in its bucket."""
    draws, examples, kernel = of_linear(7, 1e-3, bias=False), linear.examples(1), linear.params()["kernel"]

    def log_loss(kernel):
        return jnp.log(linear.loss_fn(linear.params() | {"kernel": kernel}, examples))[0]

    size = 1e-3 * np.sqrt(7) / jnp.linalg.norm(jax.grad(log_loss)(kernel))
    signs = _signs(jax.random.bits(draws.rng_key, (4, 1), jnp.uint32), 120)
    noise = [jnp.where(jnp.arange(120) % 7 == item, size * signs, 0).reshape(12, 10) for item in range(7)]
    moves = [[log_loss(kernel + one) - log_loss(kernel)] for one in noise]
    assert np.std(moves) > 1e-4
    told = np.log(loss_matrix(linear.loss_fn, draws, examples)) - log_loss(kernel)
    np.testing.assert_allclose(told, moves, atol=2e-5)


@pytest.mark.parametrize(("batch_size", "num_devices"), [(5, 1), (37, 1), (6, 4)])
def test_losses_depend_on_neither_batches_nor_devices(batch_size, num_devices, monkeypatch):
    monkeypatch.setattr("madjax.sampling.tangent.MOST_BYTES", 3 * 4 * 130)  # three gradients at a time
    draws, examples = of_linear(6), linear.examples()
    matrix = loss_matrix(linear.loss_fn, draws, examples, batch_size=batch_size, devices=jax.devices()[:num_devices])
    np.testing.assert_allclose(matrix, draws.losses(linear.loss_fn, jnp.arange(12), examples), rtol=1e-5)


def test_one_example_on_several_devices():
    draws, examples = of_linear(6), linear.examples(1)
    matrix = loss_matrix(linear.loss_fn, draws, examples, devices=jax.devices()[:4])
    np.testing.assert_allclose(matrix, draws.losses(linear.loss_fn, jnp.arange(12), examples), rtol=1e-5)


@pytest.mark.parametrize("part", [0, 1])
def test_each_tensor_moves_each_example_as_far_as_asked(part):
    losses = np.split(loss_matrix(linear.loss_fn, of_linear(), linear.examples()), 2)[part]
    own = np.log(linear.loss_fn(linear.params(), linear.examples()) + SMALL_LOSS)
    moves = np.log(losses + SMALL_LOSS) - own
    np.testing.assert_allclose(np.sqrt(np.square(moves).mean(0)), 0.3, rtol=0.01)


def test_what_no_draw_moves_stays():
    params = linear.params() | {"other": jnp.ones(3)}
    draws = around(params, {"bias": False, "kernel": False, "other": True})
    losses = loss_matrix(linear.loss_fn, draws, linear.examples())
    np.testing.assert_allclose(losses, np.tile(linear.loss_fn(params, linear.examples()), (NUM_DRAWS, 1)), rtol=1e-6)


def test_an_output_that_is_as_good_as_certain_moves_as_well():
    sure = linear.examples()
    sure["image"] *= 12
    sure["label"] = np.argmax(sure["image"] @ linear.params()["kernel"], axis=1).astype(np.int32)

    def loss_fn(params, batch):
        logits = batch["image"] @ params["kernel"] + params["bias"]
        own = jnp.take_along_axis(logits, batch["label"][:, None], axis=1)
        others = jnp.where(jax.nn.one_hot(batch["label"], 10, dtype=bool), -jnp.inf, logits - own)
        return jax.nn.softplus(jax.nn.logsumexp(others, axis=1))

    assert (loss_fn(linear.params(), sure) < 1e-12).any()
    losses = loss_matrix(loss_fn, of_linear(), sure)
    own = np.log(loss_fn(linear.params(), sure) + SMALL_LOSS)
    moves = np.log(losses + SMALL_LOSS) - own
    np.testing.assert_allclose(np.sqrt(np.square(moves).mean(0)), 0.3, rtol=0.02)


def test_signs_and_buckets():
    words = jax.random.bits(jax.random.key(0), (400, 1), jnp.uint32)
    signs = np.asarray(_signs(words, 12_790))
    assert set(signs) == {-1.0, 1.0}
    assert abs(signs.mean()) < 0.04
    assert abs(np.mean(signs[:-32] * signs[32:])) < 0.04
    rows = np.arange(3 * 101 - 5, dtype=np.float32)
    np.testing.assert_allclose(_fold(jnp.asarray(rows), 101), [sum(rows[place::101]) for place in range(101)])


@pytest.mark.parametrize("moved", [0.0, -1.0, 1.5, np.nan])
def test_a_movement_that_cannot_be_is_told(moved):
    with pytest.raises(ValueError, match=f"moved: wanted a number above 0, and 1 at most, got {moved}"):
        Tangent(moved).perturb(jax.random.key(0), linear.loss_fn, linear.params(), linear.examples(), None, 3)


def test_what_tells_most_is_drawn_where_nothing_is_said(digits_model):
    for (loss_fn, params), expected in [
        (make(LLAMA), {f"layers/{layer}/attention/o/kernel" for layer in range(LLAMA.num_layers)}),
        (digits_model, {name for name in path_names(digits_model[1]) if name.endswith("kernel")}),
    ]:
        draws = Tangent().perturb(jax.random.key(0), loss_fn, params, {}, None, 3).draws
        assert expected == {name for name, drawn in zip(path_names(params), draws.drawn, strict=True) if drawn}


def test_parameters_without_kernels_are_told():
    with pytest.raises(ValueError, match=r"pattern: 'kernel\$' matches no trainable parameter; the paths are w"):
        Tangent().perturb(jax.random.key(0), linear.loss_fn, {"w": jnp.ones(2)}, linear.examples(), None, 3)


def test_a_layout_of_draws_is_none_of_a_tangents():
    with pytest.raises(ValueError, match=r"layout: draws of a tangent, and they alone, .* got host"):
        loss_matrix(linear.loss_fn, of_linear(), linear.examples(), layout="host")
    with pytest.raises(ValueError, match=r"layout: draws of a tangent, and they alone, .* got gradient"):
        loss_matrix(linear.loss_fn, linear.independent(3), linear.examples(), layout="gradient")


def test_a_tangent_has_no_parameters():
    with pytest.raises(ValueError, match="draws: those of a tangent differ between examples"):
        of_linear().params(jnp.int32(0))


def test_a_loss_of_another_shape_is_told():
    with pytest.raises(ValueError, match=r"loss_fn: wanted one loss an example, \[1\] for one, got shape \(\)"):
        loss_matrix(lambda p, b: linear.loss_fn(p, b).mean(), of_linear(), linear.examples())


def test_tokens_one_by_one_are_those_of_the_sequence(batch):
    loss_fn, params = make(LLAMA)
    tokens = loss_fn.tokens(params, batch)
    second = OneTokenLoss(loss_fn)(params, batch | {"token": np.ones(13, np.int32)})
    np.testing.assert_allclose(second, tokens[:, 1], rtol=1e-6)


@pytest.fixture
def mechanisms():
    """Of a linear model: trusted examples have one half of the inputs, those of another mechanism the other half."""
    examples = linear.examples(240)
    examples["image"][:160, 6:] = 0
    examples["image"][160:, :6] = 0
    return {name: rows[:80] for name, rows in examples.items()}, {name: rows[80:] for name, rows in examples.items()}


def test_a_detector_of_the_tangent(mechanisms, tmp_path):
    trusted, test = mechanisms
    fit = {"perturbation": Tangent(), "num_draws": 127, "coupling": "peer_information", "traces": "log"}
    detector = Detector.fit(jax.random.key(0), linear.loss_fn, linear.params(), trusted, **fit)
    scores = detector.score(test).anomaly_score
    assert auroc(scores[:80], scores[80:]) > 0.95
    assert detector.sample_forwards == 3 * 80  # forward and back once
    detector.save(tmp_path / "detector")
    loaded = Detector.load(tmp_path / "detector", linear.loss_fn, linear.params())
    assert isinstance(loaded.draws, TangentDraws)
    assert loaded.scorer.num_parts == detector.scorer.num_parts == 1
    np.testing.assert_array_equal(loaded.score(test).anomaly_score, scores)


def test_the_detector_and_the_store_know_the_parts(mechanisms, tmp_path):
    trusted, test = mechanisms
    detector = Detector.fit(
        jax.random.key(0), linear.loss_fn, linear.params(), trusted, perturbation=Tangent(parameters=""), num_draws=11,
        coupling="peer_information", traces="log", test=test, workdir=tmp_path / "losses",
    )  # fmt: skip
    assert detector.scorer.num_parts == detector.with_coupling("peer_ccc", "log").scorer.num_parts == 2
    traces = open_traces(tmp_path / "losses")
    np.testing.assert_array_equal(traces.part, np.repeat([0, 1], 11))
    known = np.log1p(detector.scorer.trusted.astype(float) / SMALL_LOSS)
    np.testing.assert_allclose(detector.scorer.left_out, leave_one_out("peer_information", known, num_parts=2))
    detector.save(tmp_path / "detector")
    loaded = Detector.load(tmp_path / "detector", linear.loss_fn, linear.params())
    np.testing.assert_array_equal(loaded.score(test).anomaly_score, detector.score_losses(*detector.test).anomaly_score)


def test_a_tangent_does_not_stop_early(mechanisms):
    trusted, _ = mechanisms
    detector = Detector.fit(
        jax.random.key(0), linear.loss_fn, linear.params(), trusted, perturbation=Tangent(), num_draws=8, traces="log"
    )
    with pytest.raises(ValueError, match="detector: all draws of a tangent come of one gradient"):
        Sequential.fit(detector)


def test_a_detector_in_a_folder_goes_on(mechanisms, tmp_path):
    trusted, test = mechanisms
    fit = {"test": test, "perturbation": Tangent(), "num_draws": 20, "workdir": tmp_path / "losses"}
    first = Detector.fit(jax.random.key(0), linear.loss_fn, linear.params(), trusted, **fit)
    again = Detector.fit(jax.random.key(0), linear.loss_fn, linear.params(), trusted, **fit)
    np.testing.assert_array_equal(again.test[0], first.test[0])
    other = fit | {"perturbation": Tangent(0.2)}
    with pytest.raises(ValueError, match="moved"):
        Detector.fit(jax.random.key(0), linear.loss_fn, linear.params(), trusted, **other)
