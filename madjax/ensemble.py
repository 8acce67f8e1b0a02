"""Detectors of one model that know different things of an output, and what they say together.

Draws large enough to break outputs tell what they rest on; a tangent tells how parameters move an output where it
stands, part by part of the model, for 3 forward passes; and the features that the last layer is given, for one, whether
trusted examples lie near. Each finds what the others let through (`docs/choosing-the-scale.md`), so their couplings are
added up, in trusted standard deviations, those of tangent and features at half weight.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import jax
import numpy as np

from madjax import batch, calibration, checkpoint
from madjax.coupling import DEFAULT
from madjax.detector import Detector
from madjax.sampling.perturbation import Gaussian, Perturbation, Tangent
from madjax.sampling.tangent import NUM_DRAWS
from madjax.scorer import Scores, Traces
from madjax.standardize import in_deviations
from madjax.types import Batch, LossFn, LossMatrix, Params

if TYPE_CHECKING:  # they take a second to import, and few need them
    from madjax.baselines import Baseline, Statistic


class Member(NamedTuple):
    """What a `Detector` is fitted with, and how much it counts."""

    perturbation: Perturbation
    num_draws: int
    coupling: str
    traces: Traces
    weight: float


class Beside(NamedTuple):
    """A statistic without draws, by its name in `madjax.baselines.BASELINES`, and how much it counts."""

    statistic: str
    weight: float


DRAWS = Member(Gaussian(), 128, DEFAULT, "whitened", 1.0)
TANGENT = Member(Tangent(), NUM_DRAWS, "class_profile", "log", 0.5)
FEATURES = Beside("knn", 0.5)


@dataclasses.dataclass(frozen=True)
class Ensemble:
    """Fitted detectors of the same model and trusted examples.

    >>> ensemble = Ensemble.fit(jax.random.key(0), loss_fn, params, trusted)  # doctest: +SKIP
    >>> ensemble.score({"image": images}).flagged  # doctest: +SKIP

    Attributes:
      detectors: the first one, of draws, has the rate, the calibration by class and the nearest examples of all.
      weights: of each.
    """

    detectors: tuple[Detector | Baseline, ...]
    weights: tuple[float, ...]

    def __post_init__(self):
        counts = [len(detector.trusted_couplings) for detector in self.detectors]
        if not counts or not isinstance(self.detectors[0], Detector):
            raise ValueError("detectors: wanted a Detector first")
        if len(set(counts)) > 1 or len(self.weights) != len(counts):
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
        members: Sequence[Member | Beside] | None = None,
        layout: str = "auto",
        fpr: float = 0.05,
        per_class: bool = False,
        batch_size: int = 256,
        **settings: Any,
    ) -> Ensemble:
        """Fits a detector of each member.

        Args:
          members: `DRAWS`, `TANGENT` and `FEATURES` where none are given; the last only of `from_nnx` and
            `from_linen` with a linear layer, since of other code no layer can be read.
          layout: of the sweeps but a tangent's, which has one of its own.
          settings: further ones of `Detector.fit`, but a workdir.
        """
        from madjax.baselines import Baseline, lookup
        from madjax.baselines.features import can_read

        if members is None:
            members = (DRAWS, TANGENT, FEATURES) if can_read(loss_fn, params, trusted) else (DRAWS, TANGENT)
        common = {"fpr": fpr, "per_class": per_class, "batch_size": batch_size}
        detectors: list[Detector | Baseline] = []
        for key, member in zip(jax.random.split(rng_key, len(members)), members, strict=True):
            if isinstance(member, Beside):
                statistic, readable = lookup(member.statistic), cast(Any, loss_fn)  # who cannot be read is told so
                detectors.append(Baseline.fit(statistic, readable, params, trusted, **common))
                continue
            own = {name: value for name, value in member._asdict().items() if name != "weight"}
            own["layout"] = "auto" if isinstance(member.perturbation, Tangent) else layout
            detectors.append(Detector.fit(key, loss_fn, params, trusted, **own, **common, **settings))
        return cls(tuple(detectors), tuple(member.weight for member in members))

    @cached_property
    def trusted_couplings(self) -> np.ndarray:
        """Float64 `[num_trusted]`: what the coupling of each would be, had it come as a test example."""
        return self._add([detector.trusted_couplings for detector in self.detectors])

    def score(self, examples: Batch, *, progress: bool = False) -> Scores:
        """Scores new examples, of the shapes of the trusted ones."""
        return self._score(examples, progress)[0]

    def score_batch(self, examples: Batch, *, progress: bool = False) -> Scores:
        """Scores new examples as one batch; see `madjax.batch`."""
        alone, losses = self._score(examples, progress)
        return batch.as_batch(self._first.scorer, losses, alone, self.trusted_couplings, fpr=self._first.fpr)

    def add(self, scores: Sequence[Scores]) -> Scores:
        """Scores by all from those by each, of the same examples."""
        couplings, first = self._add([-each.anomaly_score for each in scores]), self._first
        by_class = {"trusted_classes": first.scorer.trusted_classes, "classes": scores[0].prediction}
        p_value = calibration.p_values(self.trusted_couplings, couplings, **(by_class if first.per_class else {}))
        return scores[0]._replace(anomaly_score=-couplings, p_value=p_value, flagged=p_value <= first.fpr)

    def threshold(self) -> float:
        """The coupling under which an example is flagged, where classes are not calibrated each by itself."""
        return calibration.threshold(self.trusted_couplings, self._first.fpr)

    def save(self, path: str | Path) -> None:
        """Writes the detectors to the folder `path`, which is there whole or not at all; see `Detector.save`.

        A statistic is fitted again by `load`, so the trusted examples are written as well.

        Raises:
          ValueError: where `path` exists already, or a statistic is none of `BASELINES`.
        """
        folder = Path(path).absolute()
        if folder.exists():
            raise ValueError(f"path: {folder} exists already")
        part = folder.with_name(folder.name + ".part")
        shutil.rmtree(part, ignore_errors=True)
        for index, detector in enumerate(self.detectors):
            if isinstance(detector, Detector):
                detector.save(part / str(index))
            else:
                settings = {"statistic": _name(detector.statistic), "batch_size": detector.model.batch_size}
                settings |= {"fpr": detector.fpr, "per_class": detector.per_class}
                checkpoint.save(part / str(index), settings, {"trusted": detector.trusted_examples})
        checkpoint.save(part / "weights", {}, {"weights": np.array(self.weights)})
        part.rename(folder)

    @classmethod
    def load(cls, path: str | Path, loss_fn: LossFn, params: Params) -> Ensemble:
        """Reads a saved ensemble, for the model it was fitted on; see `Detector.load`."""
        weights = checkpoint.load(Path(path) / "weights")[1]["weights"].tolist()
        detectors = [_load(Path(path) / str(index), loss_fn, params) for index in range(len(weights))]
        return cls(tuple(detectors), tuple(weights))

    @property
    def _first(self) -> Detector:
        first = self.detectors[0]
        assert isinstance(first, Detector)
        return first

    def _score(self, examples: Batch, progress: bool) -> tuple[Scores, LossMatrix]:
        """Scores of each example by itself, and its losses at the draws of the first detector."""
        losses, classes = self._first.sweep(examples, progress=progress)
        others = [
            each.score(examples, progress=progress) if isinstance(each, Detector) else each.score(examples)
            for each in self.detectors[1:]
        ]
        return self.add([self._first.score_losses(losses, classes), *others]), losses

    def _add(self, couplings: Sequence[np.ndarray]) -> np.ndarray:
        """Of the trusted or of test examples, `[n]` of each detector."""
        total = np.zeros(len(couplings[0]))
        for detector, weight, values in zip(self.detectors, self.weights, couplings, strict=True):
            total += weight * in_deviations(values, detector.trusted_couplings)
        return total


def _name(statistic: Statistic) -> str:
    from madjax.baselines import BASELINES

    for name, known in BASELINES.items():
        if statistic == known:
            return name
    raise ValueError(f"statistic: wanted one of BASELINES, by whose name it is kept, got {statistic}")


def _load(folder: Path, loss_fn: LossFn, params: Params) -> Detector | Baseline:
    from madjax.baselines import Baseline, lookup

    settings = checkpoint.load_settings(folder)
    if "statistic" not in settings:
        return Detector.load(folder, loss_fn, params)
    statistic, trusted = lookup(settings.pop("statistic")), checkpoint.load(folder)[1]["trusted"]
    return Baseline.fit(statistic, cast(Any, loss_fn), params, trusted, **settings)
