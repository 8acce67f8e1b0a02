import numpy as np
import pytest

from madjax import coupling, information
from madjax.metrics import auroc
from madjax.scorer import Scorer
from tests import oracles

# the others are further below and in test_profile.py
ONE_BY_ONE = [name for name, kind in coupling.COUPLINGS.items() if kind.reduction not in ("profile", "peer_sum")]


@pytest.fixture(scope="module")
def losses():
    rng = np.random.default_rng(0)
    shared = rng.gamma(1.0, size=(23, 3))
    trusted = shared @ rng.random((3, 31)) + 0.3 * rng.random((23, 31))
    test = shared @ rng.random((3, 17)) + 0.3 * rng.random((23, 17))
    return trusted.astype(np.float32), test.astype(np.float32), rng.integers(0, 4, 31)


@pytest.fixture(autouse=True)
def few_peers(monkeypatch):
    monkeypatch.setattr(coupling, "PEERS", 9)  # else all of so few examples are


@pytest.mark.parametrize("name", ONE_BY_ONE)
def test_couplings_against_a_double_loop(losses, name):
    trusted, test, classes = losses
    kind = coupling.lookup(name)
    expected = [
        oracles.coupling(kind.pair, kind.reduction, trusted, test[:, j], classes, coupling.TOP_K, peers=9)
        for j in range(test.shape[1])
    ]
    np.testing.assert_allclose(coupling.couplings(name, trusted, test, classes), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ONE_BY_ONE)
def test_leave_one_out_against_a_double_loop(losses, name):
    trusted, _, classes = losses
    kind = coupling.lookup(name)
    expected = [
        oracles.coupling(kind.pair, kind.reduction, trusted, trusted[:, j], classes, coupling.TOP_K, j, peers=9)
        for j in range(trusted.shape[1])
    ]
    np.testing.assert_allclose(coupling.leave_one_out(name, trusted, classes), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["correlation", "ccc", "covariance"])
