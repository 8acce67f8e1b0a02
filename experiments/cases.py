"""Models to try a detector on: trained on the spot with or without a backdoor, read from a file, or published.

A model trained here is kept in a folder of its own, with the attack, and read back from there.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from madjax import checkpoint, from_nnx
from madjax.attacks import (
    ATTACKS,
    Attack,
    badnet,
    load_attack,
    make_attack,
    poison,
    poisoned_labels,
    save_attack,
)
from madjax.attacks.trojannn import apply as stamp
from madjax.data import NORMALIZATIONS, ImageSet, digits, load_images, parse_normalization, split_by_class
from madjax.interop.backdoorbench import load_backdoorbench
from madjax.interop.guard import shown
from madjax.interop.weights import load_weights
from madjax.models import MODELS, build_model, from_arrays, from_torch, to_arrays, train_classifier
from madjax.models.augment import Augmentation


class Case(NamedTuple):
    """A model, and a pool of images that it was not trained on.

    Attributes:
      loss_fn, params: the model.
      pool: the images.
      triggered: indices of the pool -> their images with the trigger, and those indices for which there is one; None
        for a clean model.
      target: the class that the trigger asks for, or `ALL_TO_ALL`.
    """

    loss_fn: Any
    params: Any
    pool: ImageSet
    triggered: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]] | None
    target: int

    def predict(self, images: np.ndarray) -> np.ndarray:
        """Classes `[n]` of uint8 images."""
        return np.asarray(self.loss_fn.label(self.params, {"image": images})["label"])


class CountedExamples(NamedTuple):
    """Which examples count, by the protocol of the paper's code.

    Attributes:
      trusted, benign: indices of clean images that the model classifies rightly.
      anomalous: indices of clean images that with the trigger get the label it asks for, another than their own.
      triggered: those images with the trigger, uint8 `[num_anomalous, ...]`.
      accuracy: on the clean test images; asr: share of triggered test images that get the label asked for.
    """

    trusted: np.ndarray
    benign: np.ndarray
    anomalous: np.ndarray
    triggered: np.ndarray
    accuracy: float
    asr: float


def count_examples(case: Case, trusted: np.ndarray, test: np.ndarray) -> CountedExamples:
    """Applies the protocol to two parts of the pool, given by their indices."""
    images, labels = case.pool.images, case.pool.labels
    right = case.predict(images) == labels
    accuracy = float(right[test].mean())
    if case.triggered is None:
        return CountedExamples(trusted[right[trusted]], test[right[test]], test[:0], images[:0], accuracy, float("nan"))
    asked = poisoned_labels(labels, case.target, case.loss_fn.num_classes(case.params, {"image": images}))
    shown, sources = case.triggered(test[asked[test] != labels[test]])
    if not len(sources):
        raise ValueError("attack: no image of the test part has a triggered version")
    fires = case.predict(shown) == asked[sources]
    return CountedExamples(
        trusted[right[trusted]], test[right[test]], sources[fires], shown[fires], accuracy, float(fires.mean())
    )


class TestSet(NamedTuple):
    """A case's pool, split and counted.

    Attributes:
      counted: which examples count.
      trusted, sampling: batches for `Detector.fit`.
      images: benign ones, then triggered ones; is_anomalous: which are triggered.
    """

    counted: CountedExamples
    trusted: dict[str, np.ndarray]
    sampling: dict[str, np.ndarray]
    images: np.ndarray
    is_anomalous: np.ndarray


def make_test_set(case: Case, name: str, seed: int) -> TestSet:
    """Two fifths of every class of the pool are trusted, a fifth is for chains to train on, two fifths are tested."""
    pool = case.pool
    trusted, sampling, test = split_by_class(cell_rng(name, seed), pool.labels, (0.4, 0.2, 0.4), pool.groups)
    return _test_set(case, trusted, sampling, test)


def make_small_test_set(case: Case, seed: int, shares: tuple[float, ...], size: int) -> TestSet:
    """At most `size` trusted, benign and triggered images each; `shares` of the pool: trusted, (sampling,) test."""
    trusted, *sampling, test = split_by_class(np.random.default_rng(seed), case.pool.labels, shares)
    # a few more than wanted, since some are not counted
    return _test_set(case, trusted[: 4 * size], sampling[0] if sampling else trusted[:0], test[: 4 * size], size)


def _test_set(
    case: Case, trusted: np.ndarray, sampling: np.ndarray, test: np.ndarray, size: int | None = None
) -> TestSet:
    pool, counted = case.pool, count_examples(case, trusted, test)
    counted = counted._replace(
        trusted=counted.trusted[:size],
        benign=counted.benign[:size],
        anomalous=counted.anomalous[:size],
        triggered=counted.triggered[:size],
    )
    images = np.concatenate([pool.images[counted.benign], counted.triggered])
    return TestSet(
        counted,
        {"image": pool.images[counted.trusted]},
        {"image": pool.images[sampling], "label": pool.labels[sampling]},
        images,
        np.arange(len(images)) >= len(counted.benign),
    )


class Recipe(NamedTuple):
    """How a model is trained; the defaults are the digits'.

    Attributes:
      dataset, data_dir: for `load_images`; digits are split anew for every attack and seed.
      model: for `build_model`.
      initial_weights: weights that training starts from, a file for `load_weights` or a folder that `train_case` kept a
        model in; drawn at random where None.
      num_train, num_pool: at most so many images, all where None.
      poison_ratio, target: for `poison`.
      augment: whether images are cropped, and flipped where the data set is CIFAR-10.
      dtype: of the computation, "float32" or "bfloat16".
    """

    dataset: str = "digits"
    data_dir: str | None = None
    model: str = "digits_cnn"
    initial_weights: str | None = None
    num_train: int | None = None
    num_pool: int | None = None
    poison_ratio: float = 0.1
    target: int = 0
    num_epochs: int = 40
    learning_rate: float = 0.05
    augment: bool = False
    dtype: str = "float32"


def cell_rng(name: str, seed: int) -> np.random.Generator:
    """The generator of one attack and seed."""
    return np.random.default_rng([seed, zlib.crc32(name.encode())])


def train_case(name: str, seed: int, recipe: Recipe = Recipe(), folder: Path | None = None) -> Case:  # noqa: B008
    """A model trained with the attack `name`, or clean; read from `folder` where it is there already.

    trojannn needs a clean model of the same recipe, which is trained, or read, in the folder `clean-<seed>` beside.
    """
    if folder is not None and is_kept(folder):
        return load_case(folder)
    rng = cell_rng(name, seed)
    train, pool = _train(recipe, rng), _pool(recipe, name, seed)
    attack, images, labels, backdoors = None, train.images, train.labels, []
    if name != "clean":
        attack = _make_attack(name, rng, seed, recipe, train, recipe.target, folder)
        backdoors = [_Backdoor(attack, recipe.target, recipe.poison_ratio, np.arange(len(labels)))]
        images, labels = backdoors[0].put(rng, train, images, labels)
    num_classes = int(train.labels.max()) + 1
    model = _fit(recipe, rng, train, images, labels, backdoors, folder)
    if folder is not None:
        _save(folder, model, attack, {"name": name, "seed": seed, "num_classes": num_classes, **recipe._asdict()})
    return _case(model, _normalization(recipe.dataset), pool, attack, recipe.target)


def train_several(
    names: Sequence[str],
    targets: Sequence[int],
    seed: int,
    recipe: Recipe = Recipe(),  # noqa: B008
    folder: Path | None = None,
) -> tuple[Case, list[Attack]]:
    """One model with several backdoors, each poisoning training images of its own; the case itself has no trigger.

    Args:
      names, targets: the attacks, and the class that each asks for.
      folder: where the training is kept, as for `train_case`.

    Raises:
      ValueError: fewer than two attacks, one named twice, not a target for each, poison for more than half of the
        training images.
    """
    if len(names) < 2 or len(set(names)) < len(names):
        raise ValueError(f"attack: wanted two or more, each once, got {', '.join(names) or 'none'}")
    if len(targets) != len(names):
        raise ValueError(f"targets: wanted one for each of {len(names)} attacks, got {len(targets)}")
    share = len(names) * recipe.poison_ratio
    if share > 0.5:
        raise ValueError(
            f"poison_ratio: {len(names)} attacks of {recipe.poison_ratio:g} poison {share:.0%} of the training images, "
            "wanted half at most"
        )
    name = "+".join(f"{name}-{target}" for name, target in zip(names, targets, strict=True))
    rng = cell_rng(name, seed)
    train, pool = _train(recipe, rng), _pool(recipe, name, seed)
    images, labels, backdoors = train.images, train.labels, []
    # a part of the images for each attack, so that none carries two triggers
    parts = split_by_class(rng, train.labels, (1 / len(names),) * len(names))
    for name, target, part in zip(names, targets, parts, strict=True):
        attack = _make_attack(name, rng, seed, recipe, train, target, folder)
        backdoors.append(_Backdoor(attack, target, share, part))
        images, labels = backdoors[-1].put(rng, train, images, labels)
    model = _fit(recipe, rng, train, images, labels, backdoors, folder)
    return _case(model, _normalization(recipe.dataset), pool, None, 0), [backdoor.attack for backdoor in backdoors]


def train_known(
    num_classes: int,
    seed: int,
    recipe: Recipe = Recipe(),  # noqa: B008
    folder: Path | None = None,
) -> tuple[Case, np.ndarray]:
    """A clean model of the first classes alone, and images of the others, which it has not seen."""
    rng = cell_rng("known", seed)
    train, pool = _train(recipe, rng), _pool(recipe, "known", seed)
    kept, known = train.labels < num_classes, pool.labels < num_classes
    train = train._replace(images=train.images[kept], labels=train.labels[kept], groups=None)
    model = _fit(recipe, rng, train, train.images, train.labels, [], folder)
    groups = None if pool.groups is None else pool.groups[known]
    part = ImageSet(pool.images[known], pool.labels[known], pool.class_names, groups)
    return _case(model, _normalization(recipe.dataset), part, None, 0), pool.images[~known]


def _make_attack(
    name: str, rng: np.random.Generator, seed: int, recipe: Recipe, train: ImageSet, target: int, folder: Path | None
) -> Attack:
    def clean_model() -> tuple[nnx.Module, Any]:
        case = train_case("clean", seed, recipe, None if folder is None else folder.parent / f"clean-{seed}")
        module = case.loss_fn.module
        return nnx.merge(module.graphdef, module.rng_state, case.params), _normalization(recipe.dataset)

    # digits are too easy to need a clean-label trigger: it is hardly learned (docs/choosing-the-scale.md)
    settings = {"clean_label": False} if (name, recipe.dataset) == ("sig", "digits") else {}
    return make_attack(name, rng, train.images, train.labels, target=target, clean_model=clean_model, **settings)


class _Backdoor(NamedTuple):
    """An attack with the class that it asks for, and the share that it poisons of a part of the training images.

    Attributes:
      part: indices of the training images.
    """

    attack: Attack
    target: int
    ratio: float
    part: np.ndarray

    def put(
        self, rng: np.random.Generator, clean: ImageSet, images: np.ndarray, labels: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The images and labels with the part's poisoned from the clean ones in their place."""
        part, images, labels = self.part, images.copy(), labels.copy()
        poisoned = poison(
            rng, clean.images[part], clean.labels[part], self.attack, target=self.target, ratio=self.ratio
        )
        images[part], labels[part] = poisoned.images, poisoned.labels
        return images, labels


