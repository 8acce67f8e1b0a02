"""Statistics of the output alone. They need no trusted examples but for their threshold."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
from scipy.special import log_softmax, logsumexp

from madjax.baselines.baseline import Anomaly, Observed, Statistic
from madjax.baselines.model import Layers, Model


@dataclasses.dataclass(frozen=True)
class Output(Statistic):
    """Any function of the logits.

    Attributes:
      function: float64 logits `[n, num_classes]` -> anomaly scores `[n]`.
    """

    function: Callable[[np.ndarray], np.ndarray]

    def observe(self, model: Model, images: np.ndarray, trusted: np.ndarray) -> Observed:
        """The logits."""
        return model.read(Layers(), images)

    def fit(self, trusted: Observed) -> Anomaly:
        """The function; nothing is fitted."""
        return lambda observed: self.function(observed["logits"].astype(np.float64))


def max_softmax(logits: np.ndarray) -> np.ndarray:
    """Minus the largest probability (Hendrycks and Gimpel 2017, arXiv 1610.02136)."""
    return -np.exp(log_softmax(logits, axis=1).max(axis=1))


def entropy(logits: np.ndarray) -> np.ndarray:
    """Entropy of the probabilities, in nats."""
    log_p = log_softmax(logits, axis=1)
    return -(np.exp(log_p) * log_p).sum(axis=1)


def energy(logits: np.ndarray) -> np.ndarray:
    """Free energy at temperature 1, minus the logarithm of the sum of exponentials (Liu et al. 2020, 2010.03759)."""
    return -logsumexp(logits, axis=1)


def max_logit(logits: np.ndarray) -> np.ndarray:
    """Minus the largest logit (Hendrycks et al. 2022, arXiv 1911.11132)."""
    return -logits.max(axis=1)


def loss(logits: np.ndarray) -> np.ndarray:
    """The loss at the trained parameters against the model's own output, in nats: what the Detector perturbs."""
    return -log_softmax(logits, axis=1).max(axis=1)