def test_pairs_and_blocks(losses, kind, monkeypatch):
    trusted, test, _ = losses
    expected = [[oracles.pair(kind, trusted[:, i], test[:, j]) for j in range(17)] for i in range(31)]
    np.testing.assert_allclose(coupling.pairs(kind, trusted, test), expected, rtol=1e-5, atol=1e-6)
    whole = coupling.couplings("class_ccc", trusted, test, losses[2])
    monkeypatch.setattr(coupling, "_BLOCK_ENTRIES", 31 * 5)
    np.testing.assert_allclose(coupling.pairs(kind, trusted, test), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(coupling.couplings("class_ccc", trusted, test, losses[2]), whole)


def test_couplings_do_not_depend_on_the_order_of_draws(losses):
    trusted, test, classes = losses
    order = np.random.default_rng(1).permutation(len(trusted))
    for name in ONE_BY_ONE:
        np.testing.assert_allclose(
            coupling.couplings(name, trusted[order], test[order], classes),
            coupling.couplings(name, trusted, test, classes),
            rtol=1e-6,
        )


def test_nearest_are_the_largest_pairs(losses):
    trusted, test, _ = losses
    indices, values = coupling.nearest("topk_ccc", trusted, test)
    matrix = coupling.pairs("ccc", trusted, test)
    np.testing.assert_array_equal(indices, np.argsort(-matrix, axis=0)[:3].T)
    np.testing.assert_allclose(values[:, 0], matrix.max(0))


def test_a_constant_trace_shares_nothing(losses):
    trusted, test, classes = losses
    trusted, test = trusted.copy(), test.copy()
    trusted[:, 0] = 0.1  # not a number that float32 holds
    test[:, 0] = 0.1
    assert np.all(coupling.pairs("correlation", trusted, test)[0] == 0)
    assert np.all(coupling.pairs("ccc", trusted, test)[:, 0] == 0)
    assert coupling.couplings("class_correlation", trusted, test, classes)[0] == 0
    assert np.isfinite(coupling.leave_one_out("class_correlation", trusted, classes)).all()


def test_a_class_with_one_example_does_not_explain_itself(losses):
    trusted, _, classes = losses
    classes = classes.copy()
    classes[5] = 99
    values = coupling.leave_one_out("class_correlation", trusted, classes)
    expected = oracles.coupling("correlation", "class", trusted, trusted[:, 5], classes, 0, leave_out=5)
    np.testing.assert_allclose(values[5], expected, rtol=1e-5)


def test_without_classes_the_nearest_alone_count(losses):
    trusted, test, _ = losses
    np.testing.assert_array_equal(
        coupling.couplings("topk_class_ccc", trusted, test), coupling.couplings("topk_ccc", trusted, test)
    )
    np.testing.assert_array_equal(
        coupling.leave_one_out("topk_class_ccc", trusted), coupling.leave_one_out("topk_ccc", trusted)
    )


def test_who_is_sure_must_be_explained_as_well_as_who_is():
    """Unsure outputs, whose losses are high, share less than sure ones; imitations of the sure share as little."""
    rng = np.random.default_rng(3)
    shared = rng.normal(size=(400, 1))
    sure = shared + 0.3 * rng.normal(size=(400, 60))
    unsure = 9 + shared + 2 * rng.normal(size=(400, 60))
    imitations = shared + rng.normal(size=(400, 10))
    usual = 9 + shared + 2 * rng.normal(size=(400, 10))
    for name, is_fooled in (("topk_ccc", True), ("peer_ccc", False)):
        imitated, explained = (coupling.couplings(name, np.hstack([sure, unsure]), x) for x in (imitations, usual))
        assert (imitated.min() > explained.max()) == is_fooled
        assert (imitated.max() < explained.min()) != is_fooled


def test_peers_of_many_are_sought_among_some(losses, monkeypatch):
    trusted, test, _ = losses
    monkeypatch.setattr(coupling, "_SAMPLE", 16)
    some = np.arange(0, 31, 2)
    own, heights = coupling.leave_one_out("topk_ccc", trusted), trusted.astype(float).mean(0)
    top = coupling.couplings("topk_ccc", trusted, test)
    nearest = np.argsort(abs(test.astype(float).mean(0)[:, None] - heights[some]), axis=1)[:, :9]
    np.testing.assert_allclose(
        coupling.couplings("peer_ccc", trusted, test), _root(top) - _root(own[some][nearest].mean(1))
    )
    for place in (4, 5):  # one that is asked, and one that is not
        np.testing.assert_allclose(
            coupling.leave_one_out("peer_ccc", trusted)[place],
            _root(own[place]) - _root(_own_without(trusted, place, some)[:9].mean()),
        )


@pytest.mark.parametrize("shape", ["test", "trusted"])
def test_what_parts_tell_is_added_up(losses, shape):
    """Peers are the same for all parts, those of the height over all draws."""
    trusted, test, _ = (traces[:20] if index < 2 else traces for index, traces in enumerate(losses))
    traces, places = (test, [None] * 17) if shape == "test" else (trusted, range(31))
    expected = [
        oracles.coupling("correlation", "peer_joint", trusted, traces[:, j], np.zeros(31), coupling.TOP_K, place, 9, 4)
        for j, place in enumerate(places)
    ]
    if shape == "test":
        values = coupling.couplings("peer_information", trusted, test, num_parts=4)
    else:
        values = coupling.leave_one_out("peer_information", trusted, num_parts=4)
    np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-6)


def test_a_part_may_know_what_all_draws_drown():
    """Where one part of five explains an output and the others move it at random, as they do all."""
    rng = np.random.default_rng(6)
    trusted, test = rng.normal(size=(200, 40)), rng.normal(size=(200, 20))
    basis = rng.normal(size=(40, 3))
    trusted[:40], test[:40, :10] = basis @ rng.normal(size=(3, 40)), basis @ rng.normal(size=(3, 10))
    whole, parts = (coupling.couplings("peer_information", trusted, test, num_parts=n) for n in (1, 5))
    assert parts[:10].min() > parts[10:].max() + 0.3
    assert whole[:10].min() < whole[10:].max() + 0.3


@pytest.mark.parametrize("num_draws", [7, 60])
def test_all_together_with_fewer_and_more_draws_than_examples(num_draws):
    rng = np.random.default_rng(5)
    trusted, test = rng.normal(size=(num_draws, 12)), rng.normal(size=(num_draws, 3))
    unit, told = (
        (traces - traces.mean(0)) / np.linalg.norm(traces - traces.mean(0), axis=0) for traces in (trusted, test)
    )
    expected = [oracles.information(trusted, test[:, j]) for j in range(3)]
    np.testing.assert_allclose(information.information(unit, told), expected, rtol=1e-6)
    others = [np.delete(np.arange(12), i) for i in range(12)]
    expected = [oracles.information(trusted[:, kept], trusted[:, i]) for i, kept in enumerate(others)]
    np.testing.assert_allclose(information.left_out(unit), expected, rtol=1e-6)


