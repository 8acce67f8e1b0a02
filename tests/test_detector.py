import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from madjax import Detector, Gaussian, Langevin, from_linen, from_nnx
from madjax.losses import ClassificationLoss
from tests.conftest import to_unit


@pytest.fixture(scope="module")
def model(digits_model):
    """A network sure enough of its outputs for a scale to be found."""
    loss_fn, params = digits_model
    sure = jax.tree.map(lambda x: x, params)
    sure["output"]["kernel"] = sure["output"]["kernel"].replace(params["output"]["kernel"].get_value() * 60)
    return loss_fn, sure


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(1).integers(0, 256, (90, 8, 8, 1)).astype(np.uint8)


@pytest.fixture(scope="module")
def fitted(model, images):
    return Detector.fit(jax.random.key(0), *model, {"image": images[:40]}, num_draws=16, layout="host")


def _equal(a, b, rtol=0.0):
    np.testing.assert_allclose(a.anomaly_score, b.anomaly_score, rtol=rtol, atol=rtol)
    np.testing.assert_allclose(a.p_value, b.p_value)
    np.testing.assert_array_equal(a.prediction, b.prediction)
    np.testing.assert_array_equal(a.nearest, b.nearest)


def _chain():
    return Langevin(num_burnin_steps=3, num_chains=2, step_size=1e-4, localization=100.0, batch_size=16)


@pytest.mark.parametrize("perturbation", [Gaussian("relative", antithetic=True), Gaussian("curvature"), _chain()])
@pytest.mark.filterwarnings("ignore:trusted. no example is predicted")
def test_save_load_score(model, images, perturbation, tmp_path):
    sampling = {"image": images[:20], "label": np.arange(20, dtype=np.int32) % 10}
    detector = Detector.fit(
        jax.random.key(0),
        *model,
        {"image": images[:40]},
        sampling=sampling,
        perturbation=perturbation,
        num_draws=8,
        layout="host",
    )
    before = detector.score({"image": images[40:]})
    detector.save(tmp_path / "detector")
    loaded = Detector.load(tmp_path / "detector", *model)
    _equal(loaded.score({"image": images[40:]}), before)
    assert loaded.sample_forwards == detector.sample_forwards
    with pytest.raises(ValueError, match=r"path: .* exists already"):
        detector.save(tmp_path / "detector")
    other = jax.tree.map(lambda x: x * 2, model[1])
    with pytest.raises(ValueError, match=r"params: .* other parameters"):
        Detector.load(tmp_path / "detector", model[0], other)
    with pytest.raises(ValueError, match=r"path: .* holds nothing saved by madjax"):
        Detector.load(tmp_path, *model)


@pytest.mark.filterwarnings("ignore:trusted. no example is predicted")
def test_later_scores_equal_those_at_fit_time(model, images, fitted):
    """Test examples swept together with the trusted ones, against the same ones afterwards, in pieces."""
    together = fitted.sweep({"image": images})[0]
    at_fit_time = fitted.scorer.score(together[:, 40:], np.asarray(fitted.sweep({"image": images[40:]})[1]))
    # logits reach 30, of which float32 rounds the last 2e-6
    np.testing.assert_allclose(together[:, :40], fitted.scorer.trusted, rtol=2e-6, atol=1e-5)
    _equal(fitted.score({"image": images[40:]}), at_fit_time, rtol=1e-3)
    one_by_one = np.r_[[fitted.score({"image": images[i : i + 1]}).anomaly_score[0] for i in range(40, 44)]]
    np.testing.assert_allclose(one_by_one, at_fit_time.anomaly_score[:4], rtol=1e-3, atol=1e-3)


def test_the_same_key_gives_the_same_detector(model, images, fitted):
    again = Detector.fit(jax.random.key(0), *model, {"image": images[:40]}, num_draws=16, layout="host")
    np.testing.assert_array_equal(again.scorer.trusted, fitted.scorer.trusted)
    other = Detector.fit(jax.random.key(1), *model, {"image": images[:40]}, num_draws=16, layout="host")
    assert not np.allclose(other.scorer.trusted, fitted.scorer.trusted)


class LinenNet(linen.Module):
    @linen.compact
    def __call__(self, x, train=False):
        x = linen.Conv(4, (3, 3))(x)
        x = linen.BatchNorm(use_running_average=not train)(x)
        return linen.Dense(5)(jax.nn.relu(x).mean((1, 2)))


@pytest.mark.filterwarnings("ignore:trusted. no example is predicted")
def test_linen_models_and_their_statistics(images):
    module = LinenNet()
    variables = module.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    loss_fn, params = from_linen(module, variables, train_kwargs={"train": True}, preprocess=to_unit)
    assert all(jax.tree.leaves(loss_fn.is_trainable(params)["params"]))
    assert not any(jax.tree.leaves(loss_fn.is_trainable(params)["batch_stats"]))
    batch = loss_fn.label(params, {"image": images})
    logits = module.apply(variables, to_unit(images))
    np.testing.assert_array_equal(batch["label"], np.argmax(logits, -1))
    log_p = jax.nn.log_softmax(logits)  # pyright: ignore
    np.testing.assert_allclose(loss_fn(params, batch), -log_p[np.arange(90), batch["label"]], rtol=1e-5)
    _, moved = loss_fn.drift(params, batch)
    assert not np.allclose(*(jax.tree.leaves(tree["batch_stats"])[0] for tree in (params, moved)))
    detector = Detector.fit(
        jax.random.key(0),
        loss_fn,
        params,
        {"image": images[:30]},
        num_draws=8,
        perturbation=Gaussian(scale=0.1),
        layout="host",
    )
    assert detector.score({"image": images[30:]}).anomaly_score.shape == (60,)


