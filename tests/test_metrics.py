import numpy as np
import pytest

from madjax import metrics


def test_recall_at_fpr_against_a_scan_of_thresholds():
    rng = np.random.default_rng(0)
    benign, anomalous = rng.normal(size=200), rng.normal(1.0, size=150)
    for fpr in metrics.REPORTED_FPRS:
        best = max(np.mean(anomalous > t) for t in np.r_[benign, anomalous, -9.0] if np.mean(benign > t) <= fpr)
        assert metrics.recall_at_fpr(benign, anomalous, fpr) == best


def test_auroc_is_the_chance_to_rank_a_pair_rightly():
    rng = np.random.default_rng(0)
    benign, anomalous = rng.integers(0, 9, 40), rng.integers(3, 12, 30)
    pairs = (anomalous[:, None] > benign) + 0.5 * (anomalous[:, None] == benign)
    assert metrics.auroc(benign, anomalous) == pytest.approx(pairs.mean())


def test_auroc_within_one_prediction_is_not_won_by_naming_the_class():
    benign_classes = np.array([0] * 50 + [1] * 50)
    benign = benign_classes + np.tile(np.linspace(0, 0.9, 50), 2)
    anomalous = 1 + np.linspace(0, 0.9, 50)
    assert metrics.auroc(benign, anomalous) > 0.7
    assert metrics.auroc_same_prediction(benign, anomalous, benign_classes, np.ones(50)) == pytest.approx(0.5)


def test_der():
    # ASR' = ASR (1 - TPR), ACC' = ACC (1 - FPR), DER = (max(0, dASR) - max(0, dACC) + 1) / 2
    acc, asr, fpr, tpr = 0.92, 0.97, 0.04, 0.8
    by_definition = (asr - asr * (1 - tpr) - (acc - acc * (1 - fpr)) + 1) / 2
    assert metrics.detection_effectiveness_rate(acc, asr, fpr, tpr) == pytest.approx(by_definition)


def test_nothing_to_detect_is_nan():
    assert np.isnan(metrics.auroc(np.arange(3.0), np.zeros(0)))
    assert np.isnan(metrics.average_precision(np.arange(3.0), np.zeros(0)))
    assert np.isnan(metrics.recall_at_fpr(np.zeros(0), np.arange(3.0), 0.1))


def test_fpr_at_recall_is_that_of_the_strictest_threshold_which_catches_enough():
    rng = np.random.default_rng(0)
    benign, anomalous = rng.normal(size=300).round(1), rng.normal(1, size=201).round(1)
    rates = [np.mean(benign >= t) for t in np.unique(anomalous) if np.mean(anomalous >= t) >= 0.95]
    assert metrics.fpr_at_recall(benign, anomalous, 0.95) == min(rates)
    assert np.isnan(metrics.fpr_at_recall(benign, anomalous[:0], 0.95))
