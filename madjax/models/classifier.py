"""What every architecture here offers: logits, and where torch keeps its weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import jax
from flax import nnx


class Classifier(nnx.Module):
    """A network from float images `[n, height, width, channels]` to float32 logits `[n, num_classes]`.

    Attributes:
      HEAD: the path of the last linear layer.
      TORCH_NAMES: the known namings of torch checkpoints, each from the path of a module here to its path there.
    """

    HEAD: ClassVar[str]
    TORCH_NAMES: ClassVar[tuple[Callable[[str], str], ...]] = (str,)

    def __call__(self, image: jax.Array) -> jax.Array:
        """The logits."""
        raise NotImplementedError
