"""What every backdoor attack is: a trigger on images, and a rule for which training images carry it.

Images are uint8 `[n, height, width, channels]` in 0..255 throughout; parameters are BackdoorBench's defaults
(Wu et al. 2022, arXiv 2206.12654), all-to-one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Attack(NamedTuple):
    """A backdoor.

    Attributes:
      name: as the drivers' `--attack` spells it.
      trigger: uint8 images `[n, height, width, channels]` -> the same with the trigger.
      clean_label: only images of the target class are poisoned, and no label is changed.
    """

    name: str
    trigger: Callable[[np.ndarray], np.ndarray]
    clean_label: bool = False


def poison(
    rng: np.random.Generator, images: np.ndarray, labels: np.ndarray, attack: Attack, *, target: int, ratio: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A training set in which `ratio` of all images carry the trigger and the label `target`.

    A clean-label attack takes them from the target class alone, and all of that class where it holds fewer.

    Returns:
      `(images, labels, is_poisoned)`, copies in the order of the arguments.

    Raises:
      ValueError: where `target` is no class of `labels`, or `ratio` is outside (0, 1).
    """
    if not 0 < ratio < 1:
        raise ValueError(f"ratio: wanted a share between 0 and 1, got {ratio}")
    if not np.any(labels == target):
        raise ValueError(f"target: {target} is not among the labels, which are {np.unique(labels).tolist()}")
    candidates = np.flatnonzero(labels == target) if attack.clean_label else np.arange(len(labels))
    count = min(round(ratio * len(labels)), len(candidates))
    chosen = rng.choice(candidates, size=count, replace=False)
    images, labels = images.copy(), labels.copy()
    images[chosen] = attack.trigger(images[chosen])
    labels[chosen] = target
    is_poisoned = np.zeros(len(labels), bool)
    is_poisoned[chosen] = True
    return images, labels, is_poisoned
