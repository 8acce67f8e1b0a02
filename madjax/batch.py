"""Scores of a batch as a whole: do trusted examples explain an output, or rather the others of its batch?

The images of one trigger move together more than usual images of a class do, and some look like the class all the same:
each by itself is explained. But its batch explains it better, if others in it rest on the same mechanism, and a usual
example is explained alike by both. So, with what the ten nearest tell (`topk_ccc`),

    coupling + 1/2 (from the trusted - from the other test examples),

each in trusted standard deviations; the coupling is that of a detector or an ensemble, and of a trusted example, the
others of its set stand for the trusted. Where nothing is anomalous, p-values hold as in `madjax.calibration`.

What is said of an example depends on its batch: one anomaly alone is found by its coupling or not at all, and trusted
examples from elsewhere than the usual test ones make all of those suspicious. Half weight finds many anomalies as well
as whole weight does, and costs a single one little (`docs/choosing-the-scale.md`).
"""

from __future__ import annotations

import numpy as np
from threadpoolctl import threadpool_limits

from madjax import calibration
from madjax.coupling import TOP_K, couplings, leave_one_out
from madjax.detector import Detector
from madjax.scorer import Scorer, Scores
from madjax.standardize import in_deviations
from madjax.types import Batch, LossMatrix

WEIGHT = 0.5
# trusted examples are left out in at most so many groups
_FOLDS = 64


def score_batch(detector: Detector, examples: Batch, *, progress: bool = False) -> Scores:
    """Scores new examples as one batch, by a fitted detector; `Ensemble.score_batch` does by several."""
    losses, classes = detector.sweep(examples, progress=progress)
    alone = detector.score_losses(losses, classes)
    return as_batch(detector.scorer, losses, alone, detector.trusted_couplings, fpr=detector.fpr)


def as_batch(
    scorer: Scorer, losses: LossMatrix, alone: Scores, trusted_couplings: np.ndarray, *, fpr: float = 0.05
) -> Scores:
    """Scores of a batch from losses `[num_draws, num_test]` at the trusted draws, and what is said of each by itself.

    Args:
      alone, trusted_couplings: by the scorer, or by an ensemble that it is part of.

    Raises:
      ValueError: a batch of fewer examples than are asked of it, `TOP_K` beside each.
    """
    num_test = losses.shape[1]
    if num_test <= TOP_K:
        raise ValueError(f"losses: wanted a batch of {TOP_K + 1} examples at least, got {num_test}")
    trusted, test = scorer.map(scorer.trusted), scorer.map(losses)
    rather_of_test = couplings("topk_ccc", trusted, test) - leave_one_out("topk_ccc", test)
    # the map of traces fits those that it was fitted to better, so a trusted example is left out of it as well
    rather = np.empty(trusted.shape[1])
    with threadpool_limits(1):  # as in a scorer's fit
        for held_out, trace_map in scorer.maps_without(_FOLDS):
            trusted, test = trace_map(scorer.trusted), trace_map(losses)
            one, others = trusted[:, held_out], np.delete(trusted, held_out, axis=1)
            rather[held_out] = couplings("topk_ccc", others, one) - couplings("topk_ccc", test, one)
    known = in_deviations(trusted_couplings, trusted_couplings) + WEIGHT * in_deviations(rather, rather)
    values = in_deviations(-alone.anomaly_score, trusted_couplings) + WEIGHT * in_deviations(rather_of_test, rather)
    p_value = calibration.p_values(known, values)
    return alone._replace(anomaly_score=-values, p_value=p_value, flagged=p_value <= fpr)