def _fit(
    recipe: Recipe,
    rng: np.random.Generator,
    clean: ImageSet,
    images: np.ndarray,
    labels: np.ndarray,
    backdoors: Sequence[_Backdoor],
    folder: Path | None,
) -> Any:
    """A model trained on these images, poisoned from the clean ones; the training is kept in `folder`."""
    shape, num_classes, model_seed = images.shape[1:], int(clean.labels.max()) + 1, int(rng.integers(2**31))
    if recipe.initial_weights is None:
        model = _build(recipe.model, num_classes, shape, recipe.dtype, model_seed)
    else:
        path = Path(recipe.initial_weights)
        weights = load_weights(path / "model" / "arrays" if is_kept(path) else path)
        model = from_torch(recipe.model, weights, shape, num_classes=num_classes, dtype=jnp.dtype(recipe.dtype))
    rng_key, anew_seed = jax.random.key(rng.integers(2**31)), int(rng.integers(2**31))
    # who makes decoys poisons anew; see `Attack.decoy`
    again = [backdoor for backdoor in backdoors if backdoor.attack.decoy is not None]

    def anew(epoch: int) -> tuple[np.ndarray, np.ndarray]:
        of_epoch = images, labels
        for backdoor in again:
            of_epoch = backdoor.put(np.random.default_rng([anew_seed, epoch]), clean, *of_epoch)
        return of_epoch

    train_classifier(
        model,
        images,
        labels,
        rng_key=rng_key,
        anew=anew if again else None,
        num_epochs=recipe.num_epochs,
        preprocess=_normalization(recipe.dataset),
        augmentation=_augmentation(recipe, [backdoor.attack for backdoor in backdoors]),
        learning_rate=recipe.learning_rate,
        workdir=None if folder is None else folder / "training",
    )
    return model


