"""Backdoored models to try a detector on: digits trained on the spot, and public checkpoints.

The folder of the checkpoints holds `checkpoints/`, `tfds/cifar10` and `mnist.npz`; it does not ship with the package.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from madjax import from_nnx
from madjax.attacks import ATTACKS, Attack, badnet, poison
from madjax.data import digits, split_by_class
from madjax.interop.torch_checkpoint import load_torch_checkpoint
from madjax.models import BadNetsCNN, DigitsCNN, WideResNet, train_classifier
from madjax.models.convert import load_state_dict


class Case(NamedTuple):
    """A model and images that it was not trained on; `attack` is None for a clean one."""

    loss_fn: Any
    params: Any
    images: np.ndarray
    labels: np.ndarray
    attack: Attack | None
    target: int

    def predict(self, images: np.ndarray) -> np.ndarray:
        """Classes `[n]` of uint8 images."""
        return np.asarray(self.loss_fn.label(self.params, {"image": images})["label"])


def cell_rng(name: str, seed: int) -> np.random.Generator:
    """The generator of one attack and seed."""
    return np.random.default_rng([seed, zlib.crc32(name.encode())])


def train_digits(name: str, seed: int, *, poison_ratio: float = 0.1, target: int = 0, num_epochs: int = 40) -> Case:
    """A small CNN trained on 45 % of scikit-learn's digits, poisoned by the attack `name` or clean; the rest is left.

    Every attack and seed has its own split, so that false-positive rates of several are independent measurements.
    """
    rng = cell_rng(name, seed)
    images, labels = digits()
    train, left = split_by_class(rng, labels, (0.45, 0.55))
    attack = None
    train_images, train_labels = images[train], labels[train]
    if name != "clean":
        # digits are too easy to need a clean-label trigger: it is hardly learned (docs/choosing-the-scale.md)
        attack = ATTACKS[name](rng, images.shape[1:], **({"clean_label": False} if name == "sig" else {}))
        train_images, train_labels, _ = poison(
            rng, train_images, train_labels, attack, target=target, ratio=poison_ratio
        )
    model = DigitsCNN(rngs=nnx.Rngs(int(rng.integers(2**31))))
    train_classifier(model, train_images, train_labels, rng=rng, num_epochs=num_epochs, preprocess=_unit)
    return Case(*from_nnx(model, preprocess=_unit), images[left], labels[left], attack, target)


def load(name: str, folder: Path) -> Case:
    """One of the public checkpoints, `CHECKPOINTS`."""
    return CHECKPOINTS[name](folder)


def _wrn(folder: Path) -> Case:
    state = load_torch_checkpoint(folder / "checkpoints" / "abl_wrn16_1_grid_target0.tar")["state_dict"]

    def rename(module: str) -> str:
        module = re.sub(r"^block(\d)\.(\d)", r"block\1.layer.\2", module)
        return module.replace("shortcut", "convShortcut")

    model = load_state_dict(WideResNet(16, 1, rngs=nnx.Rngs(0)), state, rename)
    return Case(*from_nnx(model, preprocess=_unit), *_cifar10(folder), Attack("grid", _grid_trigger), 0)


def _cnn(data: str, folder: Path) -> Case:
    images, labels = _cifar10(folder) if data == "cifar10" else _mnist(folder)
    state = load_torch_checkpoint(folder / "checkpoints" / f"badnets_cnn_{data}_white5_target1.pth")
    model = BadNetsCNN(images.shape[1:], rngs=nnx.Rngs(0))
    model = load_state_dict(model, state, lambda module: f"{module}.0")
    attack = badnet(np.random.default_rng(0), images.shape[1:], size=5)
    return Case(*from_nnx(model, preprocess=_symmetric), images, labels, attack, 1)


CHECKPOINTS: dict[str, Callable[[Path], Case]] = {
    "wrn16_1": _wrn,
    "cnn_cifar10": lambda folder: _cnn("cifar10", folder),
    "cnn_mnist": lambda folder: _cnn("mnist", folder),
}


def _unit(image: jax.Array) -> jax.Array:
    return image.astype(jnp.float32) / 255


def _symmetric(image: jax.Array) -> jax.Array:
    return (image.astype(jnp.float32) / 255 - 0.5) / 0.5


def _grid_trigger(images: np.ndarray) -> np.ndarray:
    images = images.copy()
    images[:, 29:32, 29:32] = np.array([[0, 0, 255], [0, 255, 0], [255, 0, 255]], np.uint8)[None, :, :, None]
    return images


def _cifar10(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    import tensorflow_datasets as tfds  # slow to import, and only needed here

    source = tfds.data_source("cifar10", data_dir=str(folder / "tfds"), split="test")
    images, labels = zip(*((item["image"], item["label"]) for item in source), strict=True)  # pyright: ignore
    return np.stack(images), np.array(labels, np.int32)


def _mnist(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    arrays = np.load(folder / "mnist.npz")
    return arrays["x_test"][..., None], arrays["y_test"].astype(np.int32)
