"""The rivals, all with the Detector's fit and score and the same calibration.

>>> baseline = Baseline.fit(lookup("mahalanobis"), loss_fn, params, {"image": trusted})  # doctest: +SKIP
>>> baseline.score({"image": images}).p_value  # doctest: +SKIP
"""

from madjax.baselines import output
from madjax.baselines.baseline import Baseline, Statistic
from madjax.baselines.gradient import GradientCosine, GradientNorm
from madjax.baselines.gram import Beatrix, Gram
from madjax.baselines.hidden import HIDDEN
from madjax.baselines.influence import Influence
from madjax.baselines.inputs import STRIP, ScaleUp, TeCo
from madjax.baselines.knn import KNN
from madjax.baselines.mahalanobis import ClassMahalanobis, Mahalanobis, RelativeMahalanobis
from madjax.baselines.model import Model
from madjax.baselines.outliers import LOF, Isolation
from madjax.baselines.spectral import QuantumEntropy, Spectral
from madjax.baselines.ted import TED
from madjax.baselines.vae import VAE
from madjax.baselines.vim import ViM

BASELINES: dict[str, Statistic] = {
    "msp": output.Output(output.max_softmax),
    "entropy": output.Output(output.entropy),
    "energy": output.Output(output.energy),
    "max_logit": output.Output(output.max_logit),
    "loss": output.Output(output.loss),
    "mahalanobis": Mahalanobis(),
    "relative_mahalanobis": RelativeMahalanobis(),
    "class_mahalanobis": ClassMahalanobis(),
    "knn": KNN(),
    "vim": ViM(),
    "gram": Gram(),
    "beatrix": Beatrix(),
    "ted": TED(),
    "spectral": Spectral(),
    "quantum_entropy": QuantumEntropy(),
    "lof": LOF(),
    "isolation_forest": Isolation(),
    "vae": VAE(),
    "strip": STRIP(),
    "teco": TeCo(),
    "scale_up": ScaleUp(),
    "gradient_norm_last": GradientNorm(last_layer=True),
    "gradient_norm": GradientNorm(),
    "gradient_cosine_last": GradientCosine(last_layer=True),
    "gradient_cosine": GradientCosine(),
    "influence": Influence(),
}

__all__ = [
    "BASELINES", "HIDDEN", "KNN", "LOF", "STRIP", "TED", "VAE", "Baseline", "Beatrix", "ClassMahalanobis",
    "GradientCosine", "GradientNorm", "Gram", "Influence", "Isolation", "Mahalanobis", "Model", "QuantumEntropy",
    "RelativeMahalanobis", "ScaleUp", "Spectral", "Statistic", "TeCo", "ViM", "lookup",
]  # fmt: skip


def lookup(name: str) -> Statistic:
    """The baseline of that name with its published settings, of classifiers or language models (`HIDDEN`).

    Raises:
      ValueError: where there is none; the message lists the known ones.
    """
    known = BASELINES | HIDDEN
    if name not in known:
        raise ValueError(f"detector: wanted one of {', '.join(known)}, got {name!r}")
    return known[name]
