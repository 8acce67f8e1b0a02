"""Sequential stopping: a test example is swept at further draws only while its verdict may still change.

A verdict after the first m draws differs from that after all of them where the p-value at m lies near the wanted
false-positive rate. How near is read off the trusted examples, whose verdicts at m and at the end are both known: the
p-values at m between the smallest of a trusted example that ends unflagged and the largest of one that ends flagged are
the undecided ones. A test example outside stops there. `docs/performance.md` says what that saves and how many verdicts
it changes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from madjax.calibration import p_values
from madjax.detector import Detector, check_shapes, explain
from madjax.sampling.draws import Draws, Walk, WalkState
from madjax.sampling.tangent import TangentDraws
from madjax.scorer import Scorer, Scores
from madjax.sweep import loss_matrix
from madjax.types import Batch, Params, num_examples


class StoppedScores(NamedTuple):
    """Scores, each after as many draws as its verdict took.

    Attributes:
      scores: as of `Detector.score`; couplings of fewer draws are brought to the mean and the standard deviation that
        the trusted ones have at all draws, so that anomaly scores compare.
      num_draws: `[num_test]`, the draws each example was swept at.
    """

    scores: Scores
    num_draws: np.ndarray


class _Look(NamedTuple):
    """The detector after its first `num_draws` draws, and the p-values at which nothing is settled yet."""

    num_draws: int
    scorer: Scorer
    undecided: tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Sequential:
    """A fitted detector that stops early.

    >>> sequential = Sequential.fit(detector)  # doctest: +SKIP
    >>> scores, num_draws = sequential.score({"image": images})  # doctest: +SKIP

    Attributes:
      detector: the detector itself, with all its draws.
      looks: when verdicts are looked at, the last time after all draws.
    """

    detector: Detector
    looks: tuple[_Look, ...]

    @classmethod
    def fit(cls, detector: Detector, num_draws: Sequence[int] | None = None) -> Sequential:
        """Finds out from the trusted losses when a verdict is settled; no forward pass is made.

        Args:
          detector: a fitted one.
          num_draws: at how many draws to look; a quarter and a half of the detector's where not given.

        Raises:
          ValueError: counts that do not ascend, or are not between 2 and the detector's; a tangent, all of whose draws
            come of one gradient.
        """
        if isinstance(detector.draws, TangentDraws):
            raise ValueError("detector: all draws of a tangent come of one gradient, and none can be spared")
        every = detector.draws.num_draws
        counts = [max(2, every // 4), max(3, every // 2)] if num_draws is None else list(num_draws)
        if any(a >= b for a, b in zip([1, *counts], [*counts, every], strict=True)):
            raise ValueError(f"num_draws: wanted ascending counts from 2 to below {every}, got {counts}")
        scorer, looks = detector.scorer, []
        at_the_end = _trusted_p_values(detector, scorer) <= detector.fpr
        for count in counts:
            early = Scorer.fit(
                scorer.trusted[:count], scorer.trusted_classes, coupling=scorer.coupling, traces=scorer.traces
            )
            p_value = _trusted_p_values(detector, early)
            undecided = (p_value[~at_the_end].min(initial=1.0), p_value[at_the_end].max(initial=0.0))
            looks.append(_Look(count, early, undecided))
        return cls(detector, (*looks, _Look(every, scorer, (1.0, 0.0))))

    def score(self, examples: Batch) -> StoppedScores:
        """Scores new examples, of the shapes of the trusted ones."""
        detector = self.detector
        check_shapes(examples, detector.example_shapes)
        examples = explain(detector.loss_fn, detector.params, examples, "examples")
        count = num_examples(examples)
        losses = np.empty((self.looks[-1].num_draws, count), np.float32)
        open_ones, swept, parts = np.arange(count), 0, []
        for look in self.looks:
            draws = _Window(detector.draws, swept, look.num_draws)
            losses[swept : look.num_draws, open_ones] = self._sweep(draws, examples, open_ones)
            swept = look.num_draws
            scores, settled = self._judge(look, losses[:swept, open_ones], examples, open_ones)
            stopped = np.flatnonzero(settled)
            parts.append((open_ones[stopped], jax.tree.map(lambda values, at=stopped: values[at], scores), swept))
            open_ones = open_ones[~settled]
            if not len(open_ones):
                break
        order = np.argsort(np.concatenate([index for index, _, _ in parts]))
        merged = jax.tree.map(lambda *values: np.concatenate(values)[order], *(scores for _, scores, _ in parts))
        num_draws = np.concatenate([np.full(len(index), swept) for index, _, swept in parts])[order]
        return StoppedScores(merged, num_draws)

    def _sweep(self, draws: Draws, examples: Batch, index: np.ndarray) -> np.ndarray:
        # sizes are powers of two, so that few programs are compiled however many examples are still open
        size = min(num_examples(examples), 1 << (len(index) - 1).bit_length())
        padded = np.resize(index, size)
        some = jax.tree.map(lambda leaf: np.asarray(leaf)[padded], examples)
        detector = self.detector
        losses = loss_matrix(
            detector.loss_fn, draws, some, layout=detector.layout, batch_size=detector.batch_size,
            model_shards=detector.model_shards,
        )  # fmt: skip
        return losses[:, : len(index)]

    def _judge(self, look: _Look, losses: np.ndarray, examples: Any, index: np.ndarray) -> tuple[Scores, np.ndarray]:
        """Scores on the scale of all draws, and whether each verdict is settled."""
        detector = self.detector
        classes = np.asarray(examples["label"])[index] if detector.scorer.trusted_classes is not None else None
        scores = look.scorer.score(losses, classes, fpr=detector.fpr, per_class=detector.per_class)
        low, high = look.undecided
        here, end = look.scorer.trusted_couplings, detector.scorer.trusted_couplings
        standard = (-scores.anomaly_score - here.mean()) / max(float(here.std()), np.finfo(float).tiny)
        anomaly_score = -(end.mean() + end.std() * standard)
        return scores._replace(anomaly_score=anomaly_score), (scores.p_value < low) | (scores.p_value > high)


def _trusted_p_values(detector: Detector, scorer: Scorer) -> np.ndarray:
    couplings, classes = scorer.trusted_couplings, scorer.trusted_classes if detector.per_class else None
    return p_values(couplings, couplings, trusted_classes=classes, classes=classes)


@dataclasses.dataclass(frozen=True)
class _Range:
    """Of draws. All are equal to JAX, so that the windows of one set of draws share one compiled program."""

    start: int
    stop: int

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Range)

    def __hash__(self) -> int:
        return 0


@jax.tree_util.register_pytree_node_class
class _Window:
    """The draws from `start` to `stop` of a set."""

    def __init__(self, draws: Draws, start: int, stop: int):
        self._draws, self._range = draws, _Range(start, stop)

    def tree_flatten(self) -> tuple[tuple[Draws], _Range]:
        return (self._draws,), self._range

    @classmethod
    def tree_unflatten(cls, between: _Range, children: tuple[Draws]) -> _Window:
        return cls(children[0], between.start, between.stop)

    @property
    def num_draws(self) -> int:
        return self._range.stop - self._range.start

    @property
    def drawn(self) -> tuple[bool, ...] | None:
        return self._draws.drawn

    def items(self, start: int = 0, state: WalkState | None = None) -> Walk:
        return _Leading(self._draws.items(self._range.start + start, state), self.num_draws - start)

    def any_item(self) -> Any:
        return self._draws.any_item()

    def params(self, item: Any) -> Params:
        return self._draws.params(item)


@dataclasses.dataclass
class _Leading:
    """The next `count` items of a walk."""

    walk: Walk
    count: int

    def __iter__(self) -> _Leading:
        return self

    def __next__(self) -> Any:
        if not self.count:
            raise StopIteration
        self.count -= 1
        return next(self.walk)

    def state(self) -> WalkState | None:
        return self.walk.state()

    def info(self) -> dict[str, list[float]]:
        return self.walk.info()