def test_all_together_tell_what_no_one_does():
    """Mixtures of what many trusted traces move in are told of, though no one goes with them; what is new is not."""
    rng = np.random.default_rng(4)
    directions = rng.normal(size=(200, 40))
    trusted = directions @ np.eye(20, 40).repeat(3, axis=0).T
    mixed, new = directions[:, :20] @ rng.normal(size=(20, 8)), directions[:, 20:] @ rng.normal(size=(20, 8))
    told, untold = (coupling.couplings("peer_information", trusted, traces) for traces in (mixed, new))
    assert told.min() > untold.max() + 0.5
    assert coupling.pairs("correlation", trusted, mixed).max() < 0.7


def test_what_is_far_surer_than_all_is_not_explained_by_shape():
    """Imitations of the trusted at heights among theirs, a little below, and where nobody is."""
    rng = np.random.default_rng(7)
    basis = rng.normal(size=(100, 3))
    trusted, imitations = (basis @ rng.normal(size=(3, count)) for count in (40, 10))
    heights = rng.normal(size=40)
    inside, below, far = (
        coupling.couplings(
            "peer_information", trusted - trusted.mean(0) + heights, imitations - imitations.mean(0) - down
        )
        for down in (0, 2, 40)
    )
    lost = inside.mean() - np.array([below.mean(), far.mean()])
    assert lost[0] < 0.25 * lost[1]
    assert far.max() < inside.min() - 1


def test_the_sum_is_of_both_in_trusted_deviations(losses):
    trusted, test, _ = (traces[:20] if index < 2 else traces for index, traces in enumerate(losses))
    total, left_out = np.zeros(17), np.zeros(31)
    for name in ("peer_information", "peer_ccc"):
        own = coupling.leave_one_out(name, trusted, num_parts=4)
        total += scaled(coupling.couplings(name, trusted, test, num_parts=4), own)
        left_out += scaled(own, own)
    values = coupling.couplings("peer_sum", trusted, test, num_parts=4)
    np.testing.assert_allclose(values, scaled(total, left_out))
    np.testing.assert_allclose(coupling.leave_one_out("peer_sum", trusted, num_parts=4), scaled(left_out, left_out))


@pytest.mark.parametrize("num_parts", [1, 2, 3, 5])
def test_the_sum_holds_an_output_against_its_class(num_parts):
    """Of two classes, each of which moves in its own directions; a third is too small, and -1 is none."""
    rng = np.random.default_rng(9)
    trusted, test = rng.normal(size=(60, 66)), rng.normal(size=(60, 40))
    trusted_classes, classes = np.repeat([4, 7, 9, -1], [22, 20, 3, 21]), np.repeat([4, 7, 9, -1], 10)

    def alone(name):
        left_out = coupling.leave_one_out(name, trusted, num_parts=num_parts)
        return coupling.couplings(name, trusted, test, num_parts=num_parts), left_out

    whole = [alone(name) for name in ("peer_information", "peer_ccc")]
    total, of_trusted = (sum(scaled(pair[i], pair[1]) for pair in whole) for i in range(2))
    expected, left_out = scaled(total, of_trusted), scaled(of_trusted, of_trusted)

    def unit(traces):
        centered = traces.reshape(num_parts, -1, traces.shape[1])
        centered = centered - centered.mean(1, keepdims=True)
        return centered / np.linalg.norm(centered, axis=1, keepdims=True)

    middle = {1: [0], 2: [0, 1], 3: [1], 5: [1, 2, 3]}[num_parts]
    known, asked = unit(trusted)[middle], unit(test)[middle]
    values = sum(information.information(*pair) for pair in zip(known, asked, strict=True))
    own = sum(map(information.left_out, known))

    def told(label):
        members = own[trusted_classes == label]
        return values[classes == label] - members.mean(), members - members.mean()

    by_class = {label: told(label) for label in (4, 7)}
    of_classes = np.concatenate([own for _, own in by_class.values()])
    for label, (values, own) in by_class.items():
        expected[classes == label] = scaled(values, of_classes)
        left_out[trusted_classes == label] = scaled(own, of_classes)
    found = coupling.couplings("peer_sum", trusted, test, trusted_classes, classes=classes, num_parts=num_parts)
    np.testing.assert_allclose(found, expected, rtol=1e-8)
    found = coupling.leave_one_out("peer_sum", trusted, trusted_classes, num_parts=num_parts)
    np.testing.assert_allclose(found, left_out, rtol=1e-8)
    with pytest.raises(ValueError, match="classes: wanted one class for each of 40 test examples, got None"):
        coupling.couplings("peer_sum", trusted, test, trusted_classes)


