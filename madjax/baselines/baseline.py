"""Any statistic of an example as a detector: fitted on trusted examples and calibrated on them, as the Detector is.

A trusted example is scored by a fit on others, tenth by tenth, for a fit that saw it would find it too normal.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from madjax import calibration
from madjax.baselines.model import Model
from madjax.detector import check_examples, check_parameters, check_shapes, example_shapes
from madjax.losses import ClassificationLoss, SequenceLoss
from madjax.sampling.diagnostics import ensure_finite
from madjax.scorer import Scores
from madjax.types import Batch, Params, num_examples

# a dict of arrays [n, ...] on the host; of a classifier "logits" is always there
Observed = dict[str, Any]

# anomaly scores [n], high = anomalous
Anomaly = Callable[[Observed], np.ndarray]

# examples are scored so many at a time, since most statistics compute in float64
_BLOCK = 4096


class Statistic:
    """A rival: a frozen dataclass of its settings."""

    @property
    def forwards(self) -> int:
        """Forward passes of one example; a gradient counts as three."""
        return 1

    def observe(self, model: Model, images: Any, trusted: Any) -> Observed:
        """What the statistic has to know of each image, whatever the fit; `trusted` are the trusted images.

        Of a language model it is given batches of `SequenceLoss` instead of images.
        """
        raise NotImplementedError

    def fit(self, trusted: Observed) -> Anomaly:
        """The anomaly score, from what was observed of trusted examples."""
        raise NotImplementedError


class Transductive(Statistic):
    """A rival that looks at all examples at once: what it finds of one depends on those beside it."""

    def given(self, pool: Observed) -> Statistic:
        """The statistic for the trusted examples and those to be scored, observed together as `pool`."""
        raise NotImplementedError

    def fit(self, trusted: Observed) -> Anomaly:
        """The anomaly score, where nothing but trusted examples was seen."""
        return self.given(trusted).fit(trusted)


@dataclasses.dataclass(frozen=True)
class Baseline:
    """A statistic, fitted and calibrated.

    >>> baseline = Baseline.fit(BASELINES["knn"], loss_fn, params, {"image": images})  # doctest: +SKIP
    >>> baseline.score({"image": images}).flagged  # doctest: +SKIP

    Attributes:
      trusted_examples, trusted: images or sequences, and what was observed of them.
      trusted_scores: anomaly scores `[num_trusted]`, each by a fit that did not see the example.
      anomaly: the score, fitted on all trusted examples.
      fpr, per_class: as for the Detector.
    """

    statistic: Statistic
    model: Model
    trusted_examples: Batch
    trusted: Observed
    trusted_scores: np.ndarray
    anomaly: Anomaly
    fpr: float
    per_class: bool

    @classmethod
    def fit(
        cls,
        statistic: Statistic,
        loss_fn: ClassificationLoss | SequenceLoss,
        params: Params,
        trusted: Batch,
        *,
        fpr: float = 0.05,
        per_class: bool = False,
        batch_size: int = 256,
    ) -> Baseline:
        """Observes the trusted examples, fits the statistic and calibrates it.

        Args:
          statistic: of `BASELINES`, or another one.
          loss_fn, params: from `from_nnx`, `from_linen` or `from_decoder`.
          trusted: `{"image": [num_trusted, ...]}`, of which labels are ignored, as the model's own prediction counts;
            or sequences, for a language model.
          batch_size: images of one forward pass.

        Raises:
          ValueError: arguments that cannot work, named with what came and what was wanted.
          FloatingPointError: parameters, inputs or features that are not finite.
        """
        calibration.check_fpr(fpr)
        if num_examples(trusted, "trusted") < 2:
            raise ValueError(f"trusted: wanted a few hundred examples, got {num_examples(trusted)}")
        check_examples(trusted, "trusted")
        check_parameters(params)
        if per_class and isinstance(loss_fn, SequenceLoss):
            raise ValueError("per_class: wanted a classifier, got a language model, whose outputs have no class")
        model, examples = Model(loss_fn, params, batch_size), _without_label(trusted)
        observed = statistic.observe(model, _inputs(examples), _inputs(examples))
        anomaly = statistic.fit(observed)
        return cls(statistic, model, examples, observed, cross_fitted(statistic, observed), anomaly, fpr, per_class)

    @property
    def trusted_couplings(self) -> np.ndarray:
        """Float64 `[num_trusted]`: as the Detector's, high = explained."""
        return -self.trusted_scores

    def threshold(self) -> float:
        """The coupling under which an example is flagged, where classes are not calibrated each by itself."""
        return calibration.threshold(self.trusted_couplings, self.fpr)

    def score(self, examples: Batch) -> Scores:
        """Scores new examples, of the shapes of the trusted ones. No nearest trusted examples are told: `[n, 0]`."""
        check_examples(examples, "examples")
        examples = _without_label(examples)
        check_shapes(examples, example_shapes(self.trusted_examples))
        observed = self.statistic.observe(self.model, _inputs(examples), _inputs(self.trusted_examples))
        trusted_scores, anomaly = self.trusted_scores, self.anomaly
        if isinstance(self.statistic, Transductive):
            # all are in the pool, so that a benign example is like a trusted one
            statistic = self.statistic.given(jax.tree.map(_joined, self.trusted, observed))
            trusted_scores, anomaly = cross_fitted(statistic, self.trusted), _quietly(statistic.fit, self.trusted)
        scores, classes = in_blocks(anomaly, observed), predicted(observed) if "logits" in observed else None
        p_value = calibration.p_values(
            -trusted_scores,
            -scores,
            trusted_classes=predicted(self.trusted) if self.per_class else None,
            classes=classes if self.per_class else None,
        )
        return Scores(scores, p_value, p_value <= self.fpr, classes, np.zeros((len(scores), 0), int))


def _without_label(examples: Batch) -> Batch:
    return {name: np.asarray(array) for name, array in examples.items() if name != "label"}


def _inputs(examples: Batch) -> Any:
    """Images alone, or the batch of a language model."""
    return examples.get("image", examples)


def cross_fitted(statistic: Statistic, trusted: Observed, num_folds: int = 10) -> np.ndarray:
    """Float64 `[num_trusted]`: anomaly scores of the trusted examples, each fold's by a fit on the others."""
    count = num_examples(trusted)
    folds, result = np.arange(count) % min(count, num_folds), np.empty(count)
    for fold in range(folds.max() + 1):
        anomaly = _quietly(statistic.fit, rows(trusted, folds != fold))
        result[folds == fold] = in_blocks(anomaly, rows(trusted, folds == fold))
    return result


def _quietly(fit: Callable[[Observed], Anomaly], trusted: Observed) -> Anomaly:
    """A further fit, of whose warnings the first has told already."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fit(trusted)


def in_blocks(anomaly: Anomaly, observed: Observed) -> np.ndarray:
    """Float64 `[n]`: the anomaly scores, some at a time."""
    count = num_examples(observed)
    scores = [
        np.asarray(anomaly(rows(observed, slice(start, start + _BLOCK))), np.float64)
        for start in range(0, count, _BLOCK)
    ]
    result = np.concatenate(scores)
    ensure_finite(result, "anomaly scores")
    return result


def rows(observed: Observed, index: Any) -> Observed:
    """What was observed of some examples."""
    return jax.tree.map(lambda array: array[index], observed)


def _joined(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return np.concatenate([first, second])


def predicted(observed: Observed) -> np.ndarray:
    """Int32 `[n]`: the model's own classes."""
    return observed["logits"].argmax(axis=1).astype(np.int32)