class Kept(NamedTuple):
    """What a model that `train_case` kept was made of: its attack, seed and recipe."""

    name: str
    seed: int
    num_classes: int
    recipe: Recipe


def is_kept(folder: Path) -> bool:
    """Whether `train_case` kept a model in the folder."""
    return (folder / "model").is_dir()


def read_kept(folder: Path) -> Kept:
    """What is told beside a kept model.

    Raises:
      ValueError: where nothing is, or not just what this version keeps there.
    """
    settings = checkpoint.load_settings(folder / "model")
    needed = {"name": str, "seed": int, "num_classes": int}
    types = needed | {key: kind | int if kind is float else kind for key, kind in get_type_hints(Recipe).items()}
    wrong = [
        key
        for key in sorted(needed.keys() | settings.keys())
        if key not in types or not isinstance(settings.get(key), types[key])
    ]
    # the name becomes that of a folder
    if wrong or settings["name"] not in (*ATTACKS, "clean"):
        raise ValueError(
            f"path: {folder / 'model'} is not what this version of train_backdoor keeps: {', '.join(wrong) or 'name'} "
            "is missing, unknown or malformed in its settings"
        )
    name, seed, num_classes = (settings.pop(key) for key in needed)
    return Kept(name, seed, num_classes, Recipe(**settings))


