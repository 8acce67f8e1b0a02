"""Profiles against loops over examples, and what they find that a sum over parts does not."""

import numpy as np
import pytest

from madjax import coupling, profile
from madjax.metrics import auroc
from madjax.scorer import Scorer
from madjax.standardize import standardize, standardize_trusted
from tests import oracles

NUM_PARTS, DRAWS_OF_EACH = 3, 40


@pytest.fixture(scope="module")
def traces():
    """Classes of 12, 9 and 1 that share directions, the last one's with nobody, and test examples of the first two."""
    rng = np.random.default_rng(0)
    shared = rng.normal(size=(3, NUM_PARTS * DRAWS_OF_EACH, 2))

    def make(classes):
        weights = rng.normal(size=(len(classes), 2)) + 1
        noise = rng.normal(size=(len(shared[0]), len(classes)))
        return np.stack([shared[label] @ w for label, w in zip(classes, weights, strict=True)], 1) + noise

    trusted_classes, classes = np.repeat([0, 4, 7], [12, 9, 1]), np.repeat([0, 4, 7], [5, 4, 1])
    renamed = np.searchsorted([0, 4, 7], trusted_classes), np.searchsorted([0, 4, 7], classes)
    return make(renamed[0]), make(renamed[1]), trusted_classes, classes


def unit(part):
    centered = part - part.mean(0)
    return centered / np.linalg.norm(centered, axis=0)


def told_by(references, trace):
    if not references.shape[1]:
        return [0.0, 0.0]
    correlations = [np.corrcoef(references[:, i], trace)[0, 1] for i in range(references.shape[1])]
    return [oracles.information(references, trace), np.sort(correlations)[-10:].mean()]


def test_a_part_says_what_the_others_of_the_class_tell(traces):
    trusted, test, trusted_classes, classes = (x[:DRAWS_OF_EACH] if x.ndim == 2 else x for x in traces)
    own, told = profile.of_part(unit(trusted), unit(test), trusted_classes, classes, 10)
    for index, label in enumerate(trusted_classes):
        others = (trusted_classes == label) & (np.arange(len(own)) != index)
        np.testing.assert_allclose(own[index], told_by(trusted[:, others], trusted[:, index]), rtol=1e-6)
    for index, label in enumerate(classes):
        members = trusted[:, trusted_classes == label]
        # of a class with one member nothing is known of what is usual
        wanted = told_by(members if members.shape[1] > 1 else members[:, :0], test[:, index])
        np.testing.assert_allclose(told[index], wanted, rtol=1e-6)


def test_distances_are_from_profiles_without_the_example_itself():
    rng = np.random.default_rng(1)
    own, told = rng.normal(size=(30, 5)) @ rng.normal(size=(5, 5)), rng.normal(size=(4, 5))
    usual, usual_of_test = profile._usual(own, told)
    deviation = own.std(0)

    def distance(one, others):
        covariance = sum(np.outer(x, x) for x in others / deviation) / 29
        shrunk = (1 - profile.SHRINKAGE) * covariance + profile.SHRINKAGE * np.eye(5)
        return (one / deviation) @ np.linalg.solve(shrunk, one / deviation)

    wanted = [distance(own[i], np.delete(own, i, axis=0)) for i in range(30)]
    np.testing.assert_allclose(-usual, np.log(wanted))
    np.testing.assert_allclose(-usual_of_test, np.log([distance(one, own) for one in told]))


def test_profiles_are_held_against_their_class_without_themselves():
    own, classes = np.array([[1.0], [2.0], [6.0], [5.0]]), np.array([0, 0, 0, 3])
    centered, moved = profile._within_class(own, np.array([[4.0], [4.0], [4.0]]), classes, np.array([0, 3, 9]))
    np.testing.assert_allclose(centered[:, 0], [1 - 8 / 4, 2 - 7 / 4, 6 - 3 / 4, 5 - 0 / 2])
    np.testing.assert_allclose(moved[:, 0], [4 - 9 / 5, 4 - 5 / 3, 4])


def test_order_and_size_do_not_matter(traces):
    trusted, test, trusted_classes, classes = traces
    rng = np.random.default_rng(2)
    order = rng.permutation(len(trusted_classes))
    # of draws within a part, of examples, and how far a part's draws move all of them
    draws = np.concatenate([rng.permutation(DRAWS_OF_EACH) + part * DRAWS_OF_EACH for part in range(NUM_PARTS)])
    size = np.repeat([1.0, 3.0, 0.2], DRAWS_OF_EACH)[:, None]
    heights = [x.mean(0) - (size * x).mean(0) for x in (trusted, test)]
    moved = [(size * x + height)[draws] for x, height in zip((trusted, test), heights, strict=True)]

    def values(trusted, test, trusted_classes):
        return (
            coupling.leave_one_out("class_profile", trusted, trusted_classes, num_parts=NUM_PARTS),
            coupling.couplings("class_profile", trusted, test, trusted_classes, classes=classes, num_parts=NUM_PARTS),
        )

    own, told = values(trusted, test, trusted_classes)
    own_again, told_again = values(moved[0][:, order], moved[1], trusted_classes[order])
    np.testing.assert_allclose(own_again, own[order], rtol=1e-6)
    np.testing.assert_allclose(told_again, told, rtol=1e-6)


def of_two_parts(rng, first, second, num_examples):
    """Traces that share a direction with the others of their kind to an extent, in each of two parts."""
    common = np.random.default_rng(5).normal(size=(2 * DRAWS_OF_EACH, 1))
    extents = np.repeat(rng.normal([first, second], 0.1, (num_examples, 2)), DRAWS_OF_EACH, axis=1).T
    return extents * common + rng.normal(size=(2 * DRAWS_OF_EACH, num_examples))