def scaled(values, of):
    return (values - of.mean()) / of.std()


def test_the_sum_finds_what_one_of_both_misses():
    """What moves in part where no trusted one does, and what moves as they do, four times as far."""
    rng = np.random.default_rng(0)
    shared, other = rng.normal(size=(2, 300, 20))

    def traces(count, directions=shared):
        mixed = directions @ rng.normal(size=(20, count))
        return mixed - mixed.mean(0) + rng.normal(size=(300, count)) / 2 + rng.normal(size=count)

    trusted, usual, elsewhere, farther = traces(80), traces(60), traces(60, shared + 0.6 * other), 4 * traces(60)
    found = {
        name: [
            auroc(*(-coupling.couplings(name, trusted, each) for each in (usual, test)))
            for test in (elsewhere, farther)
        ]
        for name in ("peer_information", "peer_ccc", "peer_sum")
    }
    assert found["peer_information"][1] < 0.85
    assert found["peer_ccc"][0] < 0.85
    assert min(found["peer_sum"]) > 0.95


def test_no_draws_no_information(losses):
    trusted, test, _ = losses
    still = np.full_like(test[:, :1], 0.1)
    directions = (trusted - trusted.mean(0)) / np.linalg.norm(trusted - trusted.mean(0), axis=0)
    assert information.information(directions, 0 * still) == 0
    stilled = np.hstack([directions, 0 * still])
    assert information.left_out(stilled)[-1] == 0
    assert np.isfinite(coupling.couplings("peer_information", np.hstack([trusted, still]), still)).all()


def _root(values):
    return np.sign(values) * np.sqrt(np.abs(values))


def _own_without(trusted, left_out, some):
    """What the examples `some` have of their own without one of them, the nearest in height to that one first."""
    kept = np.delete(np.arange(trusted.shape[1]), left_out)
    own = dict(zip(kept, coupling.leave_one_out("topk_ccc", trusted[:, kept]), strict=True))
    heights = trusted.astype(float).mean(0)
    return np.array([own[i] for i in sorted(set(some) - {left_out}, key=lambda i: abs(heights[i] - heights[left_out]))])


def test_bad_input(losses):
    trusted, test, classes = losses
    with pytest.raises(ValueError, match=r"coupling: wanted one of mean_correlation, .* got 'cosine'"):
        coupling.couplings("cosine", trusted, test)
    with pytest.raises(ValueError, match=r"test: wanted the draws of the trusted matrix.*\(22, 17\)"):
        coupling.couplings("mean_ccc", trusted, test[:-1])
    with pytest.raises(ValueError, match="trusted_classes: wanted one class for each of 31"):
        coupling.couplings("class_ccc", trusted, test, classes[:-1])
    with pytest.raises(ValueError, match="trusted: wanted two examples at least for a peer coupling"):
        coupling.leave_one_out("peer_ccc", trusted[:, :2])
    with pytest.raises(ValueError, match="num_parts: wanted a divisor of the 23 draws, got 2"):
        coupling.couplings("peer_information", trusted, test, num_parts=2)


def test_clusters_stand_in_for_classes():
    """Three kinds of traces: clusters find them, and an example of none is explained by none."""
    rng = np.random.default_rng(0)
    kinds, kind = rng.normal(size=(60, 3)), np.repeat([0, 1, 2], 20)
    trusted = kinds[:, kind] + 0.2 * rng.normal(size=(60, 60))
    scorer = Scorer.fit(trusted, coupling="cluster_ccc", traces="raw")
    assert scorer.trusted_classes is not None
    assert len({(a, b) for a, b in zip(kind, scorer.trusted_classes, strict=True)}) == 3
    test = np.concatenate([kinds + 0.2 * rng.normal(size=(60, 3)), rng.normal(size=(60, 3))], axis=1)
    scores = scorer.score(test)
    assert scores.anomaly_score[:3].max() < scores.anomaly_score[3:].min()
    # twenty members of a cluster, and twenty more that share nothing
    members = scorer.trusted_classes == scorer.trusted_classes[0]
    wanted = coupling.pairs("ccc", trusted[:, members], test[:, :1]).sum() / (members.sum() + 20)
    np.testing.assert_allclose(-scores.anomaly_score[0], wanted)
