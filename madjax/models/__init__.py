"""Flax NNX classifiers, by class or by name, with torch's weights or a small trainer for those trained on the spot."""

from madjax.models.arrays import from_arrays, to_arrays
from madjax.models.cnn import BadNetsCNN, DigitsCNN
from madjax.models.convert import from_torch, load_state_dict
from madjax.models.registry import MODELS, build_model
from madjax.models.resnet import PreActResNet18, ResNet
from madjax.models.train import train_classifier
from madjax.models.vgg import VGG19BN
from madjax.models.wrn import WideResNet

__all__ = [
    "MODELS",
    "VGG19BN",
    "BadNetsCNN",
    "DigitsCNN",
    "PreActResNet18",
    "ResNet",
    "WideResNet",
    "build_model",
    "from_arrays",
    "from_torch",
    "load_state_dict",
    "to_arrays",
    "train_classifier",
]
