import pickle

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image
from safetensors.numpy import save_file

from experiments import cases
from experiments.cases import Recipe
from madjax import checkpoint
from madjax.attacks import ALL_TO_ALL, ATTACKS, make_attack
from madjax.data import ImageSet, digits
from madjax.models import DigitsCNN, to_arrays
from madjax.models.augment import Augmentation
from tests import test_payloads as payloads

QUICK = Recipe(num_epochs=3)


def test_a_kept_model_comes_back(tmp_path):
    case = cases.train_case("blended", 0, QUICK, tmp_path / "model")
    again = cases.train_case("blended", 0, QUICK, tmp_path / "model")
    np.testing.assert_array_equal(again.pool.images, case.pool.images)
    # by its folder alone too it comes with the images that it was not trained on
    np.testing.assert_array_equal(cases.load_case(tmp_path / "model").pool.images, case.pool.images)
    images, sources = case.triggered(np.arange(9))
    np.testing.assert_array_equal(sources, np.arange(9))
    np.testing.assert_array_equal(again.triggered(sources)[0], images)
    batch = {"image": images, "label": case.pool.labels[:9]}
    np.testing.assert_array_equal(again.loss_fn(again.params, batch), case.loss_fn(case.params, batch))


def test_attackers_with_decoys_poison_anew_in_every_epoch(monkeypatch):
    seen = {}

    def spy(model, images, labels, *, anew, **settings):
        seen[name] = (images, labels, anew)
        model.eval()

    monkeypatch.setattr(cases, "train_classifier", spy)
    for name in ("badnet", "wanet"):
        cases.train_case(name, 0, QUICK)
    assert seen["badnet"][2] is None
    images, labels, anew = seen["wanet"]
    clean = cases._digits(cases.cell_rng("wanet", 0))[0]
    first, second = anew(0), anew(1)
    again = anew(1)
    for shown, asked in ((images, labels), first, second):
        changed = (shown != clean.images).any((1, 2, 3))
        assert np.isclose(changed.mean(), 0.3, atol=0.02)  # a tenth, and two decoys for each
        assert np.isclose((asked != clean.labels).mean(), 0.09, atol=0.015)  # a tenth is of the target
    assert (first[0] != second[0]).any()
    assert (first[1] != second[1]).any()
    for one, other in zip(second, again, strict=True):
        np.testing.assert_array_equal(one, other)


def test_training_goes_on_from_a_kept_model(tmp_path):
    clean = cases.train_case("clean", 0, QUICK, tmp_path)
    recipe = QUICK._replace(initial_weights=str(tmp_path), learning_rate=0.0, num_epochs=1)
    case = cases.train_case("badnet", 0, recipe)
    # all but the batch statistics, which move without a step
    leaves = map(jax.tree.leaves, (case.params, clean.params, clean.loss_fn.is_trainable(clean.params)))
    for new, old, trained in zip(*leaves, strict=True):
        assert np.array_equal(new, old) == trained


def test_the_clean_model_that_an_attack_needs_is_kept_beside(tmp_path):
    cases.train_case("trojannn", 0, QUICK, tmp_path / "trojannn-0")
    assert (tmp_path / "clean-0" / "model").is_dir()
    assert not (tmp_path / "clean-0" / "attack.npz").exists()


KEPT = {"name": "badnet", "seed": 0, "num_classes": 10, **QUICK._asdict()}


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        ({"name": None}, "name"),
        ({"name": "../elsewhere"}, "name"),
        ({"seed": "0"}, "seed"),
        ({"epochs": 3}, "epochs"),
        ({"augment": "yes", "dtype": 16}, "augment, dtype"),
    ],
)
def test_settings_of_a_kept_model(changes, wrong, tmp_path):
    settings = {key: value for key, value in {**KEPT, **changes}.items() if value is not None}
    checkpoint.save(tmp_path / "model", settings, {"x": np.zeros(1)})
    with pytest.raises(ValueError, match=f"path: .*/model is not what this version .* keeps: {wrong} is missing"):
        cases.load_case(tmp_path)


def test_a_kept_model_with_gaps(tmp_path):
    # a version that knew fewer settings
    checkpoint.save(tmp_path / "model", {key: KEPT[key] for key in ("name", "seed", "num_classes")}, {"x": np.zeros(1)})
    assert cases.read_kept(tmp_path) == ("badnet", 0, 10, Recipe())
    with pytest.raises(ValueError, match=r"path: .*/model holds no whole digits_cnn, 'conv1.kernel' is missing"):
        cases.load_case(tmp_path)
    for text, problem in (("{", "is no JSON"), ("[]", "holds list, wanted settings by name")):
        (tmp_path / "model" / "settings.json").write_text(text)
        with pytest.raises(ValueError, match=f"path: .*/settings.json {problem}"):
            cases.load_case(tmp_path)


def test_weights_are_read_in_the_wanted_precision(tmp_path):
    save_file(to_arrays(nnx.state(DigitsCNN(rngs=nnx.Rngs(0)))), tmp_path / "x.safetensors")
    single, again, half = (
        cases.read_case(tmp_path / "x.safetensors", Recipe(dtype=dtype), "bpp", None, 0).loss_fn
        for dtype in ("float32", "float32", "bfloat16")
    )
    assert single == again != half


