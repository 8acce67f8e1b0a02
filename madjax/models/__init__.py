"""Flax NNX classifiers, and a small trainer for those that are trained on the spot."""

from madjax.models.cnn import BadNetsCNN, DigitsCNN
from madjax.models.train import train_classifier
from madjax.models.wrn import WideResNet

__all__ = ["BadNetsCNN", "DigitsCNN", "WideResNet", "train_classifier"]
