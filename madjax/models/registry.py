"""Architectures by name."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial

from flax import nnx
from jax.typing import DTypeLike

from madjax.interop.guard import shown
from madjax.models.classifier import Classifier
from madjax.models.cnn import BadNetsCNN, DigitsCNN
from madjax.models.resnet import PreActResNet18, ResNet
from madjax.models.vgg import VGG19BN
from madjax.models.wrn import WideResNet

# (num_classes, image_shape, *, dtype, rngs) -> model
Builder = Callable[..., Classifier]


def _any_size(model: Builder, *args: int) -> Builder:
    return lambda num_classes, image_shape, **kwargs: model(*args, num_classes, channels=image_shape[-1], **kwargs)


def _one_size(model: Builder) -> Builder:
    return lambda num_classes, image_shape, **kwargs: model(num_classes=num_classes, image_shape=image_shape, **kwargs)


MODELS: dict[str, Builder] = {
    "badnets_cnn": _one_size(BadNetsCNN),
    "digits_cnn": _one_size(DigitsCNN),
    "preact_resnet18": _any_size(PreActResNet18),
    **{f"resnet{depth}": _any_size(ResNet, depth) for depth in (20, 32, 44, 56, 110)},
    "vgg19_bn": _one_size(VGG19BN),
    "vgg19_bn_linear": _one_size(partial(VGG19BN, hidden=None)),
}


def build_model(
    name: str,
    num_classes: int,
    image_shape: tuple[int, ...],
    *,
    dtype: DTypeLike | None = None,
    rngs: nnx.Rngs,
) -> Classifier:
    """A new classifier: float images `[n, height, width, channels]` -> float32 logits `[n, num_classes]`.

    Args:
      name: of `MODELS`, or `wrn<depth>_<width>` with at most two digits each, for instance `wrn16_1`.
      image_shape: (height, width, channels).
      dtype: of the computation, float32 or for instance bfloat16; parameters and batch statistics stay float32.

    Raises:
      ValueError: for an unknown name, no class, or images that the architecture does not take.
    """
    # wider and deeper ones than anybody has trained would take minutes to build
    wide = re.fullmatch(r"wrn([0-9]{1,2})_([0-9]{1,2})", name)
    builder = _any_size(WideResNet, *map(int, wide.groups())) if wide else MODELS.get(name)
    if builder is None:
        known = f"{', '.join(sorted(MODELS))} and wrn<depth>_<width> of two digits each"
        raise ValueError(f"name: no model '{shown(name)}'; known are {known}")
    if num_classes < 1:
        raise ValueError(f"num_classes: wanted at least 1, got {num_classes}")
    if len(image_shape) != 3 or min(image_shape) < 1:
        raise ValueError(f"image_shape: wanted (height, width, channels), got {tuple(image_shape)}")
    return builder(num_classes, tuple(image_shape), dtype=dtype, rngs=rngs)
