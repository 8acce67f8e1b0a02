import jax
import numpy as np
import pytest

from madjax import Detector, batch, coupling
from madjax.calibration import p_values
from madjax.metrics import auroc
from madjax.scorer import Scorer
from madjax.traces import fit_trace_map
from tests.test_detector import images as images  # a fixture
from tests.test_detector import model as model  # a fixture


def losses_of(rng, direction, num_examples, own=1.0):
    """Of one mechanism: losses at 60 draws that share a direction, to a different extent each."""
    extents = rng.normal(1, 0.2, num_examples)
    noise = own * rng.normal(size=(60, num_examples))
    return np.exp(direction[:, None] * extents + noise - 5).astype(np.float32)


def usual(rng, num_examples):
    return losses_of(rng, np.random.default_rng(8).normal(size=60), num_examples)


def odd(rng, num_examples):
    """What usual ones share, and as much that they share among themselves; alone each looks nearly usual."""
    shared, own = np.random.default_rng(8).normal(size=60), np.random.default_rng(9).normal(size=60)
    return losses_of(rng, 0.9 * (shared + own), num_examples, own=0.7)


def as_batch(scorer, losses, classes=None, fpr=0.05):
    return batch.as_batch(scorer, losses, scorer.score(losses, classes, fpr=fpr), scorer.trusted_couplings, fpr=fpr)


def test_a_batch_tells_what_an_example_alone_does_not():
    rng = np.random.default_rng(0)
    scorer = Scorer.fit(usual(rng, 150), coupling="topk_ccc", traces="log")
    for num_odd in (12, 100):
        losses = np.hstack([usual(rng, 100), odd(rng, num_odd)])
        alone, together = scorer.score(losses), as_batch(scorer, losses)
        one, all_of_them = (
            auroc(scores.anomaly_score[:100], scores.anomaly_score[100:]) for scores in (alone, together)
        )
        assert one < 0.8
        assert all_of_them > 0.99
        assert together.flagged[100:].mean() > 0.9
        np.testing.assert_array_equal(together.nearest, alone.nearest)


def test_by_hand():
    rng = np.random.default_rng(1)
    trusted, losses, classes = usual(rng, 30), usual(rng, 20), rng.integers(0, 3, 50)
    scorer = Scorer.fit(trusted, classes[:30])
    scores = as_batch(scorer, losses, classes[30:], fpr=0.1)
    between, within = (coupling.pairs("ccc", scorer.map(x), scorer.map(losses)) for x in (trusted, losses))

    def top(values, without=None):
        values = values.reshape(-1)
        return np.sort(values if without is None else np.delete(values, without))[-10:].mean()

    own = []
    for i in range(30):
        without = fit_trace_map(np.delete(trusted, i, axis=1))
        here = without(trusted[:, i : i + 1])
        own.append(
            top(coupling.pairs("ccc", without(np.delete(trusted, i, axis=1)), here))
            - top(coupling.pairs("ccc", without(losses), here))
        )
    own = np.array(own)
    told = np.array([top(between[:, j]) - top(within[j], j) for j in range(20)])
    alone = -scorer.score(losses, classes[30:]).anomaly_score
    coupled = scorer.trusted_couplings
    wanted = (alone - coupled.mean()) / coupled.std() + (told - own.mean()) / own.std() / 2
    np.testing.assert_allclose(-scores.anomaly_score, wanted)
    known_sums = (coupled - coupled.mean()) / coupled.std() + (own - own.mean()) / own.std() / 2
    np.testing.assert_array_equal(scores.p_value, p_values(known_sums, wanted))
    np.testing.assert_array_equal(scores.flagged, scores.p_value <= 0.1)


@pytest.mark.parametrize("num_trusted", [40, 300])
@pytest.mark.parametrize("num_test", [15, 150])
def test_where_nothing_is_odd_few_are_flagged(num_trusted, num_test):
    rng = np.random.default_rng(2)
    rates = []
    for _ in range(12):
        scorer = Scorer.fit(usual(rng, num_trusted), np.arange(num_trusted) % 3)
        rates.append(as_batch(scorer, usual(rng, num_test), np.arange(num_test) % 3, fpr=0.1).flagged.mean())
    assert 0.02 < np.mean(rates) < 0.15


def test_a_detector_scores_a_batch(model, images):
    detector = Detector.fit(jax.random.key(0), *model, {"image": images[:40]}, num_draws=8, layout="host", fpr=0.2)
    scores = batch.score_batch(detector, {"image": images[40:]})
    losses, classes = detector.sweep({"image": images[40:]})
    np.testing.assert_allclose(scores.anomaly_score, as_batch(detector.scorer, losses, classes, fpr=0.2).anomaly_score)
    with pytest.raises(ValueError, match="losses: wanted a batch of 11 examples at least, got 10"):
        batch.score_batch(detector, {"image": images[:10]})