def test_a_loss_function_without_flax():
    """Linear regression in NumPy's terms: no labels to replace, no classes."""

    def loss_fn(params, batch):
        return jnp.square(batch["x"] @ params["w"] - batch["y"])

    rng = np.random.default_rng(0)
    x = rng.normal(size=(80, 4)).astype(np.float32)
    w = np.arange(4, dtype=np.float32)
    examples = {"x": x, "y": x @ w}
    detector = Detector.fit(
        jax.random.key(0), loss_fn, {"w": jnp.asarray(w)}, jax.tree.map(lambda a: a[:60], examples), num_draws=8,
        perturbation=Gaussian(scale=0.1), layout="host",
    )  # fmt: skip
    scores = detector.score(jax.tree.map(lambda a: a[60:], examples))
    assert scores.prediction is None
    assert scores.p_value.shape == (20,)
    with pytest.raises(ValueError, match="trusted_classes: wanted one class for each"):
        detector.with_coupling("class_ccc", "raw")


def test_losses_are_exact_however_small():
    logits = jnp.array([[50.0, 0, -3], [0, 80, 0], [-100, 4, 7], [jnp.inf, 0, 0]], jnp.float32)
    label = jnp.array([0, 1, 0, 0])
    losses = ClassificationLoss(_Given())({}, {"image": logits, "label": label})  # pyright: ignore[reportArgumentType]
    exact = np.logaddexp.reduce(np.array([[-50.0, -53], [-80, -80], [104, 107]]), axis=1)
    np.testing.assert_allclose(losses[:3], np.log1p(np.exp(exact)), rtol=1e-5)
    assert np.isnan(losses[3])  # which the sweep refuses
    slope = jax.grad(lambda x: ClassificationLoss(_Given())({}, {"image": x, "label": label[:3]}).sum())(logits[:3])  # pyright: ignore[reportArgumentType]
    np.testing.assert_allclose(slope, jax.nn.softmax(logits[:3]) - jax.nn.one_hot(label[:3], 3), atol=1e-6)


class _Given:
    """A network whose logits are the images."""

    def apply(self, params, image):
        return image


def test_equal_architectures_share_a_loss(digits_model):
    from madjax.models import DigitsCNN

    other, _ = from_nnx(DigitsCNN(rngs=nnx.Rngs(5)), preprocess=to_unit)
    assert other == digits_model[0]
    assert hash(other) == hash(digits_model[0])


def test_bad_input(model, images):
    loss_fn, params = model
    key, trusted = jax.random.key(0), {"image": images[:40]}

    def fit(*args, **kwargs):
        return Detector.fit(key, *args, **{"num_draws": 8, "layout": "host", **kwargs})

    with pytest.raises(ValueError, match="trusted: wanted a few hundred examples, got 0"):
        fit(loss_fn, params, {"image": images[:0]})
    with pytest.raises(ValueError, match="num_draws: wanted at least 2, got 0"):
        fit(loss_fn, params, trusted, num_draws=0)
    with pytest.raises(ValueError, match="coupling: wanted one of"):
        fit(loss_fn, params, trusted, coupling="nearest")
    with pytest.raises(ValueError, match="fpr: wanted a rate"):
        fit(loss_fn, params, trusted, fpr=0.0)
    with pytest.raises(ValueError, match="are predicted as class"):
        fit(loss_fn, params, {"image": np.repeat(images[:1], 9, 0)}, coupling="class_ccc", traces="raw")
    bad = jax.tree.map(lambda x: x, params)
    bad["conv2"]["kernel"] = bad["conv2"]["kernel"].replace(
        bad["conv2"]["kernel"].get_value().at[0, 0, 0, 0].set(jnp.nan)
    )
    with pytest.raises(FloatingPointError, match="params: conv2/kernel: wanted finite numbers, got nan"):
        fit(loss_fn, bad, trusted)
    floats = images[:40].astype(np.float32)
    floats[7, 0, 0, 0] = np.inf
    with pytest.raises(
        FloatingPointError, match=r"trusted/image: wanted finite numbers, got inf at index \(7, 0, 0, 0\)"
    ):
        fit(loss_fn, params, {"image": floats})
    with pytest.raises(ValueError, match="sampling: wanted labels from 0 to 9, got 10 at index 3"):
        fit(loss_fn, params, trusted, sampling={"image": images[:4], "label": np.array([0, 1, 2, 10])})
    with pytest.raises(ValueError, match=r"scale: .* changes every output"):
        fit(loss_fn, params, trusted, perturbation=Gaussian(scale=1e30))
    with pytest.raises(ValueError, match="no draw changes any loss"):
        fit(lambda p, b: b["x"], {"w": jnp.ones(3)}, {"x": np.ones(9, np.float32)}, perturbation=Gaussian(scale=0.1))
    detector = fit(loss_fn, params, trusted)
    with pytest.raises(
        ValueError, match=r"examples/image: wanted shape \[n, 8, 8, 1\] as in trusted, got \[90, 4, 4, 1\]"
    ):
        detector.score({"image": images[:, :4, :4]})


def test_a_class_that_no_trusted_example_has_is_named(model, images):
    loss_fn, params = model
    classes = np.asarray(loss_fn.label(params, {"image": images})["label"])
    rare = classes[-1]
    detector = Detector.fit(jax.random.key(0), *model, {"image": images[classes != rare]}, num_draws=8, layout="host")
    with pytest.warns(UserWarning, match=f"trusted: no example is predicted as class {rare}, as 1 test examples are"):
        scores = detector.score({"image": images[-1:]})
    assert np.isfinite(scores.anomaly_score).all()
