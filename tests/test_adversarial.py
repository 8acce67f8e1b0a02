"""Attacks on models whose best adversarial example is known, and on a small network with its detector."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from madjax import Detector, Gaussian, from_nnx
from madjax.attacks.adversarial import auto_pgd, fgsm, pgd
from madjax.attacks.evasion import _couple, _Coupling, adaptive_pgd
from madjax.coupling import COUPLINGS, couplings
from madjax.sampling import TangentDraws
from tests.conftest import to_unit

SHAPE = (4, 4, 1)


class Flat(nnx.Module):
    """Logits that are linear in the pixels."""

    def __init__(self, num_classes):
        self.linear = nnx.Linear(16, num_classes, rngs=nnx.Rngs(0))

    def __call__(self, image):
        return self.linear(image.reshape(len(image), -1))


@pytest.fixture(scope="module")
def problem():
    """A linear model of two classes, images far from 0 and 255, its own answers as labels, and its weights."""
    model = Flat(2)
    images = np.random.default_rng(0).integers(60, 196, (21, *SHAPE)).astype(np.uint8)
    loss_fn, params = from_nnx(model, preprocess=to_unit)
    labels = np.asarray(loss_fn.label(params, {"image": images})["label"])
    return loss_fn, params, images, labels, np.asarray(model.linear.kernel.get_value())


def best(problem, epsilon):
    """The ∞-norm ball's worst image of a linear model: every pixel by `epsilon` against the label's weight."""
    *_, images, labels, kernel = problem
    away = np.sign(kernel[:, 1 - labels] - kernel[:, labels]).T.reshape(-1, *SHAPE)
    return (images + epsilon * away).astype(np.uint8)


def test_fgsm_and_pgd_find_the_worst_image_of_a_linear_model(problem):
    loss_fn, params, images, labels, _ = problem
    key = jax.random.key(0)
    made = {
        "fgsm": fgsm(loss_fn, params, images, labels, epsilon=20),
        "pgd": pgd(key, loss_fn, params, images, labels, epsilon=20, step_size=5, num_steps=12),
        "margin": pgd(key, loss_fn, params, images, labels, epsilon=20, step_size=5, num_steps=12, objective="margin"),
        "auto": auto_pgd(key, loss_fn, params, images, labels, epsilon=20, num_steps=20),
    }
    prediction = np.asarray(loss_fn.label(params, {"image": best(problem, 20)})["label"])
    assert 0 < (prediction != labels).sum() < len(labels)  # some can be fooled and some cannot
    for name, attacked in made.items():
        np.testing.assert_array_equal(attacked.images, best(problem, 20), err_msg=name)
        np.testing.assert_array_equal(attacked.fooled, prediction != labels, err_msg=name)
        np.testing.assert_array_equal(attacked.prediction, prediction, err_msg=name)


def test_the_2_norm_goes_along_the_weights(problem):
    loss_fn, params, images, labels, kernel = problem
    attacked = pgd(jax.random.key(0), loss_fn, params, images, labels, norm="2", epsilon=90, step_size=30, num_steps=20)
    along = (kernel[:, 1 - labels] - kernel[:, labels]).T
    change = attacked.images.reshape(21, -1).astype(float) - images.reshape(21, -1)
    # up to rounding, and to what is left to go after so many steps
    np.testing.assert_allclose(change, 90 * along / np.linalg.norm(along, axis=1, keepdims=True), atol=1.2)


def test_targeted_attacks_reach_their_target_and_others_do_not_aim():
    loss_fn, params = from_nnx(Flat(5), preprocess=to_unit)
    images = np.random.default_rng(1).integers(60, 196, (13, *SHAPE)).astype(np.uint8)
    labels = np.asarray(loss_fn.label(params, {"image": images})["label"])
    targets = (labels + 1) % 5
    key = jax.random.key(0)
    for attacked in (
        fgsm(loss_fn, params, images, labels, epsilon=120, targets=targets),
        pgd(key, loss_fn, params, images, labels, epsilon=120, step_size=30, targets=targets),
        auto_pgd(key, loss_fn, params, images, labels, epsilon=120, num_steps=20, num_restarts=2, targets=targets),
    ):
        np.testing.assert_array_equal(attacked.fooled, attacked.prediction == targets)
        assert attacked.fooled.mean() > 0.7
    untargeted = pgd(key, loss_fn, params, images, labels, epsilon=120, step_size=30)
    assert untargeted.fooled.all()
    assert (untargeted.prediction != targets).any()


@pytest.mark.parametrize("norm", ["inf", "2"])
def test_changes_stay_in_the_ball_and_blocks_do_not_matter(problem, norm):
    loss_fn, params, images, labels, _ = problem
    images, labels = images[:11].copy(), labels[:11]
    images[0], images[1] = 0, 255
    settings = {"norm": norm, "epsilon": 9.5, "step_size": 4, "num_steps": 3}
    whole = pgd(jax.random.key(1), loss_fn, params, images, labels, **settings)
    assert whole.images.dtype == np.uint8
    change = whole.images.astype(float) - images
    size = np.abs(change).max() if norm == "inf" else np.sqrt(np.square(change).sum((1, 2, 3))).max()
    assert size <= (9 if norm == "inf" else 9.5 + 2)  # rounding 16 pixels moves by 2 at most
    assert size > 6
    blocks = pgd(jax.random.key(1), loss_fn, params, images, labels, **settings, batch_size=4)
    # a pixel may round the other way
    assert np.abs(blocks.images.astype(int) - whole.images).max() <= 1
    np.testing.assert_array_equal(blocks.fooled, whole.fooled)


def test_a_restart_leaves_alone_what_is_fooled(problem):
    loss_fn, params, images, labels, _ = problem
    key = jax.random.key(0)
    one = auto_pgd(key, loss_fn, params, images, labels, epsilon=20, num_steps=4)
    more = auto_pgd(key, loss_fn, params, images, labels, epsilon=20, num_steps=4, num_restarts=3, batch_size=8)
    np.testing.assert_array_equal(more.images[one.fooled], one.images[one.fooled])
    assert more.fooled.sum() >= one.fooled.sum() > 0


@pytest.fixture(scope="module")
def detector():
    loss_fn, params = from_nnx(Flat(3), preprocess=to_unit)
    trusted = {"image": np.random.default_rng(2).integers(0, 256, (37, *SHAPE)).astype(np.uint8)}
    return Detector.fit(
        jax.random.key(0), loss_fn, params, trusted, perturbation=Gaussian(scale=0.2), num_draws=6, layout="host"
    )


@pytest.mark.parametrize("name", ["peer_information", "peer_sum", "class_profile"])
def test_a_coupling_without_a_gradient_is_refused(detector, name):
    images, labels = np.zeros((3, *SHAPE), np.uint8), np.zeros(3, np.int32)
    other = detector.with_coupling(name, "log")
    with pytest.raises(ValueError, match=f"detector: the attack has no gradient of the coupling '{name}'"):
        adaptive_pgd(jax.random.key(0), other, images, labels, weight=0.5, num_draws=2)


def test_draws_without_parameters_are_refused(detector):
    drawn = (True,) * len(jax.tree.leaves(detector.params))
    draws = TangentDraws(jax.random.key(0), detector.params, jnp.float32(0.3), drawn, 8)
    images, labels = np.zeros((3, *SHAPE), np.uint8), np.zeros(3, np.int32)
    with pytest.raises(ValueError, match="detector: the attack passes images through drawn parameters, and a tangent"):
        adaptive_pgd(
            jax.random.key(0), dataclasses.replace(detector, draws=draws), images, labels, weight=0.5, num_draws=2
        )


@pytest.mark.parametrize(
    "name", [name for name in COUPLINGS if name not in ("peer_information", "peer_sum", "class_profile")]
)
@pytest.mark.parametrize("traces", ["whitened", "margins", "plain_margins", "log", "raw"])
def test_the_coupling_that_is_attacked_is_the_detectors(detector, name, traces):
    classes = np.arange(37) % 3
    scorer = dataclasses.replace(detector.with_coupling("topk_ccc", traces).scorer, coupling=name)
    scorer = dataclasses.replace(scorer, trusted_classes=classes)
    losses = scorer.trusted[:, :9] * 1.3 + 0.01
    wanted = couplings(name, scorer.map(scorer.trusted), scorer.map(losses), classes)
    got = _couple(name, traces, _Coupling.of(scorer), jnp.asarray(losses, jnp.float32))
    np.testing.assert_allclose(got, wanted, rtol=2e-3, atol=2e-4)


def test_the_adaptive_attack_lowers_the_score(detector):
    images = np.random.default_rng(3).integers(0, 256, (40, *SHAPE)).astype(np.uint8)
    labels = np.asarray(detector.loss_fn.label(detector.params, {"image": images})["label"])
    made = {
        weight: adaptive_pgd(
            jax.random.key(0), detector, images, labels, weight=weight, num_draws=4, epsilon=90, step_size=10,
            num_steps=25,
        )
        for weight in (0.0, 0.5)
    }  # fmt: skip
    assert made[0.0].fooled.mean() > 0.9
    both = made[0.0].fooled & made[0.5].fooled
    assert both.mean() > 0.9
    plain, adapted = (detector.score({"image": made[weight].images[both]}).anomaly_score for weight in (0.0, 0.5))
    assert adapted.mean() < plain.mean() - 0.02


def no_gradient(image):
    return jnp.round(image.astype("float32") / 255)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epsilon": 8 / 255}, "epsilon: wanted 1 to 255, in levels of 0..255 .* of 0..1 as it seems: wanted 8"),
        ({"epsilon": 300}, "epsilon: wanted 1 to 255"),
        ({"epsilon": float("nan")}, "epsilon: wanted 1 to 255"),
        ({"norm": "1"}, "norm: wanted inf or 2, got '1'"),
        ({"step_size": 0}, "step_size: wanted a positive number"),
        ({"num_steps": 0}, "num_steps: wanted at least 1"),
        ({"images": np.zeros((2, *SHAPE), np.float32)}, r"images: wanted uint8 \[n, height, width, channels\], got f"),
        ({"labels": np.zeros(3, int)}, r"labels: wanted one for each of 21 images, got \(3,\)"),
        ({"targets": np.zeros(3, int)}, r"targets: wanted one for each of 21 images, got \(3,\)"),
        ({"loss_fn": lambda params, batch: 0}, "loss_fn: wanted one of from_nnx or from_linen"),
        ({"loss_fn": "rounds"}, "loss_fn: the gradient by the image is zero for all of 21 images"),
    ],
)
def test_bad_input(problem, settings, message):
    loss_fn, params, images, labels, _ = problem
    given = {"loss_fn": loss_fn, "params": params, "images": images, "labels": labels} | settings
    if given["loss_fn"] == "rounds":
        given["loss_fn"], given["params"] = from_nnx(Flat(2), preprocess=no_gradient)
    with pytest.raises(ValueError, match=message):
        pgd(jax.random.key(0), **given)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight": 2}, "weight: wanted 0 to 1, got 2"),
        ({"num_draws": 7}, "num_draws: wanted 1 to the detector's 6, got 7"),
        ({"num_draws": 3, "epsilon": 0.03}, "epsilon: wanted 1 to 255"),
    ],
)
def test_bad_input_of_the_adaptive_attack(detector, problem, settings, message):
    with pytest.raises(ValueError, match=message):
        adaptive_pgd(jax.random.key(0), detector, problem[2], problem[3], **settings)
