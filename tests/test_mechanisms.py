"""Groups of traces whose mechanisms are known, since they were made here."""

import re

import numpy as np
import pytest
from sklearn.metrics import adjusted_rand_score

from madjax.mechanisms import group_by_mechanism

NUM_DRAWS = 256  # by chance traces correlate by 0.06 or so


def traces(rng, sizes, *, shared=0.0, own=1.0, noise=0.6):
    """Traces of mechanisms of these sizes: what all share, what each has of its own, noise; and their mechanisms."""
    signals = rng.normal(size=(NUM_DRAWS, len(sizes))) * own + rng.normal(size=(NUM_DRAWS, 1)) * shared
    truth = np.repeat(np.arange(len(sizes)), sizes)
    strength = rng.uniform(0.5, 2, size=len(truth))
    return strength * (signals[:, truth] + noise * rng.normal(size=(NUM_DRAWS, len(truth)))), truth


def test_mechanisms_are_told_apart_and_the_rest_is_in_no_group():
    rng = np.random.default_rng(0)
    made, truth = traces(rng, [60, 40, 25])
    stray = rng.normal(size=(NUM_DRAWS, 7))
    found = group_by_mechanism(np.c_[made, stray])
    assert found.num_groups == 3
    assert adjusted_rand_score(truth, found.group[:125]) == 1
    assert (found.group[125:] == -1).all()
    assert [len(members) for members in found.central] == [60, 40, 25]  # the largest first


def test_order_height_and_scale_of_traces_do_not_matter():
    rng = np.random.default_rng(1)
    made, _ = traces(rng, [50, 30], noise=0.9)
    order = rng.permutation(80)
    changed = (made * rng.uniform(0.1, 10, 80) + rng.normal(size=80))[:, order]
    one, other = group_by_mechanism(made), group_by_mechanism(changed)
    np.testing.assert_array_equal(one.group[order], other.group)
    for members, moved in zip(one.central, other.central, strict=True):
        np.testing.assert_array_equal(members, order[moved])


def test_mechanisms_that_share_most_of_their_traces_are_split():
    made, truth = traces(np.random.default_rng(2), [60, 60], shared=1.5, own=0.6)
    assert group_by_mechanism(made, leading_share=1).num_groups == 1
    found = group_by_mechanism(made)
    assert found.num_groups == 2
    assert adjusted_rand_score(truth, found.group) > 0.9


def test_one_mechanism_is_not_split_along_what_its_members_differ_in():
    rng = np.random.default_rng(3)
    made, _ = traces(rng, [120], shared=1.5)
    # as digits do: each of ten sources adds a direction of its own
    made += 0.6 * rng.normal(size=(NUM_DRAWS, 10))[:, np.arange(120) % 10]
    assert group_by_mechanism(made).num_groups == 1


def test_a_cloud_with_one_leading_direction_is_not_split():
    rng = np.random.default_rng(4)
    made, _ = traces(rng, [200], shared=1.5)
    # it leads, and there is no gap in it
    made += 1.5 * rng.normal(size=(NUM_DRAWS, 1)) * rng.normal(size=200)
    assert group_by_mechanism(made).num_groups == 1


def test_the_most_central_examples_carry_least_noise():
    rng = np.random.default_rng(4)
    signal, noise = rng.normal(size=(NUM_DRAWS, 1)), rng.normal(size=(NUM_DRAWS, 30))
    made = signal + noise * np.linspace(0.05, 1.5, 30)
    (central,) = group_by_mechanism(made).central
    assert central[:3].max() < 6
    assert central[-3:].min() > 20


def test_few_anomalies_are_in_no_group_unless_fewer_are_asked_for():
    made, _ = traces(np.random.default_rng(5), [6])
    assert group_by_mechanism(made).num_groups == 0
    assert group_by_mechanism(made, min_size=5).num_groups == 1


def test_a_trace_that_stands_still_is_like_none():
    made, _ = traces(np.random.default_rng(6), [20])
    found = group_by_mechanism(np.c_[made, np.full((NUM_DRAWS, 1), 3.0)])
    assert found.group[-1] == -1
    np.testing.assert_array_equal(found.correlation[-1, :20], 0)


@pytest.mark.parametrize(
    ("made", "settings", "message"),
    [
        (np.zeros((8, 1)), {}, "traces: wanted at least 2 anomalies to group, got 1"),
        (np.zeros((8, 0)), {}, "traces: wanted at least 2 anomalies to group, got 0"),
        (np.tile(np.arange(8.0)[:, None], 5), {}, "traces: those of all 5 anomalies are identical"),
        (np.zeros(8), {}, "traces: wanted [num_draws, n]"),
        (np.zeros((2, 5)), {}, "traces: wanted [num_draws, n] of at least 3 draws, got (2, 5)"),
        (np.eye(8), {"min_size": 1}, "min_size: wanted at least 2, got 1"),
        (np.eye(8), {"leading_share": 0}, "leading_share: wanted a share above 0 and up to 1, got 0"),
    ],
)
def test_bad_input(made, settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        group_by_mechanism(made, **settings)


def test_traces_that_are_not_finite():
    made = np.eye(8)
    made[2, 3] = np.nan
    with pytest.raises(FloatingPointError, match="traces"):
        group_by_mechanism(made)
