"""Baselines that ask the model again: of changed inputs, of gradients, of the Hessian."""

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.colors import hsv_to_rgb, rgb_to_hsv

from madjax import from_linen, from_nnx
from madjax.baselines import STRIP, Baseline, GradientCosine, GradientNorm, Influence, Mahalanobis, Model, ScaleUp, TeCo
from madjax.baselines.baseline import rows
from madjax.baselines.corruptions import CORRUPTIONS, corrupted
from madjax.baselines.gradient import own_loss
from madjax.baselines.influence import leading_eigenvectors
from madjax.data import load_images, parse_normalization
from madjax.interop.weights import load_weights
from madjax.metrics import auroc
from madjax.models import from_torch
from tests.conftest import to_unit
from tests.test_baselines import Mlp

TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(scope="module")
def images(examples):
    return examples["image"]


@pytest.fixture(scope="module")
def weights(images):
    """Of a model that is sure of little, but not of nothing."""
    variables = Mlp().init(jax.random.key(0), to_unit(images[:1]))
    return jax.tree.map(lambda leaf: np.asarray(4 * leaf, np.float64), variables["params"])


@pytest.fixture(scope="module")
def model(weights):
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), weights)
    return Model(*from_linen(Mlp(), {"params": params}, preprocess=to_unit))


def forward(weights, images):
    """In NumPy: the flat image, the hidden layer and the probabilities."""
    x = images.reshape(len(images), -1) / 255
    hidden = np.maximum(x @ weights["first"]["kernel"] + weights["first"]["bias"], 0)
    logits = hidden @ weights["last"]["kernel"] + weights["last"]["bias"]
    p = np.exp(logits - logits.max(1, keepdims=True))
    return x, hidden, p / p.sum(1, keepdims=True)


def test_strip_is_a_loop_over_partners(model, weights, images):
    trusted, test = images[:9], images[5:20]
    statistic = STRIP(num_overlays=6)
    found = statistic.fit({})(statistic.observe(model, test, trusted))
    order = np.random.default_rng(0).permutation(9)[:7]
    for image, value in zip(test, found, strict=True):
        partners = [trusted[j] for j in order if not np.array_equal(trusted[j], image)][:6]
        mixed = np.stack([np.clip(image.astype(int) + partner, 0, 255) for partner in partners])
        p = forward(weights, mixed)[2]
        np.testing.assert_allclose(value, (p * np.log(p)).sum(1).mean(), **TOLERANCE)


def test_strip_does_not_mix_a_trusted_image_with_itself(model, weights, images):
    entropy = STRIP().observe(model, images[:2], images[:2])["entropy"]
    p = forward(weights, np.clip(images[[0]].astype(int) + images[1], 0, 255))[2]
    np.testing.assert_allclose(entropy, -(p * np.log(p)).sum(), rtol=1e-4)


