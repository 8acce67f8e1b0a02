import numpy as np
import pytest

from madjax.calibration import p_values, threshold
from madjax.coupling import leave_one_out
from madjax.scorer import Scorer


def _traces(rng, count):
    """Exchangeable loss traces: a few shared factors with random weights, and noise."""
    weights = rng.gamma(2.0, size=(3, count))
    return (np.exp(rng.normal(size=(40, 3))) @ weights + 0.5 * rng.gamma(1.0, size=(40, count))).astype(np.float32)


@pytest.mark.parametrize(
    ("name", "traces"), [("mean_correlation", "raw"), ("class_ccc", "raw"), ("topk_ccc", "whitened")]
)
def test_p_values_are_uniform_on_exchangeable_data(name, traces):
    """Trusted and test come from one distribution, so P(p <= a) is a, up to one reference in 60."""
    values = []
    for seed in range(25):
        rng = np.random.default_rng(seed)
        losses, classes = _traces(rng, 160), rng.integers(0, 3, 160)
        scorer = Scorer.fit(losses[:, :60], classes[:60], coupling=name, traces=traces)
        values.append(scorer.score(losses[:, 60:], classes[60:]).p_value)
    values = np.concatenate(values)
    for level in (0.05, 0.1, 0.25, 0.5, 0.75):
        # 25 trusted sets of 60: a standard deviation of about sqrt(level (1 - level) (1/60 + 1/100) / 25)
        tolerance = 4 * np.sqrt(level * (1 - level) * (1 / 60 + 1 / 100) / 25) + 1 / 60
        assert abs(np.mean(values <= level) - level) < tolerance, level


def test_p_values_by_hand():
    trusted = np.array([0.1, 0.2, 0.3])
    np.testing.assert_allclose(p_values(trusted, np.array([0.0, 0.2, 0.25, 9.0])), [1 / 4, 3 / 4, 3 / 4, 1])


def test_mondrian_holds_each_example_against_its_own_class():
    trusted, classes = np.array([0.1, 0.2, 0.8, 0.9]), np.array([0, 0, 1, 1])
    values = p_values(trusted, np.array([0.5, 0.5, 0.5]), trusted_classes=classes, classes=np.array([0, 1, 7]))
    np.testing.assert_allclose(values, [1, 1 / 3, 1])


@pytest.mark.parametrize("fpr", [0.01, 0.05, 0.3])
def test_threshold_agrees_with_p_values(fpr):
    rng = np.random.default_rng(0)
    trusted, test = rng.normal(size=150), rng.normal(size=400)
    np.testing.assert_array_equal(test < threshold(trusted, fpr), p_values(trusted, test) <= fpr)


def test_too_few_trusted_flag_nothing():
    assert threshold(np.arange(18.0), 0.05) == -np.inf
    assert threshold(np.arange(19.0), 0.05) == 0


@pytest.mark.parametrize("traces", ["whitened", "log"])
@pytest.mark.parametrize("coupling", ["topk_ccc", "peer_ccc", "peer_information"])
def test_left_out_of_all_that_it_is_judged_by(coupling, traces):
    """An example must not shape the map, nor the peers, that it is judged by: the fast ways against a refit by hand."""
    losses = _traces(np.random.default_rng(3), 61)
    scorer = Scorer.fit(losses, coupling=coupling, traces=traces)
    for place in (4, 60):
        by_hand = Scorer.fit(np.delete(losses, place, axis=1), coupling=coupling, traces=traces)
        said = -by_hand.score(losses[:, [place]]).anomaly_score[0]
        np.testing.assert_allclose(scorer.trusted_couplings[place], said, rtol=1e-8)


def test_log_traces_are_the_logarithms_as_they_are():
    losses = _traces(np.random.default_rng(3), 21)
    scorer = Scorer.fit(losses, coupling="topk_ccc", traces="log")
    np.testing.assert_allclose(scorer.map(losses[:, :4]), np.log1p(losses[:, :4].astype(float) / 1e-7))
    np.testing.assert_array_equal(scorer.trusted_couplings, leave_one_out("topk_ccc", scorer.map(losses)))


def test_raw_is_leave_one_out():
    rng = np.random.default_rng(3)
    losses, classes = _traces(rng, 21), rng.integers(0, 2, 21)
    scorer = Scorer.fit(losses, classes, coupling="class_ccc", traces="raw")
    np.testing.assert_array_equal(scorer.trusted_couplings, leave_one_out("class_ccc", losses, classes))


def test_bad_input():
    rng = np.random.default_rng(0)
    losses = _traces(rng, 20)
    with pytest.raises(ValueError, match=r"fpr: wanted a rate between 0 and 1, got 1\.5"):
        Scorer.fit(losses).score(losses, fpr=1.5)
    with pytest.raises(
        ValueError, match="traces: wanted one of whitened, margins, plain_margins, log, raw, got 'squared'"
    ):
        Scorer.fit(losses, traces="squared")  # pyright: ignore
    with pytest.raises(ValueError, match="all 20 examples are predicted as class 3"):
        Scorer.fit(losses, np.full(20, 3), coupling="class_ccc")
    with pytest.raises(ValueError, match="no draw changes any loss"):
        Scorer.fit(np.repeat(losses[:1], 5, axis=0))
    bad = losses.copy()
    bad[2, 3] = np.nan
    with pytest.raises(FloatingPointError, match=r"trusted losses: wanted finite numbers, got nan at index \(2, 3\)"):
        Scorer.fit(bad)
    with pytest.raises(ValueError, match="per_class: wanted predicted classes"):
        Scorer.fit(losses).score(losses, per_class=True)
