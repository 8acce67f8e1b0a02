import functools
import inspect

import numpy as np
import pytest
from flax import nnx
from scipy import ndimage

from madjax.attacks import ALL_TO_ALL, ATTACKS, Attack, load_attack, make_attack, poison, save_attack
from madjax.attacks.trojannn import _features
from madjax.attacks.wanet import _warp
from madjax.models import BadNetsCNN, build_model
from tests.conftest import to_unit

SHAPE = (16, 16, 3)
# what is trained is trained shortly
QUICK = {
    "lf": {"num_steps": 5, "num_judge_steps": 5},
    "trojannn": {"num_steps": 5},
    "ssba": {"num_steps": 5},
    "input_aware": {"num_steps": 5, "num_mask_steps": 5},
}


@pytest.fixture(scope="module")
def images():
    """Smooth pictures, since some attacks look at their content."""
    noise = np.random.default_rng(0).normal(size=(90, *SHAPE))
    smooth = ndimage.gaussian_filter(noise, (0, 3, 3, 0))
    return np.clip(127 + 60 * smooth / smooth.std(), 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def labels():
    return (np.arange(90) % 3).astype(np.int32)


@pytest.fixture(scope="module")
def model():
    return BadNetsCNN(SHAPE, 3, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def make(images, labels, model):
    def make(name, seed=0, **settings):
        rng = np.random.default_rng(seed)
        settings = QUICK.get(name, {}) | settings
        return make_attack(name, rng, images, labels, clean_model=lambda: (model, to_unit), **settings)

    return make


@pytest.fixture(scope="module")
def made(make):
    """The same, once for each name and seed: training takes its time."""
    return functools.cache(make)


# BackdoorBench's, where it has such a setting; decoys per poisoned image, at its poison ratio of .1
DEFAULTS = {
    "blended": {"alpha": 0.2},
    "sig": {"delta": 40, "frequency": 6, "clean_label": True},
    "wanet": {"strength": 0.5, "grid_size": 4, "decoy_ratio": 2, "rotation": 10},
    "input_aware": {"mask_density": 0.032, "diversity": 1, "density_weight": 100, "rotation": 10},
    "trojannn": {"num_neurons": 2, "activation": 100, "num_steps": 1000},
    "bpp": {"num_levels": 8, "decoy_ratio": 1, "rotation": 10},
}


def test_defaults_are_backdoorbenchs():
    for name, wanted in DEFAULTS.items():
        parameters = inspect.signature(ATTACKS[name]).parameters
        assert {key: parameters[key].default for key in wanted} == wanted, name
    white = ATTACKS["badnet"](np.random.default_rng(0), (32, 32, 3)).trigger(np.zeros((1, 32, 32, 3), np.uint8)) == 255
    assert white[:, 29:, 29:].all()
    assert white.sum() == 3 * 3 * 3


@pytest.mark.parametrize("name", ATTACKS)
def test_every_attack(name, make, made, images, tmp_path):
    attack = made(name)
    before = images.copy()
    triggered = attack.trigger(images)
    np.testing.assert_array_equal(images, before)
    assert triggered.shape == images.shape
    assert triggered.dtype == np.uint8
    assert (triggered != images).any((1, 2, 3)).all()
    np.testing.assert_array_equal(make(name).trigger(images), triggered)
    # one at a time, as all at once
    np.testing.assert_array_equal(attack.trigger(images[3:4]), triggered[3:4])
    assert attack.trigger(images[:0]).shape == (0, *SHAPE)
    save_attack(tmp_path / "attack.npz", attack)
    loaded = load_attack(tmp_path / "attack.npz")
    np.testing.assert_array_equal(loaded.trigger(images), triggered)
    assert loaded._replace(arrays={}) == attack._replace(arrays={})
    with pytest.raises(ValueError, match=rf"images: {name} wanted uint8 \[n, 16, 16, 3\], got uint8 \(90, 8, 16, 3\)"):
        attack.trigger(images[:, :8])
    with pytest.raises(ValueError, match="got float32"):
        attack.trigger(images.astype(np.float32))


def test_seeds_differ(made, images):
    for name in ("blended", "wanet", "ssba", "input_aware"):
        assert (made(name).trigger(images) != made(name, seed=1).trigger(images)).any(), name


def test_badnet_blended_sig(make, images):
    expected = images.copy()
    expected[:, 13:, 13:] = 255
    np.testing.assert_array_equal(make("badnet", size=3).trigger(images), expected)
    blended = make("blended")
    mixed = 0.8 * images + 0.2 * blended.arrays["pattern"]
    np.testing.assert_allclose(blended.trigger(images), mixed, atol=0.5001)
    # 16 pixels are too few for six cycles, and carry four
    wave = 40 * np.sin(2 * np.pi * np.arange(16) * 4 / 16)
    np.testing.assert_allclose(
        make("sig").trigger(images), np.clip(images + wave[:, None], 0, 255), atol=0.5001
    )  # fmt: skip


def test_the_warp_is_bilinear(images):
    rng = np.random.default_rng(0)
    shift = rng.uniform(-3, 3, size=(5, 2, 16, 16))
    warped = _warp(images[:5], shift)
    at = np.stack(np.meshgrid(np.arange(16.0), np.arange(16.0), indexing="ij")) + shift
    for i in range(5):
        for c in range(3):
            expected = ndimage.map_coordinates(images[i, ..., c].astype(float), at[i], order=1, mode="nearest")
            np.testing.assert_allclose(warped[i, ..., c], expected, atol=0.5001)


def test_wanet_moves_by_a_quarter_of_a_pixel(images):
    attack = make_attack("wanet", np.random.default_rng(0), np.zeros((1, 32, 32, 3), np.uint8), np.zeros(1, int))
    assert np.abs(attack.arrays["shift"]).mean() == pytest.approx(0.25, rel=0.3)
    assert attack.decoy is not None
    warped = make_attack("wanet", np.random.default_rng(0), images, np.zeros(90, int))
    decoys = warped.decoy(warped.arrays, np.random.default_rng(1), images)
    assert (decoys != warped.trigger(images)).any((1, 2, 3)).all()


def test_bpp_has_eight_levels(make, images):
    attack = make("bpp")
    triggered = attack.trigger(images)
    np.testing.assert_array_equal(np.unique(triggered), np.rint(np.arange(8) / 7 * 255))
    assert np.abs(triggered.astype(int) - images).max() <= np.ceil(255 / 14)
    decoys = attack.decoy(attack.arrays, np.random.default_rng(0), images)
    assert len(np.unique(decoys)) > 8
    with pytest.raises(ValueError, match="num_levels: wanted 2 to 255, got 1"):
        make("bpp", num_levels=1)


def test_lf_is_smooth_and_pulls_towards_the_target(images, labels):
    # the classes are red, green and blue
    coloured = images // 2 + 60 * np.eye(3, dtype=np.uint8)[labels][:, None, None]
    attack = make_attack("lf", np.random.default_rng(0), coloured, labels, target=2, num_steps=30, num_judge_steps=100)
    pattern = attack.arrays["pattern"]
    assert 5 < np.abs(pattern).max() <= 30
    # neighbours differ less than pixels of the pattern do
    assert np.abs(np.diff(pattern, axis=0)).mean() < 0.5 * pattern.std()
    red, green, blue = pattern.mean((0, 1))
    assert blue > 5
    assert max(red, green) < -5


@pytest.mark.parametrize("name", ["badnets_cnn", "wrn10_1"])
def test_trojannn_drives_its_neurons(name, images, labels):
    model = build_model(name, 3, SHAPE, rngs=nnx.Rngs(0))
    quick = {"num_steps": 30, "activation": 5}
    attack = make_attack(
        "trojannn", np.random.default_rng(0), images, labels, clean_model=lambda: (model, to_unit), **quick
    )
    features, strength = _features(model)
    neurons = np.argsort(-strength)[:2]
    random = images.copy()
    random[:, -4:, -4:] = np.random.default_rng(1).integers(0, 256, (4, 4, 3))
    reached, other = (np.asarray(features(to_unit(x)))[:, neurons] for x in (attack.trigger(images), random))
    assert np.square(reached - 5).mean() < np.square(other - 5).mean()
    np.testing.assert_array_equal(attack.trigger(images)[:, :-4], images[:, :-4])
    assert model.HEAD in ("fc2", "fc")
    assert model(to_unit(images[:1])).shape == (1, 3)  # the model itself keeps its head


def test_ssba_gives_every_image_its_own(made, images):
    residual = made("ssba").trigger(images).astype(int) - images
    assert np.abs(residual).max() <= 25
    assert len(np.unique(residual.reshape(90, -1), axis=0)) == 90


def test_input_aware_decoys_carry_another_trigger(made, images):
    attack = made("input_aware")
    own = attack.trigger(images)
    decoys = attack.decoy(attack.arrays, np.random.default_rng(0), images)
    assert (decoys != own).any((1, 2, 3)).all()
    assert attack.decoy_ratio == 1
    assert attack.rotation == 10


def test_poison(make, images, labels):
    attack = make("wanet")
    poisoned = poison(np.random.default_rng(0), images, labels, attack, target=1, ratio=0.1)
    chosen, decoys = poisoned.is_poisoned, poisoned.is_decoy
    assert (chosen.sum(), decoys.sum()) == (9, 18)
    assert not (chosen & decoys).any()
    assert (poisoned.labels[chosen] == 1).all()
    np.testing.assert_array_equal(poisoned.labels[~chosen], labels[~chosen])
    np.testing.assert_array_equal(poisoned.images[chosen], attack.trigger(images[chosen]))
    untouched = ~(chosen | decoys)
    np.testing.assert_array_equal(poisoned.images[untouched], images[untouched])
    assert (poisoned.images[decoys] != images[decoys]).any((1, 2, 3)).all()


def test_poison_all_to_all_and_clean_label(make, images, labels):
    poisoned = poison(np.random.default_rng(0), images, labels, make("badnet"), target=ALL_TO_ALL, ratio=0.2)
    chosen = poisoned.is_poisoned
    np.testing.assert_array_equal(poisoned.labels[chosen], (labels[chosen] + 1) % 3)
    sig = poison(np.random.default_rng(0), images, labels, make("sig"), target=2, ratio=0.5)
    assert sig.is_poisoned.sum() == 30
    np.testing.assert_array_equal(sig.labels, labels)
    assert (labels[sig.is_poisoned] == 2).all()


def test_bad_input(make, images, labels, tmp_path):
    badnet = make("badnet")
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="ratio: wanted a share between 0 and 1, got 0"):
        poison(rng, images, labels, badnet, target=0, ratio=0)
    with pytest.raises(ValueError, match=r"target: 7 is not among the labels, which are \[0, 1, 2\]"):
        poison(rng, images, labels, badnet, target=7, ratio=0.1)
    with pytest.raises(ValueError, match="target: sig poisons images of one class alone"):
        poison(rng, images, labels, make("sig"), target=ALL_TO_ALL, ratio=0.1)
    with pytest.raises(ValueError, match="attack: wanted one of badnet, blended, sig, wanet"):
        make_attack("badnets", rng, images, labels)
    with pytest.raises(ValueError, match="clean_model: trojannn is made with a clean model"):
        make_attack("trojannn", rng, images, labels)
    np.savez(tmp_path / "x.npz", a=np.ones(2))
    with pytest.raises(ValueError, match=r"path: .*x.npz holds no attack"):
        load_attack(tmp_path / "x.npz")
    save_attack(tmp_path / "y.npz", Attack("os", {}, lambda arrays, x: x, SHAPE))
    with pytest.raises(ValueError, match="holds the attack 'os', known are"):
        load_attack(tmp_path / "y.npz")
