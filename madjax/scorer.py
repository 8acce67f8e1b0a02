"""From loss matrices to scores: traces, couplings and calibration of one trusted set, without a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Literal, NamedTuple, get_args

import numpy as np
from threadpoolctl import threadpool_limits

from madjax import calibration
from madjax.coupling import DEFAULT, couplings, leave_one_out, lookup, nearest
from madjax.sampling.diagnostics import ensure_finite
from madjax.standardize import standardize, standardize_trusted
from madjax.traces import SMALL_LOSS, TraceMap, TraceMapFit, folds, least_loss, log_map
from madjax.types import LossMatrix

Traces = Literal["whitened", "margins", "plain_margins", "log", "raw"]

# trusted examples are left out in at most so many groups, each of which needs a trace map of its own
_MAX_FOLDS = 256


class Scores(NamedTuple):
    """What is said of each test example, arrays of `[num_test]`.

    Attributes:
      anomaly_score: minus the coupling; high = anomalous.
      p_value: conformal, see `madjax.calibration`; small = anomalous.
      flagged: p_value at most the wanted false-positive rate.
      prediction: the model's own output; None where examples have no class.
      nearest: int `[num_test, 3]`, the trusted examples it couples with most, the closest first.
    """

    anomaly_score: np.ndarray
    p_value: np.ndarray
    flagged: np.ndarray
    prediction: np.ndarray | None
    nearest: np.ndarray


@dataclasses.dataclass(frozen=True)
class Scorer:
    """A trusted set's losses and how others are held against them.

    Attributes:
      coupling: a name in `COUPLINGS`.
      traces: "whitened", "margins", "plain_margins" or "log" (see `madjax.traces`), or "raw", the losses as they are.
      trusted: `[num_draws, num_trusted]` losses.
      trusted_classes: `[num_trusted]` predicted classes, or clusters where the coupling is over those, or None.
      left_out: `[num_trusted]`, the coupling of each with the others, not standardized.
      trace_map: None for "raw" traces.
      num_parts: see `madjax.coupling.couplings`.
    """

    coupling: str
    traces: Traces
    trusted: LossMatrix
    trusted_classes: np.ndarray | None
    left_out: np.ndarray
    trace_map: TraceMap | None
    num_parts: int = 1

    @classmethod
    def fit(
        cls,
        trusted: LossMatrix,
        trusted_classes: np.ndarray | None = None,
        *,
        coupling: str = DEFAULT,
        traces: Traces = "whitened",
        num_parts: int = 1,
    ) -> Scorer:
        """Calibrates on the trusted losses, leaving each example out of what it is held against.

        Raises:
          ValueError: fewer than two trusted examples, one predicted class alone where the coupling is over classes,
            losses that no draw changes.
          FloatingPointError: losses that are not finite.
        """
        if traces not in get_args(Traces):
            raise ValueError(f"traces: wanted one of {', '.join(get_args(Traces))}, got {traces!r}")
        if trusted.ndim != 2 or trusted.shape[0] < 2 or trusted.shape[1] < 2:
            raise ValueError(f"trusted: wanted losses of at least 2 draws and 2 examples, got {trusted.shape}")
        ensure_finite(trusted, "trusted losses")
        if (trusted == trusted[:1]).all():
            raise ValueError("trusted: no draw changes any loss (all traces are constant); raise the scale")
        needs_classes = lookup(coupling).reduction == "class"
        if needs_classes and trusted_classes is not None and len(np.unique(trusted_classes)) < 2:
            raise ValueError(
                f"trusted: all {len(trusted_classes)} examples are predicted as class {trusted_classes[0]}; coupling "
                f"{coupling!r} needs two classes at least ({DEFAULT} and mean_ccc do not)"
            )
        fit, trace_map = None, None
        if traces == "log":
            trace_map = log_map(len(trusted))
        elif traces != "raw":
            least = SMALL_LOSS if traces == "whitened" else least_loss(trusted)
            fit = TraceMapFit(trusted, least, whiten=traces != "plain_margins")
            trace_map = fit.without(np.zeros(0, int))
        mapped = trusted if trace_map is None else trace_map(trusted)
        if lookup(coupling).reduction == "cluster":
            trusted_classes = _clusters(mapped)
        if fit is None:
            left_out = leave_one_out(coupling, mapped, trusted_classes, num_parts=num_parts)
        else:
            left_out = _leave_out_with_map(coupling, trusted, trusted_classes, num_parts, fit)
        return cls(coupling, traces, trusted, trusted_classes, left_out, trace_map, num_parts)

    @cached_property
    def trusted_couplings(self) -> np.ndarray:
        """Float64 `[num_trusted]`: what the coupling of each would be, had it come as a test example."""
        if self.trusted_classes is None or not lookup(self.coupling).standardized:
            return self.left_out
        return standardize_trusted(self.left_out, self.trusted_classes)

    def maps_without(self, most: int) -> Iterator[tuple[np.ndarray, Callable[[LossMatrix], np.ndarray]]]:
        """Who is left out in each of at most so many groups, and the map of losses that is fitted to the others."""
        fit = None
        if self.trace_map is not None and self.traces != "log":
            fit = TraceMapFit(self.trusted, self.trace_map.least, whiten=self.trace_map.root is not None)
        for held_out in folds(self.trusted.shape[1], most):
            yield held_out, self.map if fit is None else fit.without(held_out)

    def map(self, losses: LossMatrix) -> np.ndarray:
        """The traces of losses at the trusted draws."""
        return losses if self.trace_map is None else self.trace_map(losses)

    def score(
        self, losses: LossMatrix, classes: np.ndarray | None = None, *, fpr: float = 0.05, per_class: bool = False
    ) -> Scores:
        """Scores of test examples from their losses `[num_draws, num_test]`.

        Args:
          classes: `[num_test]` predicted classes.
          fpr: the false-positive rate that `flagged` is calibrated for.
          per_class: calibrate each predicted class by itself (Mondrian): the rate then holds within every class, at the
            price of the finite-sample limit of the smallest.
        """
        calibration.check_fpr(fpr)
        ensure_finite(losses, "test losses")
        if per_class and (classes is None or self.trusted_classes is None):
            raise ValueError("per_class: wanted predicted classes of the trusted and of the test examples, got none")
        trusted, test = self.map(self.trusted), self.map(losses)
        values = couplings(
            self.coupling, trusted, test, self.trusted_classes, classes=classes, num_parts=self.num_parts
        )
        if lookup(self.coupling).standardized and self.trusted_classes is not None:
            if classes is None:
                raise ValueError(f"classes: coupling {self.coupling!r} wanted those of the test examples, got none")
            values = standardize(values, classes, self.left_out, self.trusted_classes)
        p_value = calibration.p_values(
            self.trusted_couplings,
            values,
            trusted_classes=self.trusted_classes if per_class else None,
            classes=classes if per_class else None,
        )
        closest, _ = nearest(self.coupling, trusted, test)
        return Scores(-values, p_value, p_value <= fpr, classes, closest)


def _clusters(traces: np.ndarray) -> np.ndarray:
    """Int `[num_examples]`: at most ten groups of traces that move alike, of twenty or more on average."""
    from sklearn.cluster import KMeans  # takes seconds to import, and few couplings need it

    centered = traces - traces.mean(0)
    directions = centered / np.maximum(np.linalg.norm(centered, axis=0), np.finfo(float).tiny)
    count = max(2, min(10, traces.shape[1] // 20))
    with threadpool_limits(1):
        return np.asarray(KMeans(count, random_state=0).fit_predict(directions.T))


def _leave_out_with_map(
    name: str, trusted: LossMatrix, classes: np.ndarray | None, num_parts: int, fit: TraceMapFit
) -> np.ndarray:
    """Couplings of the trusted examples, left out of the trace map as well as of the references."""
    count = trusted.shape[1]
    result = np.empty(count)
    # matrices this small are slower on several threads, a hundred times so beside another busy process
    with threadpool_limits(1):
        for held_out in folds(count, _MAX_FOLDS):
            kept = np.delete(np.arange(count), held_out)
            mapped = fit.without(held_out)(trusted)
            result[held_out] = couplings(
                name, mapped[:, kept], mapped[:, held_out], None if classes is None else classes[kept],
                classes=None if classes is None else classes[held_out], num_parts=num_parts,
            )  # fmt: skip
    return result