def load_case(folder: Path, data_dir: str | None = None, num_pool: int | None = None) -> Case:
    """A model that `train_case` kept, with the images that it was not trained on.

    Args:
      data_dir, num_pool: where the data lie now and how many images to take, where not as in training.
    """
    name, seed, num_classes, recipe = read_kept(folder)
    recipe = recipe._replace(data_dir=data_dir or recipe.data_dir, num_pool=num_pool or recipe.num_pool)
    pool = _pool(recipe, name, seed)
    _, arrays = checkpoint.load(folder / "model")
    try:
        model = from_arrays(_build(recipe.model, num_classes, pool.images.shape[1:], recipe.dtype, 0), arrays)
    except KeyError as error:
        raise ValueError(f"path: {folder / 'model'} holds no whole {recipe.model}, {error} is missing") from error
    attack = load_attack(folder / "attack.npz") if (folder / "attack.npz").exists() else None
    return _case(model, _normalization(recipe.dataset), pool, attack, recipe.target)


# the trigger is the same whatever images and generator an attack is made with
FIXED_TRIGGERS = ("badnet", "sig", "bpp")


def check_fixed(attack_name: str) -> None:
    """Raises ValueError where weights alone do not tell the trigger that they were trained with."""
    if attack_name not in (*FIXED_TRIGGERS, "clean"):
        raise ValueError(
            f"attack: the trigger of {attack_name} is made anew for every model, and weights do not hold it; wanted "
            f"{', '.join(FIXED_TRIGGERS)} or clean, or as --checkpoint a folder of train_backdoor, which keeps it"
        )


