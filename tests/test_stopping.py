import jax
import numpy as np
import pytest

from madjax import Detector, stopping
from madjax.scorer import Scorer
from madjax.stopping import Sequential
from madjax.sweep import loss_matrix
from tests.test_detector import _chain, images, model  # noqa: F401 - fixtures


@pytest.fixture(scope="module")
def detector(model, images):  # noqa: F811
    return Detector.fit(
        jax.random.key(0), *model, {"image": images[:40]}, num_draws=24, layout="host", coupling="topk_ccc", fpr=0.2
    )


@pytest.fixture(scope="module")
def tests(images):  # noqa: F811
    """Of the trusted kind, and noise of another."""
    other = np.random.default_rng(5).integers(0, 60, (20, 8, 8, 1)).astype(np.uint8)
    return {"image": np.concatenate([images[40:75], other])}


def test_those_that_stop_have_the_scores_of_the_leading_draws(detector, tests):
    scores, num_draws = Sequential.fit(detector, [6, 12]).score(tests)
    assert set(num_draws) == {6, 12, 24}
    losses, classes = detector.sweep(tests)
    trusted = detector.scorer
    for count in (6, 12, 24):
        at = num_draws == count
        early = Scorer.fit(trusted.trusted[:count], trusted.trusted_classes, coupling="topk_ccc")
        wanted = early.score(losses[:count, at], classes[at], fpr=0.2)
        np.testing.assert_allclose(scores.p_value[at], wanted.p_value)
        np.testing.assert_array_equal(scores.flagged[at], wanted.flagged)
        np.testing.assert_array_equal(scores.prediction[at], classes[at])
        # a positive affine map of the early couplings, the identity at all draws
        slope, offset = np.polyfit(wanted.anomaly_score, scores.anomaly_score[at], 1)
        mapped = slope * wanted.anomaly_score + offset
        np.testing.assert_allclose(mapped, scores.anomaly_score[at], rtol=1e-5, atol=1e-6)
        assert slope > 0
        if count == 24:
            np.testing.assert_allclose(scores.anomaly_score[at], wanted.anomaly_score, rtol=1e-5)


def test_no_trusted_example_would_have_stopped_with_another_verdict(detector):
    sequential = Sequential.fit(detector, [6])
    couplings = detector.scorer.trusted_couplings
    rank = (couplings[:, None] >= couplings).sum(1)
    at_the_end = (1 + rank) / (len(couplings) + 1) <= detector.fpr
    early = sequential.looks[0].scorer.trusted_couplings
    p_value = (1 + (early[:, None] >= early).sum(1)) / (len(early) + 1)
    low, high = sequential.looks[0].undecided
    assert not at_the_end[p_value > high].any()
    assert at_the_end[p_value < low].all()
    assert (p_value > high).any()


def test_an_example_that_stopped_costs_no_further_pass(detector, tests, monkeypatch):
    passes = []

    def counting(loss_fn, draws, examples, **options):
        passes.append((draws.num_draws, len(examples["label"])))
        return loss_matrix(loss_fn, draws, examples, **options)

    monkeypatch.setattr(stopping, "loss_matrix", counting)
    _, num_draws = Sequential.fit(detector, [6]).score(tests)
    still_open = int((num_draws > 6).sum())
    assert 0 < still_open < 55
    # the second sweep is padded to a power of two
    assert passes == [(6, 55), (18, min(55, 1 << (still_open - 1).bit_length()))]


def test_chains_and_one_example(model, images):  # noqa: F811
    sampling = {"image": images[:40], "label": np.arange(40, dtype=np.int32) % 10}
    detector = Detector.fit(
        jax.random.key(0), *model, {"image": images[:40]}, sampling=sampling, perturbation=_chain(), num_draws=12,
        layout="host",
    )  # fmt: skip
    scores, num_draws = Sequential.fit(detector).score({"image": images[40:41]})
    assert scores.p_value.shape == num_draws.shape == (1,)


@pytest.mark.parametrize("counts", [[1, 6], [6, 6], [12, 6], [24], [6, 30]])
def test_bad_counts(detector, counts):
    with pytest.raises(ValueError, match="num_draws: wanted ascending counts from 2 to below 24"):
        Sequential.fit(detector, counts)
