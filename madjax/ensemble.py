"""Detectors of one model that know different things of an output, and what they say together.

Draws large enough to break outputs tell what they rest on; a tangent tells how parameters move an output where it
stands, part by part of the model, for 3 forward passes. Each finds what the other lets through
(`docs/choosing-the-scale.md`), so their couplings are added up, in trusted standard deviations, the tangent's at half
weight.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from madjax import calibration, checkpoint
from madjax.coupling import DEFAULT
from madjax.detector import Detector
from madjax.sampling.perturbation import Gaussian, Perturbation, Tangent
from madjax.sampling.tangent import NUM_DRAWS
from madjax.scorer import Scores, Traces
from madjax.standardize import in_deviations
from madjax.types import Batch, LossFn, Params


class Member(NamedTuple):
    """What a detector is fitted with, and how much it counts."""

    perturbation: Perturbation
    num_draws: int
    coupling: str
    traces: Traces
    weight: float


DRAWS = Member(Gaussian(), 128, DEFAULT, "whitened", 1.0)
TANGENT = Member(Tangent(), NUM_DRAWS, "class_profile", "log", 0.5)


@dataclasses.dataclass(frozen=True)
class Ensemble:
    """Fitted detectors of the same model and trusted examples.

    >>> ensemble = Ensemble.fit(jax.random.key(0), loss_fn, params, trusted)  # doctest: +SKIP
    >>> ensemble.score({"image": images}).flagged  # doctest: +SKIP

    Attributes:
      detectors: the first one's rate, calibration by class and nearest examples are those of all.
      weights: of each.
    """

    detectors: tuple[Detector, ...]
    weights: tuple[float, ...]

    def __post_init__(self):
        counts = [detector.scorer.trusted.shape[1] for detector in self.detectors]
        if not counts or len(set(counts)) > 1 or len(self.weights) != len(counts):
            raise ValueError(
                f"detectors: wanted some of the same trusted examples, with a weight each, got {counts} examples and "
                f"{len(self.weights)} weights"
            )

    @classmethod
    def fit(
        cls,
        rng_key: jax.Array,
        loss_fn: LossFn,
        params: Params,
        trusted: Batch,
        *,
        members: Sequence[Member] = (DRAWS, TANGENT),
        layout: str = "auto",
        **settings: Any,
    ) -> Ensemble:
        """Fits a detector of each member.

        Args:
          layout: of the sweeps but a tangent's, which has one of its own.
          settings: further ones of `Detector.fit`, but a workdir.
        """
        detectors = [
            Detector.fit(
                key, loss_fn, params, trusted, perturbation=member.perturbation, num_draws=member.num_draws,
                coupling=member.coupling, traces=member.traces,
                layout="auto" if isinstance(member.perturbation, Tangent) else layout, **settings,
            )
            for key, member in zip(jax.random.split(rng_key, len(members)), members, strict=True)
        ]  # fmt: skip
        return cls(tuple(detectors), tuple(member.weight for member in members))

    @cached_property
    def trusted_couplings(self) -> np.ndarray:
        """Float64 `[num_trusted]`: what the coupling of each would be, had it come as a test example."""
        return self._add([detector.scorer.trusted_couplings for detector in self.detectors])

    def score(self, examples: Batch, *, progress: bool = False) -> Scores:
        """Scores new examples, of the shapes of the trusted ones."""
        return self.add([detector.score(examples, progress=progress) for detector in self.detectors])

    def add(self, scores: Sequence[Scores]) -> Scores:
        """Scores by all from those by each, of the same examples."""
        couplings, first = self._add([-each.anomaly_score for each in scores]), self.detectors[0]
        by_class = {"trusted_classes": first.scorer.trusted_classes, "classes": scores[0].prediction}
        p_value = calibration.p_values(self.trusted_couplings, couplings, **(by_class if first.per_class else {}))
        return scores[0]._replace(anomaly_score=-couplings, p_value=p_value, flagged=p_value <= first.fpr)

    def threshold(self) -> float:
        """The coupling under which an example is flagged, where classes are not calibrated each by itself."""
        return calibration.threshold(self.trusted_couplings, self.detectors[0].fpr)

    def save(self, path: str | Path) -> None:
        """Writes the detectors to the folder `path`, which is there whole or not at all; see `Detector.save`."""
        folder = Path(path).absolute()
        if folder.exists():
            raise ValueError(f"path: {folder} exists already")
        part = folder.with_name(folder.name + ".part")
        shutil.rmtree(part, ignore_errors=True)
        for index, detector in enumerate(self.detectors):
            detector.save(part / str(index))
        checkpoint.save(part / "weights", {}, {"weights": np.array(self.weights)})
        part.rename(folder)

    @classmethod
    def load(cls, path: str | Path, loss_fn: LossFn, params: Params) -> Ensemble:
        """Reads a saved ensemble, for the model it was fitted on; see `Detector.load`."""
        weights = checkpoint.load(Path(path) / "weights")[1]["weights"].tolist()
        detectors = [Detector.load(Path(path) / str(index), loss_fn, params) for index in range(len(weights))]
        return cls(tuple(detectors), tuple(weights))

    def _add(self, couplings: Sequence[np.ndarray]) -> np.ndarray:
        """Of the trusted or of test examples, `[n]` of each detector."""
        total = np.zeros(len(couplings[0]))
        for detector, weight, values in zip(self.detectors, self.weights, couplings, strict=True):
            total += weight * in_deviations(values, detector.scorer.trusted_couplings)
        return total