def test_told_less_in_one_part_and_more_in_another_is_unusual():
    rng = np.random.default_rng(3)
    trusted = of_two_parts(rng, 1.0, 1.0, 100)
    usual, other = of_two_parts(rng, 1.0, 1.0, 100), of_two_parts(rng, 0.3, 2.5, 100)
    less = of_two_parts(rng, 0.5, 0.5, 100)

    def found(test):
        return [
            auroc(*(-coupling.couplings(name, trusted, each, num_parts=2) for each in (usual, test)))
            for name in ("class_profile", "peer_information")
        ]

    (profiled, summed), (profiled_less, summed_less) = found(other), found(less)
    assert profiled > 0.95
    assert summed < 0.5
    assert profiled_less > 0.9
    assert summed_less > 0.9


def test_a_scorer_asks_the_class(traces):
    trusted, test, trusted_classes, classes = (x.astype(np.float32) if x.ndim == 2 else x for x in traces)
    scorer = Scorer.fit(trusted, trusted_classes, coupling="class_profile", traces="raw", num_parts=NUM_PARTS)
    scores = scorer.score(test, classes)
    assert np.isfinite(scores.anomaly_score).all()
    # the direction of its own class is not that of another
    swapped = scorer.score(test[:, :9], np.where(classes == 0, 4, 0)[:9])
    assert swapped.anomaly_score.mean() > scores.anomaly_score[:9].mean() + 0.5
    with pytest.raises(ValueError, match="classes: wanted one class for each of 10 test examples, got None"):
        scorer.score(test)
    with pytest.raises(ValueError, match="trusted_classes: wanted one class for each of 22 trusted examples, got 3"):
        coupling.couplings("class_profile", trusted, test, classes[:3], classes=classes)
    # without classes all are of one
    together = Scorer.fit(trusted, coupling="class_profile", traces="raw", num_parts=NUM_PARTS)
    one = Scorer.fit(trusted, np.zeros(22), coupling="class_profile", traces="raw", num_parts=NUM_PARTS)
    np.testing.assert_array_equal(together.score(test).anomaly_score, one.score(test, np.zeros(10)).anomaly_score)


@pytest.mark.parametrize("traces", ["whitened", "log"])
def test_trusted_examples_score_as_new_ones_do(traces):
    """Leave-one-out couplings of trusted examples, and those of as many others from the same source, lie alike."""
    rng = np.random.default_rng(4)
    losses, classes = np.exp(of_two_parts(rng, 1.0, 1.0, 240)).astype(np.float32), np.arange(240) % 6
    scorer = Scorer.fit(losses[:, :120], classes[:120], coupling="class_profile", traces=traces, num_parts=2)
    p_values = scorer.score(losses[:, 120:], classes[120:]).p_value
    assert abs(p_values.mean() - 0.5) < 0.1
    assert (p_values <= 0.1).mean() < 0.2


def test_traces_that_nothing_moves_are_no_division_by_zero():
    rng = np.random.default_rng(6)
    trusted = rng.normal(size=(20, 12))
    trusted[10:] = trusted[10:11]  # no draw of the second part moves any of them
    values = coupling.leave_one_out("class_profile", trusted, np.arange(12) % 2, num_parts=2)
    assert np.isfinite(values).all()
    assert np.isfinite(coupling.couplings("class_profile", trusted, trusted * 0, num_parts=2)).all()


def test_trusted_examples_are_left_out_of_the_profiles_of_others(traces, monkeypatch):
    trusted, _, classes, _ = traces
    monkeypatch.setattr(coupling, "_FOLDS", 5)
    values = coupling.leave_one_out("class_profile", trusted, classes, num_parts=NUM_PARTS)
    held_out = np.arange(22) % 5 == 2
    wanted = coupling.couplings(
        "class_profile", trusted[:, ~held_out], trusted[:, held_out], classes[~held_out], classes=classes[held_out],
        num_parts=NUM_PARTS,
    )  # fmt: skip
    np.testing.assert_allclose(values[held_out], wanted)


def test_the_lesser_of_what_is_told_and_how_usual_that_is():
    rng = np.random.default_rng(7)
    trusted_classes, classes = np.arange(40) % 2, np.array([0, 1, 1, 0, 1])
    parts = [(rng.gamma(2, size=(40, 2)), rng.gamma(2, size=(5, 2))) for _ in range(3)]
    heights, of_test = rng.normal(-8, 2, size=40), rng.normal(-8, 2, size=5)
    nats = [sum(part[side][:, 0] / part[0][:, 0].std() for part in parts) for side in (0, 1)]
    told = standardize(nats[1], classes, nats[0], trusted_classes)
    known = standardize_trusted(nats[0], trusted_classes)
    profiles = [
        np.column_stack([*(part[side] for part in parts), height]) for side, height in enumerate((heights, of_test))
    ]
    mean, deviation = profiles[0].mean(0), profiles[0].std(0)
    centered = profile._within_class(*((x - mean) / deviation for x in profiles), trusted_classes, classes)
    usual, usual_of_test = profile._usual(*centered)
    wanted = np.minimum((told - known.mean()) / known.std(), (usual_of_test - usual.mean()) / usual.std())
    np.testing.assert_allclose(profile.compare(parts, heights, of_test, trusted_classes, classes), wanted)


def test_how_sure_the_model_is_belongs_to_a_profile(traces):
    trusted, test, trusted_classes, classes = traces
    given = {"classes": classes, "num_parts": NUM_PARTS}
    values = coupling.couplings("class_profile", trusted, test, trusted_classes, **given)
    surer = coupling.couplings("class_profile", trusted, test - 20, trusted_classes, **given)
    # a class of one is told of by nobody, however sure the model is
    assert (surer < values)[:9].all()