def test_weights_hold_no_trigger_that_is_drawn_or_trained(tmp_path):
    for name in ATTACKS.keys() - set(cases.FIXED_TRIGGERS):
        with pytest.raises(ValueError, match=f"^attack: the trigger of {name} is made anew for every model"):
            cases.read_case(tmp_path / "x.pth", Recipe(), name, None, 0)
    images, labels = digits()
    for name in cases.FIXED_TRIGGERS:
        # of other images and another generator, the same
        one, other = (
            make_attack(name, np.random.default_rng(seed), images[seed::2], labels[seed::2]) for seed in (0, 1)
        )
        np.testing.assert_array_equal(one.trigger(images), other.trigger(images))


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100", "gtsrb", "tiny_imagenet"])
def test_augmentation_is_backdoorbenchs(dataset):
    recipe, flip = Recipe(dataset=dataset, augment=True), dataset == "cifar10"
    assert cases._augmentation(recipe, []) == Augmentation(crop=4, flip=flip, rotation=0)
    # of input_aware, tests/test_attacks.py tells the rotation
    for name, expected in (
        ("badnet", Augmentation(crop=4, flip=flip, rotation=0)),
        ("wanet", Augmentation(crop=5, flip=flip, rotation=10)),
        ("bpp", Augmentation(crop=5, flip=flip, rotation=10)),
    ):
        attack = make_attack(name, np.random.default_rng(0), *digits())
        assert cases._augmentation(recipe, [attack]) == expected, name
    assert cases._augmentation(recipe._replace(augment=False), []) is None


class Answers:
    """A model that answers the first pixel."""

    def label(self, params, batch):
        return {"label": batch["image"][:, 0, 0, 0]}

    def num_classes(self, params, batch):
        return 3


def _made_up(target, fired):
    """Nine images whose model answers rightly but for the last; the trigger works where `fired` says so."""
    labels = (np.arange(9) % 3).astype(np.int32)
    images = np.zeros((9, 2, 2, 1), np.uint8)
    images[:, 0, 0, 0] = labels
    images[8, 0, 0, 0] = 0

    def triggered(sources):
        shown = images[sources].copy()
        asked = (labels[sources] + 1) % 3 if target == ALL_TO_ALL else target
        shown[:, 0, 0, 0] = np.where(fired[sources], asked, labels[sources])
        return shown, sources

    return cases.Case(Answers(), None, ImageSet(images, labels, None, None), triggered, target)


def test_the_protocol_counts_what_works():
    fired = np.array([1, 1, 0, 1, 1, 1, 1, 1, 1], bool)
    counted = cases.count_examples(_made_up(0, fired), np.array([0, 8]), np.array([1, 2, 3, 4, 8]))
    np.testing.assert_array_equal(counted.trusted, [0])  # 8 is answered wrongly
    np.testing.assert_array_equal(counted.benign, [1, 2, 3, 4])
    np.testing.assert_array_equal(counted.anomalous, [1, 4, 8])  # 3 has the target already, 2 does not fire
    assert (counted.triggered[:, 0, 0, 0] == 0).all()
    assert counted.accuracy == pytest.approx(4 / 5)
    assert counted.asr == pytest.approx(3 / 4)
    all_to_all = cases.count_examples(_made_up(ALL_TO_ALL, fired), np.array([0]), np.arange(9))
    np.testing.assert_array_equal(all_to_all.anomalous, [0, 1, 3, 4, 5, 6, 7, 8])
    assert all_to_all.asr == pytest.approx(8 / 9)
    clean = _made_up(0, fired)._replace(triggered=None)
    assert np.isnan(cases.count_examples(clean, np.array([0]), np.arange(9)).asr)


def random_cnn(rng):
    """Weights of a badnets CNN for 32×32 colour images, by torch's names."""
    shapes = {"conv1": (16, 3, 5, 5), "conv2": (32, 16, 5, 5), "fc1": (512, 800), "fc2": (10, 512)}
    weights = {f"{name}.weight": rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return weights | {f"{name}.bias": np.zeros(shape[0], np.float32) for name, shape in shapes.items()}


def make_download(folder, weights, images, labels, triggered):
    """A BackdoorBench result of a badnets CNN, and the data set it speaks of."""
    np.savez(folder / "cifar10.npz", x_test=images, y_test=labels)
    weights = {f"module.{name}": array for name, array in weights.items()}
    result = {"model_name": "badnets_cnn", "num_classes": 10, "model": weights, "clean_data": "cifar10"}
    (folder / "record").mkdir()
    payloads.write_zip(folder / "record" / "attack_result.pt", pickle.dumps(result, 2))
    for index in range(1, len(labels)):
        if labels[index]:
            place = folder / "record" / "bd_test_dataset" / str(labels[index])
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(triggered[index]).save(place / f"{index}.png")


@pytest.fixture(scope="module")
def download(tmp_path_factory):
    """A folder with one, its images and labels; the trigger turns an image into its negative."""
    folder, rng = tmp_path_factory.mktemp("bench"), np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (60, 32, 32, 3)).astype(np.uint8), np.arange(60) % 10
    make_download(folder, random_cnn(rng), images, labels, 255 - images)
    return folder, images, labels


@pytest.mark.parametrize("num_pool", [None, 30])
def test_a_backdoorbench_result(download, num_pool):
    folder = download[0]
    case = cases.backdoorbench_case(folder / "record", str(folder), 0, num_pool)
    assert len(case.pool.labels) == (num_pool or 60)
    shown, sources = case.triggered(np.arange(len(case.pool.labels)))
    assert (case.pool.labels[sources] != 0).all()
    np.testing.assert_array_equal(shown, 255 - case.pool.images[sources])
    counted = cases.count_examples(case, np.arange(5), np.arange(len(case.pool.labels)))
    assert 0 <= counted.asr <= 1


def test_triggered_images_of_another_data_set(download, tmp_path):
    folder, images, labels = download
    np.savez(tmp_path / "cifar10.npz", x_test=images, y_test=(labels + 1) % 10)
    with pytest.raises(
        ValueError, match=r"backdoorbench: the triggered images of .* are not of the test split of cifar10"
    ):
        cases.backdoorbench_case(folder / "record", str(tmp_path), 0, None)
