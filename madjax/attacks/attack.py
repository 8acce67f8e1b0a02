"""What every backdoor attack is: a trigger on images, and a rule for which training images carry it.

Images are uint8 `[n, height, width, channels]` in 0..255 throughout; parameters are BackdoorBench's defaults
(Wu et al. 2022, arXiv 2206.12654). An attack is nothing but arrays and a pure function of them, so that it can be kept
beside the model it was trained into.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

Arrays = dict[str, np.ndarray]
# the target of an all-to-all attack: every class is sent to the next one
ALL_TO_ALL = -1


class Attack(NamedTuple):
    """A backdoor.

    Attributes:
      name: as the drivers' `--attack` spells it.
      arrays: all that the trigger depends on.
      apply: `(arrays, uint8 images)` -> uint8 images with the trigger.
      image_shape: `(height, width, channels)` of the images it is made for.
      clean_label: only images of the target class are poisoned, and no label is changed.
      decoy: `(arrays, rng, uint8 images)` -> images with a trigger that is not the attack's; they are trained on with
        their true label, so that only the exact trigger works. Who makes decoys trains the model too, and poisons other
        images in every epoch (in BackdoorBench, of every batch). None: no decoys.
      decoy_ratio: decoys for each poisoned image.
      rotation: degrees of the random rotation that training with it takes in addition.
    """

    name: str
    arrays: Arrays
    apply: Callable[[Arrays, np.ndarray], np.ndarray]
    image_shape: tuple[int, ...]
    clean_label: bool = False
    decoy: Callable[[Arrays, np.random.Generator, np.ndarray], np.ndarray] | None = None
    decoy_ratio: float = 0.0
    rotation: float = 0.0

    def trigger(self, images: np.ndarray) -> np.ndarray:
        """The images with the trigger.

        Raises:
          ValueError: images of another shape or dtype than the attack is made for.
        """
        if images.dtype != np.uint8 or images.shape[1:] != tuple(self.image_shape):
            wanted = ", ".join(map(str, self.image_shape))
            raise ValueError(f"images: {self.name} wanted uint8 [n, {wanted}], got {images.dtype} {images.shape}")
        return self.apply(self.arrays, images) if len(images) else images.copy()


class Poisoned(NamedTuple):
    """A training set with a backdoor.

    Attributes:
      images, labels: to train on, in the order of the clean ones.
      is_poisoned: bool `[n]`, those that carry the trigger; is_decoy: those that carry a decoy.
    """

    images: np.ndarray
    labels: np.ndarray
    is_poisoned: np.ndarray
    is_decoy: np.ndarray


def poisoned_labels(labels: np.ndarray, target: int, num_classes: int) -> np.ndarray:
    """The labels that the trigger asks for: `target`, or the next class where it is `ALL_TO_ALL`.

    >>> poisoned_labels(np.array([0, 1, 2]), ALL_TO_ALL, 3)
    array([1, 2, 0])
    """
    return (labels + 1) % num_classes if target == ALL_TO_ALL else np.full_like(labels, target)


def poison(
    rng: np.random.Generator, images: np.ndarray, labels: np.ndarray, attack: Attack, *, target: int, ratio: float
) -> Poisoned:
    """A training set in which `ratio` of all images carry the trigger and the label it asks for.

    A clean-label attack takes them from the target class alone, and all of that class where it holds fewer.

    Args:
      target: a class, or `ALL_TO_ALL`.

    Raises:
      ValueError: where `target` is no class of `labels`, `ratio` is outside (0, 1), or an attack that changes no label
        is to be all-to-all.
    """
    if not 0 < ratio < 1:
        raise ValueError(f"ratio: wanted a share between 0 and 1, got {ratio}")
    if target != ALL_TO_ALL and not np.any(labels == target):
        raise ValueError(f"target: {target} is not among the labels, which are {np.unique(labels).tolist()}")
    if target == ALL_TO_ALL and attack.clean_label:
        raise ValueError(f"target: {attack.name} poisons images of one class alone and cannot be all-to-all")
    candidates = np.flatnonzero(labels == target) if attack.clean_label else np.arange(len(labels))
    count = min(round(ratio * len(labels)), len(candidates))
    chosen = rng.choice(candidates, size=count, replace=False)
    images, labels = images.copy(), labels.copy()
    is_poisoned, is_decoy = np.zeros(len(labels), bool), np.zeros(len(labels), bool)
    is_poisoned[chosen] = True
    if attack.decoy is not None:
        others = np.flatnonzero(~is_poisoned)
        decoys = rng.choice(others, size=min(round(attack.decoy_ratio * count), len(others)), replace=False)
        images[decoys] = attack.decoy(attack.arrays, rng, images[decoys])
        is_decoy[decoys] = True
    images[chosen] = attack.trigger(images[chosen])
    labels[chosen] = poisoned_labels(labels[chosen], target, int(labels.max()) + 1)
    return Poisoned(images, labels, is_poisoned, is_decoy)


def save_attack(path: str | Path, attack: Attack) -> None:
    """Writes an attack's name and arrays to an npz file; `madjax.attacks.load_attack` reads it."""
    names = ("name", "image_shape", "clean_label", "decoy_ratio", "rotation")
    fields = {name: getattr(attack, name) for name in names}
    np.savez(path, **fields, **attack.arrays)  # pyright: ignore[reportArgumentType]
