"""Figures of merit of a detector; scikit-learn computes what it can. Scores are anomaly scores: high = anomalous."""

from __future__ import annotations

import numpy as np
from sklearn.metrics import average_precision_score, roc_auc_score

REPORTED_FPRS = (0.005, 0.01, 0.02, 0.05)


def auroc(benign: np.ndarray, anomalous: np.ndarray) -> float:
    """Area under the ROC curve; NaN where either side is empty."""
    if len(benign) == 0 or len(anomalous) == 0:
        return float("nan")
    return float(roc_auc_score(*_labelled(benign, anomalous)))


def average_precision(benign: np.ndarray, anomalous: np.ndarray) -> float:
    """Average precision with the anomalies as positives; NaN where either side is empty."""
    if len(benign) == 0 or len(anomalous) == 0:
        return float("nan")
    return float(average_precision_score(*_labelled(benign, anomalous)))


def recall_at_fpr(benign: np.ndarray, anomalous: np.ndarray, fpr: float) -> float:
    """Share of anomalies above the lowest threshold that flags at most `fpr` of the benign; NaN where one is empty.

    >>> recall_at_fpr(np.arange(10.0), np.array([8.5, 9.5]), 0.1)
    1.0
    """
    if len(benign) == 0 or len(anomalous) == 0:
        return float("nan")
    allowed = int(np.floor(fpr * len(benign) + 1e-9))
    threshold = np.sort(benign)[::-1][allowed] if allowed < len(benign) else -np.inf
    return float(np.mean(anomalous > threshold))


def fpr_at_recall(benign: np.ndarray, anomalous: np.ndarray, recall: float) -> float:
    """Share of the benign at or above the threshold that catches `recall` of the anomalies; NaN where one is empty.

    At 0.95 OpenOOD's FPR@95 (Zhang et al. 2023, arXiv 2306.09301).

    >>> fpr_at_recall(np.array([0.0, 1.0, 2.0, 3.0]), np.array([1.5, 4.0, 5.0, 6.0]), 0.75)
    0.0
    """
    if len(benign) == 0 or len(anomalous) == 0:
        return float("nan")
    wanted = int(np.ceil(recall * len(anomalous) - 1e-9))
    return float(np.mean(benign >= np.sort(anomalous)[::-1][max(wanted, 1) - 1]))


def auroc_same_prediction(
    benign: np.ndarray, anomalous: np.ndarray, benign_classes: np.ndarray, anomalous_classes: np.ndarray
) -> float:
    """AUROC among examples of one predicted class, averaged over classes by their number of anomalies.

    Harder than `auroc`: a backdoor's examples all share the target class, and this cannot be won by naming it. NaN
    where no class holds both.
    """
    values, weights = [], []
    for label in np.unique(anomalous_classes):
        value = auroc(benign[benign_classes == label], anomalous[anomalous_classes == label])
        if not np.isnan(value):
            values.append(value)
            weights.append(np.sum(anomalous_classes == label))
    return float(np.average(values, weights=weights)) if values else float("nan")


def detection_effectiveness_rate(accuracy: float, asr: float, fpr: float, tpr: float) -> float:
    """BackdoorBench's DER for a detector that rejects what it flags: (ASR · TPR - ACC · FPR + 1) / 2.

    Args:
      accuracy: of the undefended model on clean examples.
      asr: attack success rate of the undefended model.
      fpr, tpr: of the detector, on benign and anomalous examples.

    >>> detection_effectiveness_rate(0.9, 1.0, 0.0, 1.0)
    1.0
    """
    return (asr * tpr - accuracy * fpr + 1) / 2


def _labelled(benign: np.ndarray, anomalous: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.r_[np.zeros(len(benign)), np.ones(len(anomalous))], np.r_[benign, anomalous]
