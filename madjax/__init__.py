"""Mechanistic anomaly detection via functional attribution (arXiv 2604.18970), in JAX."""

from madjax.detector import Detector
from madjax.ensemble import Ensemble
from madjax.losses import ClassificationLoss, from_linen, from_nnx
from madjax.sampling.perturbation import Gaussian, Langevin, Tangent
from madjax.scorer import Scorer, Scores
from madjax.store import open_traces
from madjax.sweep import loss_matrix
from madjax.xla_flags import leave_convolutions_to_xla

leave_convolutions_to_xla()

__all__ = [
    "ClassificationLoss",
    "Detector",
    "Ensemble",
    "Gaussian",
    "Langevin",
    "Scorer",
    "Scores",
    "Tangent",
    "from_linen",
    "from_nnx",
    "loss_matrix",
    "open_traces",
]