def test_scale_up_is_a_loop_over_scales(model, weights, images):
    # so few pixels, and so dark, that images differ and not all scales clip all pixels
    dark = np.where(np.random.default_rng(0).random(images.shape) < 0.1, images // 5, 0).astype(np.uint8)
    trusted, test = dark[:20], dark[20:]

    def consistency(image):
        answers = [forward(weights, np.clip(image[None] * float(n), 0, 255))[2].argmax() for n in (1, 3, 5, 7, 9, 11)]
        return np.mean([answer == answers[0] for answer in answers[1:]]), answers[0]

    known = [consistency(image) for image in trusted]
    statistic = ScaleUp()
    found = statistic.fit(statistic.observe(model, trusted, trusted))(statistic.observe(model, test, trusted))
    assert len(np.unique(found)) > 2
    for image, value in zip(test, found, strict=True):
        share, label = consistency(image)
        own = [one for one, other in known if other == label]
        own = own if len(own) > 1 else [one for one, _ in known]
        np.testing.assert_allclose(value, (share - np.mean(own)) / max(np.std(own), 0.2), **TOLERANCE)


def test_teco_is_backdoorbenchs_deviation(model, weights, images):
    statistic = TeCo()
    found = statistic.fit({})(statistic.observe(model, images[:12], images))
    assert len(np.unique(found)) > 2
    for index, value in enumerate(found):
        own, severities = forward(weights, images[[index]])[2].argmax(), []
        for name in CORRUPTIONS:
            answers = [forward(weights, corrupted(name, images[[index]], s, 0))[2].argmax() for s in range(1, 6)]
            severities.append(next((s for s, answer in enumerate(answers, 1) if answer != own), 6))
        np.testing.assert_allclose(value, np.std(severities), **TOLERANCE)


@pytest.mark.parametrize("name", list(CORRUPTIONS))
def test_corruptions(name):
    """The same alone as among others, stronger with severity, and in place: grey stays near grey on average."""
    rng = np.random.default_rng(0)
    images = rng.integers(60, 190, (3, 16, 16, 3)).astype(np.uint8)
    changes = []
    for severity in (1, 5):
        changed = corrupted(name, images, severity, seed=0)
        np.testing.assert_array_equal(corrupted(name, images[1:2], severity, seed=0), changed[1:2])
        changes.append(np.abs(changed.astype(float) - images).mean())
        if name != "brightness":
            assert abs(changed.mean() - images.mean()) < 25
    assert changes[1] > changes[0] > 0


def test_brightness_raises_the_value_of_hsv():
    images = np.random.default_rng(0).random((2, 4, 4, 3))
    hsv = rgb_to_hsv(images)
    hsv[..., 2] = np.minimum(hsv[..., 2] + 0.2, 1)
    np.testing.assert_allclose(CORRUPTIONS["brightness"](images, 2, np.random.default_rng(0)), hsv_to_rgb(hsv))


def test_images_that_cannot_be_changed_are_refused(model, images):
    for statistic in (STRIP(), ScaleUp(), TeCo()):
        with pytest.raises(ValueError, match=r"^image: wanted uint8 \[n, height, width, channels\] .* float64"):
            statistic.observe(model, images / 255, images / 255)


def gradients_by_hand(weights, images):
    """Backpropagation in NumPy, parameters in the order of their names: of the first layer, then of the last."""
    x, hidden, p = forward(weights, images)
    error = p.copy()
    error[np.arange(len(p)), p.argmax(1)] -= 1
    inner = (error @ weights["last"]["kernel"].T) * (hidden > 0)
    count = len(images)
    parts = [inner, np.einsum("ni,nj->nij", x, inner), error, np.einsum("ni,nj->nij", hidden, error)]
    return [part.reshape(count, -1) for part in parts]


@pytest.mark.parametrize("last_layer", [False, True])
def test_gradients_are_backpropagation_by_hand(last_layer, model, weights, images):
    trusted, test = images[:20], images[20:]
    known, new = (
        np.concatenate(gradients_by_hand(weights, some)[2 if last_layer else 0 :], axis=1) for some in (trusted, test)
    )
    norm = GradientNorm(last_layer=last_layer)
    found = norm.fit({})(norm.observe(model, test, trusted))
    np.testing.assert_allclose(found, np.linalg.norm(new, axis=1), **TOLERANCE)
    cosine = GradientCosine(last_layer=last_layer)
    seen = cosine.observe(model, trusted, trusted)
    for kept in (np.arange(20), np.arange(0, 20, 3)):  # of all, and of those that a fold keeps
        mean = known[kept].mean(0)
        wanted = -(new @ mean) / np.linalg.norm(new, axis=1) / np.linalg.norm(mean)
        found = cosine.fit(rows(seen, kept))(cosine.observe(model, test, trusted))
        np.testing.assert_allclose(found, wanted, **TOLERANCE)


def test_the_gradient_of_a_sure_model_is_not_left_to_rounding():
    logits = np.array([0.0, 20.0, 1.0])
    wanted = np.exp(logits - 20)[[0, 2]]
    found = jax.grad(own_loss)(jnp.asarray(logits, jnp.float32))
    np.testing.assert_allclose(found, [wanted[0], -wanted.sum(), wanted[1]], rtol=1e-5)


def test_arnoldi_finds_the_leading_eigenvectors():
    rng = np.random.default_rng(0)
    axes, _ = np.linalg.qr(rng.normal(size=(80, 80)))
    values = np.r_[-3.0, np.logspace(2, -3, 79)]
    matrix = axes * values @ axes.T
    found, vectors = leading_eigenvectors(lambda vector: matrix @ vector, 80, 40)
    np.testing.assert_allclose(np.sort(found)[-8:], np.sort(values)[-8:], rtol=1e-4)
    np.testing.assert_allclose(matrix @ vectors[:, -1], found[-1] * vectors[:, -1], atol=1e-3)
    # of a matrix of rank one there is nothing more to find
    rank_one = np.outer(axes[0], axes[0])
    few, _ = leading_eigenvectors(lambda vector: rank_one @ vector, 80, 40)
    assert len(few) <= 4
    np.testing.assert_allclose(few.max(), 1, rtol=1e-4)


def test_influence_is_that_of_the_whole_hessian(model, weights, images):
    """Against JAX's own Hessian, all of it, and NumPy's eigenvectors."""
    trusted, test = images[:30], images[30:]
    flat, build = jax.flatten_util.ravel_pytree(model.params)

    def loss(vector):
        logits = model.loss_fn.module.apply(build(vector), jnp.asarray(trusted))
        own = jnp.take_along_axis(logits, logits.argmax(1, keepdims=True), axis=1)[:, 0]
        return (jax.nn.logsumexp(logits, axis=1) - own).mean()

    values, vectors = np.linalg.eigh(np.asarray(jax.hessian(loss)(flat), np.float64))
    values, vectors = values[-4:], vectors[:, -4:]
    known, new = (np.concatenate(gradients_by_hand(weights, some), axis=1) for some in (trusted, test))

    def unit(x):
        x = x @ vectors / np.sqrt(values)
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    wanted = -np.sort(unit(new) @ unit(known).T, axis=1)[:, -10:].mean(1)
    statistic = Influence(num_iterations=60, num_eigenvectors=4)
    found = statistic.fit(statistic.observe(model, trusted, trusted))(statistic.observe(model, test, trusted))
    np.testing.assert_allclose(found, wanted, atol=2e-3)


def test_mahalanobis_on_far_ood_is_in_line_with_the_literature(shared_data):
    """Published are about .9 on CIFAR-10, by a ResNet-18 and 50,000 examples; here a ResNet-20 and 300."""
    network = from_torch(
        "resnet20", load_weights(shared_data / "checkpoints" / "clean_resnet20_cifar10.th"), (32, 32, 3)
    )
    loss_fn, params = from_nnx(network, preprocess=parse_normalization("0.485,0.456,0.406/0.229,0.224,0.225"))
    images = load_images("cifar10", "test", data_dir=shared_data, max_examples=500).images
    with np.load(shared_data / "textures32.npz") as file:
        textures = next(value for value in file.values() if value.ndim == 4)[::6]
    baseline = Baseline.fit(Mahalanobis(), loss_fn, params, {"image": images[:300]})
    scores = baseline.score({"image": np.concatenate([images[300:], textures])})
    found = auroc(scores.anomaly_score[:200], scores.anomaly_score[200:])
    print(f"AUROC {found:.3f}")
    assert found > 0.8