def read_case(path: Path, recipe: Recipe, attack_name: str, normalization: str | None, seed: int) -> Case:
    """Somebody's weights, with one of `FIXED_TRIGGERS` at its default settings, or clean.

    Args:
      recipe: names the architecture, the data set, the target and the dtype.
      normalization: see `parse_normalization`; the data set's where None.

    Raises:
      ValueError: for another attack, whose trigger the weights never saw; for weights or data that cannot be read.
    """
    check_fixed(attack_name)
    pool = _pool(recipe, attack_name, seed)
    classifier = from_torch(recipe.model, load_weights(path), pool.images.shape[1:], dtype=jnp.dtype(recipe.dtype))
    attack, target = None, recipe.target
    if attack_name != "clean":
        attack = make_attack(attack_name, np.random.default_rng(seed), pool.images, pool.labels, target=target)
    preprocess = parse_normalization(normalization) if normalization else _normalization(recipe.dataset)
    return _case(classifier, preprocess, pool, attack, target)


# where BackdoorBench's names differ from ours
_BACKDOORBENCH_NAMES = {"preactresnet18": "preact_resnet18", "tiny": "tiny_imagenet"}


def backdoorbench_case(folder: Path, data_dir: str | None, target: int, num_pool: int | None) -> Case:
    """A downloaded BackdoorBench result: its weights, its triggered images, and the data set's clean test images."""
    result = load_backdoorbench(folder)
    dataset, name = (_BACKDOORBENCH_NAMES.get(name, name) for name in (result.dataset, result.model_name))
    # names out of the download: they may choose among these, but neither open a path nor fetch what they like
    datasets = ("cifar10", "cifar100", "gtsrb", "mnist", "tiny_imagenet")
    for what, got, known in (("data set", dataset, datasets), ("model", name, sorted(MODELS))):
        if got not in known:
            raise ValueError(
                f"backdoorbench: the {what} of {folder} is '{shown(got)}', wanted one of {', '.join(known)}"
            )
    pool = load_images(dataset, "test", data_dir=data_dir)
    model = from_torch(name, result.weights, pool.images.shape[1:], num_classes=result.num_classes)
    rows = {int(index): row for row, index in enumerate(result.indices)}
    if rows and (max(rows) >= len(pool.labels) or (pool.labels[result.indices] != result.original_labels).any()):
        raise ValueError(
            f"backdoorbench: the triggered images of {folder} are not of the test split of {result.dataset}"
        )

    def triggered(sources: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        kept = np.array([index for index in sources if int(index) in rows], int)
        return result.images[[rows[int(index)] for index in kept]], kept

    case = _case(model, _normalization(dataset), pool, None, target)._replace(triggered=triggered)
    return case if num_pool is None else subset(case, num_pool)


def subset(case: Case, count: int) -> Case:
    """The case with a class-balanced part of its pool, of about `count` images."""
    share = min(1.0, count / len(case.pool.labels))
    (kept,) = split_by_class(np.random.default_rng(0), case.pool.labels, (share,))
    pool, whole = ImageSet(case.pool.images[kept], case.pool.labels[kept], case.pool.class_names, None), case.triggered
    if whole is None:
        return case._replace(pool=pool)

    def triggered(sources: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        images, found = whole(kept[sources])
        place = {int(index): i for i, index in enumerate(kept)}
        return images, np.array([place[int(index)] for index in found], int)

    return case._replace(pool=pool, triggered=triggered)


def _train(recipe: Recipe, rng: np.random.Generator) -> ImageSet:
    if recipe.dataset == "digits":
        return _digits(rng)[0]
    return load_images(recipe.dataset, "train", data_dir=recipe.data_dir, max_examples=recipe.num_train)


def _pool(recipe: Recipe, name: str, seed: int) -> ImageSet:
    if recipe.dataset == "digits":
        return _digits(cell_rng(name, seed))[1]
    return load_images(recipe.dataset, "test", data_dir=recipe.data_dir, max_examples=recipe.num_pool)


def _digits(rng: np.random.Generator) -> list[ImageSet]:
    """Digits to train on and the others: a split for every attack and seed, so that false-positive rates of several
    are independent measurements.
    """
    images, labels = digits()
    return [ImageSet(images[part], labels[part], None, None) for part in split_by_class(rng, labels, (0.45, 0.55))]


def _normalization(dataset: str) -> Any:
    return parse_normalization(dataset if dataset in NORMALIZATIONS else "none")


def _augmentation(recipe: Recipe, attacks: Sequence[Attack]) -> Augmentation | None:
    if not recipe.augment:
        return None
    rotation = max((attack.rotation for attack in attacks), default=0.0)
    return Augmentation(crop=5 if rotation else 4, flip=recipe.dataset == "cifar10", rotation=rotation)


def _build(name: str, num_classes: int, image_shape: tuple[int, ...], dtype: str, seed: int) -> Any:
    return build_model(name, num_classes, image_shape, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(seed))


def _save(folder: Path, model: nnx.Module, attack: Attack | None, settings: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if attack is not None:
        save_attack(folder / "attack.npz", attack)
    checkpoint.save(folder / "model", settings, to_arrays(nnx.state(model)))


def _case(model: nnx.Module, normalization: Any, pool: ImageSet, attack: Attack | None, target: int) -> Case:
    model.eval()
    loss_fn, params = from_nnx(model, preprocess=normalization)
    if attack is None:
        return Case(loss_fn, params, pool, None, target)
    return Case(loss_fn, params, pool, lambda sources: (attack.trigger(pool.images[sources]), sources), target)


def _published(file: str, model: str, dataset: str, normalization: str, attack: Callable[[Any], Attack], target: int):
    def load(data_dir: Path) -> Case:
        pool = load_images(dataset, "test", data_dir=data_dir)
        shape = pool.images.shape[1:]
        classifier = from_torch(model, load_weights(data_dir / "checkpoints" / file), shape)
        return _case(classifier, parse_normalization(normalization), pool, attack(shape), target)

    return load


def _white5(shape: tuple[int, int, int]) -> Attack:
    return badnet(np.random.default_rng(0), shape, size=5)


def _grid(shape: tuple[int, int, int]) -> Attack:
    """The 3×3 checkerboard of github.com/bboylyg/ABL, bottom right."""
    grid = np.array([[0, 0, 255], [0, 255, 0], [255, 0, 255]], np.uint8)
    patch = {"patch": np.repeat(grid[..., None], shape[2], axis=2)}
    return Attack("grid", patch, stamp, shape)


def benchmark_models(
    attacks: Sequence[str], seed: int, data: str | None, published: Sequence[str]
) -> dict[str, Callable[[], Case]]:
    """By name, what loads them: digits with a backdoor, trained on the spot, and checkpoints in the folder `data`."""
    models: dict[str, Callable[[], Case]] = {f"digits {name}": partial(train_case, name, seed) for name in attacks}
    return models | ({} if data is None else {name: partial(PUBLISHED[name], Path(data)) for name in published})


# public backdoored checkpoints, by name: given the data folder, they load themselves
PUBLISHED: dict[str, Callable[[Path], Case]] = {
    "wrn16_1": _published("abl_wrn16_1_grid_target0.tar", "wrn16_1", "cifar10", "none", _grid, 0),
    "cnn_cifar10": _published(
        "badnets_cnn_cifar10_white5_target1.pth", "badnets_cnn", "cifar10", "symmetric", _white5, 1
    ),
    "cnn_mnist": _published("badnets_cnn_mnist_white5_target1.pth", "badnets_cnn", "mnist", "symmetric", _white5, 1),
}
