import numpy as np
import pytest

from madjax.scorer import Scorer
from madjax.standardize import MEAN_PRIOR, VARIANCE_PRIOR, standardize, standardize_trusted


@pytest.fixture(scope="module")
def trusted():
    """Couplings of 40 trusted examples in three classes: an easy one, a hard one, and one of two members."""
    rng = np.random.default_rng(0)
    classes = np.repeat([0, 4, 7], [20, 18, 2])
    return rng.normal(np.array([0.9, 0.4, 0.6])[np.searchsorted([0, 4, 7], classes)], 0.05), classes


def by_hand(value, members, values, classes):
    within = [values[classes == label] - values[classes == label].mean() for label in np.unique(classes)]
    variance = np.square(np.concatenate(within)).sum() / (len(values) - len(within))
    mean = (sum(members) + MEAN_PRIOR * values.mean()) / (len(members) + MEAN_PRIOR)
    square = sum((member - mean) ** 2 for member in members)
    within_class = (value - mean) / np.sqrt((square + VARIANCE_PRIOR * variance) / (len(members) + VARIANCE_PRIOR))
    return min(within_class, (value - values.mean()) / values.std())


def test_each_is_held_against_all_and_its_class(trusted):
    values, classes = trusted
    test, labels = np.array([0.75, 0.4, 0.75, 0.75]), np.array([0, 4, 7, 9])
    result = standardize(test, labels, values, classes)
    wanted = [
        by_hand(value, values[classes == label], values, classes) for value, label in zip(test, labels, strict=True)
    ]
    np.testing.assert_allclose(result, wanted)
    # above the mean of all, but far below what is usual in the easy class
    assert result[0] < -2 < 0 < (0.75 - values.mean())
    # usual in the hard class, but less explained than others
    assert result[1] == (0.4 - values.mean()) / values.std()


def test_a_trusted_example_is_left_out_of_its_class(trusted):
    values, classes = trusted
    wanted = [
        by_hand(values[i], np.delete(values, i)[np.delete(classes, i) == classes[i]], values, classes)
        for i in range(len(values))
    ]
    np.testing.assert_allclose(standardize_trusted(values, classes), wanted)


def test_units_and_order_do_not_matter(trusted):
    values, classes = trusted
    test, labels = np.linspace(0, 1, 7), np.array([0, 4, 7, 9, 0, 4, 7])
    order = np.random.default_rng(1).permutation(len(values))
    again = standardize(3 * test - 2, labels, (3 * values - 2)[order], classes[order])
    np.testing.assert_allclose(again, standardize(test, labels, values, classes))


def test_equal_couplings_are_no_division_by_zero():
    values, classes = np.full(6, 0.5), np.array([0, 0, 0, 1, 1, 1])
    result = standardize(np.array([0.5, 0.4, 0.6]), np.array([0, 1, 0]), values, classes)
    assert np.isfinite(result).all()
    assert result[0] == 0
    assert result[1] < -1e3
    assert result[2] > 1e3


def test_a_scorer_standardizes_trusted_and_test_alike():
    rng = np.random.default_rng(2)
    losses, classes = rng.gamma(1, size=(24, 40)).astype(np.float32), rng.integers(0, 3, 40)
    plain, scorer = (Scorer.fit(losses, classes, coupling=name) for name in ("topk_class_ccc", "standardized_ccc"))
    test, labels = rng.gamma(1, size=(24, 9)).astype(np.float32), rng.integers(0, 3, 9)
    wanted = standardize(-plain.score(test, labels).anomaly_score, labels, plain.left_out, classes)
    np.testing.assert_allclose(-scorer.score(test, labels).anomaly_score, wanted)
    np.testing.assert_allclose(scorer.trusted_couplings, standardize_trusted(plain.left_out, classes))
    with pytest.raises(ValueError, match="classes: coupling 'standardized_ccc' wanted those of the test examples"):
        scorer.score(test)
    # without classes it is held against its peers
    classless = Scorer.fit(losses, coupling="standardized_ccc").score(test)
    np.testing.assert_array_equal(
        classless.anomaly_score, Scorer.fit(losses, coupling="peer_ccc").score(test).anomaly_score
    )
