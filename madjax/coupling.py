"""From loss traces to couplings: how well the trusted examples explain a test example. High = explained.

A *pair* measure compares two traces, a *reduction* turns a test example's measures against all trusted examples into
one number. Moments are population moments over draws, computed in float64. What the names mean:

- `correlation`: Pearson's.
- `ccc`: concordance, 2 cov / (σx² + σy² + (μx - μy)²) (Lin 1989): 1 only where traces are equal, so height counts
  beside shape.
- `covariance`: the Bayesian influence of one example on the other, in nats².
- `mean_*`: over all trusted. `class_*`: over the trusted examples of each predicted class, then the maximum over
  classes (the paper's CLC where the pair is a correlation); classes without a trusted example are skipped. `topk_*`:
  over the `TOP_K` highest. `topk_class_*`: the mean of `topk_*` and of `class_*` with `CLASS_PRIOR` further members in
  every class that share nothing. The nearest know a mechanism inside a class; the mean of a large class is less noisy,
  and that of a class of two, whose chance would often be the maximum, counts little. Without classes, `topk_*`.
- `cluster_*`: as `class_*` with that prior, over clusters of the trusted traces, for outputs that have no class; a
  `Scorer` finds them.
- `peer_*`: the square root of `topk_*` less that of what the `PEERS` trusted examples have on average, each with its
  own nearest, whose traces are nearest in height. Traces as high are those of outputs as sure, where the traces are of
  "log": what a model is unsure of is explained by few, and what it is sure of by many, whatever the mechanism. Roots
  are between a difference, in which a usual example that is odd among well explained ones is as far out as one that
  nothing explains, and a quotient.
- `peer_information`: as `peer_*`, of what all trusted traces together tell (`madjax.information`), as a difference in
  nats, which fade as the peers' heights lie farther away. Where draws move one part of the model at a time, what they
  tell of each part is added up.
- `peer_sum`: `peer_information` and `peer_ccc` of all, added up: an output of a kind that is well explained may be too
  sure, and one as sure as others may move where they do not. But where at least `CLASS_PEERS` trusted examples are of
  an output's class (-1 is none), these are the peers: it is what all trusted ones tell of the middle third of the
  parts, less what they tell of that class on average. The first parts of a model know how an input reads, the last ones
  what all such answers take (`docs/choosing-the-scale.md`). Either in standard deviations of the trusted ones.
- `class_profile`: what the trusted examples of the predicted class tell, part by part; see `madjax.profile`. Without
  classes, all are of one.
- `standardized_*`: `topk_class_*` in units of the predicted class, see `madjax.standardize`; a `Scorer` makes it.
  Without classes, `peer_ccc`'s way.

A trace without variance has correlation 0 with every other: it shows nothing that could be shared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import numpy as np

from madjax import information, profile
from madjax.standardize import in_deviations
from madjax.traces import folds
from madjax.types import LossMatrix

Pair = Literal["correlation", "ccc", "covariance"]
Reduction = Literal["mean", "class", "cluster", "topk", "topk_class", "peer", "peer_joint", "peer_sum", "profile"]

DEFAULT = "standardized_ccc"
TOP_K = 10
CLASS_PRIOR = 20
PEERS = 40
CLASS_PEERS = 20
# standard deviations of trusted heights
FADE = 5.0
# pair matrices are made for this many entries at a time
_BLOCK_ENTRIES = 4_000_000
# trusted examples are left out in at most so many groups where nothing is known without computing all anew
_FOLDS = 32
# peers are sought among so many of the trusted examples, or all
_SAMPLE = 512
_SUMMED = ("peer_information", "peer_ccc")


class Coupling(NamedTuple):
    """A pair measure, how it is reduced over the trusted examples, and whether it is held against its class's."""

    pair: Pair
    reduction: Reduction
    standardized: bool = False


COUPLINGS = {
    "mean_correlation": Coupling("correlation", "mean"),
    "class_correlation": Coupling("correlation", "class"),
    "topk_correlation": Coupling("correlation", "topk"),
    "mean_ccc": Coupling("ccc", "mean"),
    "class_ccc": Coupling("ccc", "class"),
    "topk_ccc": Coupling("ccc", "topk"),
    "topk_class_ccc": Coupling("ccc", "topk_class"),
    "standardized_ccc": Coupling("ccc", "topk_class", standardized=True),
    "cluster_ccc": Coupling("ccc", "cluster"),
    "peer_ccc": Coupling("ccc", "peer"),
    "peer_information": Coupling("correlation", "peer_joint"),
    "peer_sum": Coupling("ccc", "peer_sum"),
    "class_profile": Coupling("correlation", "profile"),
    "covariance": Coupling("covariance", "mean"),
}


def lookup(name: str) -> Coupling:
    """The coupling of that name; a ValueError lists the known ones."""
    if name not in COUPLINGS:
        raise ValueError(f"coupling: wanted one of {', '.join(COUPLINGS)}, got {name!r}")
    return COUPLINGS[name]


def couplings(
    name: str,
    trusted: LossMatrix,
    test: LossMatrix,
    trusted_classes: np.ndarray | None = None,
    *,
    classes: np.ndarray | None = None,
    num_parts: int = 1,
) -> np.ndarray:
    """Float64 `[num_test]`: the coupling `name` of every test example with the trusted set, not standardized.

    Args:
      trusted: `[num_draws, num_trusted]`, test: `[num_draws, num_test]`, at the same draws.
      trusted_classes: `[num_trusted]`, the class the model predicts for each; for `class_*`, `topk_class_*` and
        `peer_sum` alone.
      classes: `[num_test]`, the same of the test examples; for `class_profile` and `peer_sum` alone.
      num_parts: runs of equally many draws, each of which moves a part of the model; for `peer_information`,
        `peer_sum` and `class_profile` alone.
    """
    _check(trusted, test, num_parts)
    if lookup(name).reduction == "profile":
        return _profile(trusted, test, trusted_classes, classes, num_parts)
    if lookup(name).reduction == "peer_sum":
        return _peer_sum(trusted, test, trusted_classes, classes, num_parts)
    return _reduce(lookup(name), trusted, test, trusted_classes, num_parts, leave_one_out=False)


def leave_one_out(
    name: str, trusted: LossMatrix, trusted_classes: np.ndarray | None = None, *, num_parts: int = 1
) -> np.ndarray:
    """Float64 `[num_trusted]`: the coupling of every trusted example with the others."""
    _check(trusted, trusted, num_parts)
    if trusted.shape[1] < 2:
        raise ValueError(f"trusted: wanted at least 2 examples to leave one out, got {trusted.shape[1]}")
    if lookup(name).reduction == "profile":
        return _profile_left_out(trusted, trusted_classes, num_parts)
    if lookup(name).reduction == "peer_sum":
        return _peer_sum(trusted, None, trusted_classes, trusted_classes, num_parts)
    return _reduce(lookup(name), trusted, trusted, trusted_classes, num_parts, leave_one_out=True)


def pairs(pair: Pair, trusted: LossMatrix, test: LossMatrix) -> np.ndarray:
    """The whole float64 matrix `[num_trusted, num_test]` of a pair measure."""
    _check(trusted, test)
    return np.concatenate([block for _, block in _pair_blocks(pair, trusted, test)], axis=1)


def nearest(name: str, trusted: LossMatrix, test: LossMatrix, count: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """The `count` trusted examples that each test example couples with most.

    Returns:
      Indices and pair measures, `[num_test, count]` each, the highest first.
    """
    _check(trusted, test)
    indices, values = _highest(lookup(name).pair, trusted, test, min(count, trusted.shape[1]))
    return indices.T, values.T


def _check(trusted: LossMatrix, test: LossMatrix, num_parts: int = 1) -> None:
    if trusted.ndim != 2 or test.ndim != 2 or len(trusted) != len(test):
        raise ValueError(
            f"test: wanted the draws of the trusted matrix, [num_draws, num_examples], got {test.shape} beside trusted "
            f"{trusted.shape}"
        )
    if 0 in trusted.shape:
        raise ValueError(f"trusted: wanted at least one draw and one example, got {trusted.shape}")
    if num_parts < 1 or len(trusted) % num_parts:
        raise ValueError(f"num_parts: wanted a divisor of the {len(trusted)} draws, got {num_parts}")


def _reduce(
    coupling: Coupling,
    trusted: LossMatrix,
    test: LossMatrix,
    classes: np.ndarray | None,
    num_parts: int,
    *,
    leave_one_out: bool,
) -> np.ndarray:
    pair, reduction, standardized = coupling
    if reduction == "mean":
        return _group_means(pair, trusted, test, np.ones((1, trusted.shape[1])), leave_one_out=leave_one_out)
    if reduction == "class":
        return _group_means(pair, trusted, test, _members(trusted, classes), leave_one_out=leave_one_out)
    if reduction == "cluster":
        return _group_means(pair, trusted, test, _members(trusted, classes), CLASS_PRIOR, leave_one_out=leave_one_out)
    if reduction == "peer_joint":
        return _peer_information(trusted, test, num_parts, leave_one_out=leave_one_out)
    if reduction == "peer" or (standardized and classes is None):
        return _peer_nearest(pair, trusted, test, leave_one_out=leave_one_out)
    result = _top_k(pair, trusted, test, leave_one_out=leave_one_out)
    if reduction == "topk" or classes is None:
        return result
    members = _members(trusted, classes)
    return (result + _group_means(pair, trusted, test, members, CLASS_PRIOR, leave_one_out=leave_one_out)) / 2


def _peer_sum(
    trusted: LossMatrix,
    test: LossMatrix | None,
    trusted_classes: np.ndarray | None,
    classes: np.ndarray | None,
    num_parts: int,
) -> np.ndarray:
    """Of the test examples, or of each trusted one with the others, which counts among those it is standardized by."""

    result = np.empty(trusted.shape[1] if test is None else test.shape[1])
    if trusted_classes is None:
        shared, trusted_classes, classes = [], -np.ones(trusted.shape[1]), -np.ones(len(result))
    else:
        trusted_classes = _one_each("trusted", trusted, trusted_classes)
        classes = _one_each("test", trusted if test is None else test, classes)
        labels, counts = np.unique(trusted_classes, return_counts=True)
        shared = labels[(counts >= CLASS_PEERS) & (labels >= 0)].tolist()
    rest = ~np.isin(classes, shared)
    if rest.any():
        pairs = []
        for name in _SUMMED:
            left_out = leave_one_out(name, trusted, num_parts=num_parts)
            told = left_out[rest] if test is None else couplings(name, trusted, test[:, rest], num_parts=num_parts)
            pairs.append((told, left_out))
        total = np.sum([in_deviations(*pair) for pair in pairs], axis=0)
        of_trusted = np.sum([in_deviations(left_out, left_out) for _, left_out in pairs], axis=0)
        result[rest] = in_deviations(total, of_trusted)
    if shared:
        values, left_out = _told_in_the_middle(trusted, test, num_parts)
        members = [trusted_classes == label for label in shared]
        spread = np.concatenate([left_out[known] - left_out[known].mean() for known in members])
        for label, known in zip(shared, members, strict=True):
            told = classes == label
            result[told] = in_deviations(values[told] - left_out[known].mean(), spread)
    return result


def _told_in_the_middle(trusted: LossMatrix, test: LossMatrix | None, num_parts: int) -> tuple[np.ndarray, np.ndarray]:
    """What the trusted examples tell of the test ones, or of each other, and of each other, in nats.

    Of the middle third of the parts, or of all where there are but one or two.
    """

    def middle(traces: LossMatrix) -> list[np.ndarray]:
        parts = np.split(traces, num_parts)[num_parts // 3 : num_parts - num_parts // 3]
        return [_scaled("correlation", _moments(part)) for part in parts]

    known = middle(trusted)
    left_out = np.sum([information.left_out(part) for part in known], axis=0)
    if test is None:
        return left_out, left_out
    pairs = zip(known, middle(test), strict=True)
    return np.sum([information.information(*pair) for pair in pairs], axis=0), left_out


def _members(trusted: LossMatrix, classes: np.ndarray | None) -> np.ndarray:
    """Float64 `[num_classes, num_trusted]` of zeros and ones."""
    classes = _one_each("trusted", trusted, classes)
    return (np.unique(classes)[:, None] == classes).astype(float)


def _one_each(name: str, traces: LossMatrix, classes: np.ndarray | None) -> np.ndarray:
    if classes is None or len(classes) != traces.shape[1]:
        got = "None" if classes is None else f"{len(classes)}"
        argument = "trusted_classes" if name == "trusted" else "classes"
        raise ValueError(f"{argument}: wanted one class for each of {traces.shape[1]} {name} examples, got {got}")
    return np.asarray(classes)


def _group_means(
    pair: Pair, trusted: LossMatrix, test: LossMatrix, members: np.ndarray, prior: int = 0, *, leave_one_out: bool
) -> np.ndarray:
    """The highest of the groups' means; `prior` further members of each group share nothing with anyone."""
    sums, counts = _sums(pair, trusted, test, members), members.sum(1, keepdims=True)
    if leave_one_out:
        sums, counts = sums - members * _self_pair(pair, trusted), counts - members
    counts = np.broadcast_to(counts + prior, sums.shape)
    # the group of an example that was its only one has nothing left to explain it with
    return np.divide(sums, counts, out=np.full(sums.shape, -np.inf), where=counts > 0).max(0)


class _Moments(NamedTuple):
    mean: np.ndarray
    centered: np.ndarray
    variance: np.ndarray


def _moments(traces: LossMatrix) -> _Moments:
    traces = np.asarray(traces, np.float64)
    # a constant trace gets a variance of exactly zero, whatever its mean rounds to
    mean = np.where((traces == traces[:1]).all(0), traces[0], traces.mean(0))
    centered = traces - mean
    return _Moments(mean, centered, np.square(centered).mean(0))


def _scaled(pair: Pair, moments: _Moments) -> np.ndarray:
    """Traces whose inner product over draws is the pair measure: the forms that cost draws × examples alone."""
    scale = np.sqrt(len(moments.centered))
    if pair == "covariance":
        return moments.centered / scale
    deviation = np.sqrt(moments.variance) * scale
    return np.divide(moments.centered, deviation, out=np.zeros_like(moments.centered), where=deviation > 0)


def _self_pair(pair: Pair, traces: LossMatrix) -> np.ndarray:
    variance = _moments(traces).variance
    return variance if pair == "covariance" else (variance > 0).astype(float)


def _sums(pair: Pair, trusted: LossMatrix, test: LossMatrix, members: np.ndarray) -> np.ndarray:
    """Float64 `[num_groups, num_test]`: the pair measure summed over each group of trusted examples."""
    if pair == "ccc":
        return np.concatenate([members @ block for _, block in _pair_blocks(pair, trusted, test)], axis=1)
    # a sum of inner products is the inner product with the sum
    return (members @ _scaled(pair, _moments(trusted)).T) @ _scaled(pair, _moments(test))


def _top_k(pair: Pair, trusted: LossMatrix, test: LossMatrix, *, leave_one_out: bool) -> np.ndarray:
    num_trusted = trusted.shape[1]
    places = np.arange(num_trusted) if leave_one_out else None
    return _highest(pair, trusted, test, min(TOP_K, num_trusted - leave_one_out), places)[1].mean(0)


class _Peers(NamedTuple):
    """Trusted examples whose traces are nearest in height.

    Attributes:
      asked: indices of the trusted examples among whom they are sought.
      index: `[num_test, num_peers]` into `asked`.
      distance: `[num_test, num_peers]`, in height, in standard deviations of the trusted ones.
    """

    asked: np.ndarray
    index: np.ndarray
    distance: np.ndarray

    @classmethod
    def find(cls, trusted: LossMatrix, test: LossMatrix, *, leave_one_out: bool) -> _Peers:
        from sklearn.neighbors import NearestNeighbors  # takes a second to import, and few couplings need it

        num_trusted = trusted.shape[1]
        if num_trusted < 2 + leave_one_out:
            raise ValueError(
                f"trusted: wanted two examples at least for a peer coupling, beside any left out, got {num_trusted}"
            )
        asked = np.arange(0, num_trusted, -(-num_trusted // _SAMPLE))
        known, heights = (np.asarray(traces, np.float64).mean(0) for traces in (trusted, test))
        finder = NearestNeighbors(n_neighbors=min(PEERS + leave_one_out, len(asked))).fit(known[asked, None])
        index = finder.kneighbors(heights[:, None], return_distance=False)
        if leave_one_out:  # itself, or the farthest, is none
            order = np.argsort(asked[index] == np.arange(num_trusted)[:, None], axis=1, kind="stable")
            index = np.take_along_axis(index, order, axis=1)[:, :-1]
        spread = _deviation(known, leave_one_out=leave_one_out)
        distance = np.abs(known[asked][index] - heights[:, None])
        return cls(asked, index, np.divide(distance, spread, out=np.zeros_like(distance), where=spread > 0))


def _deviation(values: np.ndarray, *, leave_one_out: bool) -> np.ndarray:
    """The standard deviation, `[1, 1]`, or that of all but each, `[num, 1]`."""
    centered = values - values.mean()
    out, count = (centered, len(values) - 1) if leave_one_out else (np.zeros(1), len(values))
    variance = (np.square(centered).sum() - np.square(out)) / count - np.square((centered.sum() - out) / count)
    return np.sqrt(np.maximum(variance, 0))[:, None]


def _peer_information(trusted: LossMatrix, test: LossMatrix, num_parts: int, *, leave_one_out: bool) -> np.ndarray:
    peers = _Peers.find(trusted, test, leave_one_out=leave_one_out)
    values, of_peers = np.zeros((2, test.shape[1]))
    for known, told in zip(*(np.split(traces, num_parts) for traces in (trusted, test)), strict=True):
        directions = _scaled("correlation", _moments(known))
        if leave_one_out:
            values += information.left_out(directions)
            own = np.take_along_axis(information.pairs_left_out(directions, peers.asked), peers.index, axis=1)
        else:
            values += information.information(directions, _scaled("correlation", _moments(told)))
            own = information.left_out(directions)[peers.asked][peers.index]
        of_peers += own.mean(1)
    # where nobody is as sure or unsure, shape alone proves little
    return values * np.exp(-np.square(peers.distance / FADE) / 2).mean(1) - of_peers


def _profile(
    trusted: LossMatrix,
    test: LossMatrix,
    trusted_classes: np.ndarray | None,
    classes: np.ndarray | None,
    num_parts: int,
) -> np.ndarray:
    if trusted_classes is None:
        trusted_classes, classes = np.zeros(trusted.shape[1]), np.zeros(test.shape[1])
    trusted_classes, classes = _one_each("trusted", trusted, trusted_classes), _one_each("test", test, classes)
    parts = []
    for known, told in zip(*(np.split(traces, num_parts) for traces in (trusted, test)), strict=True):
        known, told = (_scaled("correlation", _moments(traces)) for traces in (known, told))
        parts.append(profile.of_part(known, told, trusted_classes, classes, TOP_K))
    heights, of_test = (np.asarray(traces, np.float64).mean(0) for traces in (trusted, test))
    return profile.compare(parts, heights, of_test, trusted_classes, classes)


def _profile_left_out(trusted: LossMatrix, classes: np.ndarray | None, num_parts: int) -> np.ndarray:
    """Of each trusted example with the others, whose profiles are made without it too, and without a few more."""
    count = trusted.shape[1]
    classes = np.zeros(count) if classes is None else _one_each("trusted", trusted, classes)
    result = np.empty(count)
    for held_out in folds(count, _FOLDS):
        others, kept = np.delete(trusted, held_out, axis=1), np.delete(classes, held_out)
        result[held_out] = _profile(others, trusted[:, held_out], kept, classes[held_out], num_parts)
    return result


def _peer_nearest(pair: Pair, trusted: LossMatrix, test: LossMatrix, *, leave_one_out: bool) -> np.ndarray:
    asked, peers, _ = _Peers.find(trusted, test, leave_one_out=leave_one_out)
    places = np.arange(trusted.shape[1]) if leave_one_out else None
    count = min(TOP_K, trusted.shape[1] - 1 - leave_one_out)
    # one more than count, who moves up where one of them is left out
    indices, values = _highest(pair, trusted, trusted[:, asked], count + leave_one_out, asked)
    own = values[:count].mean(0)[peers]
    if places is not None:
        left_out = indices[:count, peers] == places[:, None]
        own += np.where(left_out, values[count, peers] - values[:count, peers], 0).sum(0) / count
    return _root(_highest(pair, trusted, test, count, places)[1].mean(0)) - _root(own.mean(1))


def _root(values: np.ndarray) -> np.ndarray:
    return np.sign(values) * np.sqrt(np.abs(values))


def _highest(
    pair: Pair, trusted: LossMatrix, test: LossMatrix, count: int, places: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the trusted examples that each test example has most with, and the measures: `[count, num_test]`, the
    highest first. `places`: where each test example itself lies among the trusted, to be left out.
    """
    indices, values = [], []
    for start, block in _pair_blocks(pair, trusted, test):
        if places is not None:
            here = places[start : start + block.shape[1]]
            block[here, np.arange(len(here))] = -np.inf
        top = np.sort(np.argpartition(block, -count, axis=0)[-count:], axis=0)
        order = np.argsort(-np.take_along_axis(block, top, axis=0), axis=0, kind="stable")
        top = np.take_along_axis(top, order, axis=0)
        indices.append(top)
        values.append(np.take_along_axis(block, top, axis=0))
    return np.concatenate(indices, axis=1), np.concatenate(values, axis=1)


def _pair_blocks(pair: Pair, trusted: LossMatrix, test: LossMatrix) -> Iterator[tuple[int, np.ndarray]]:
    """Yields (first test index, float64 `[num_trusted, block]`)."""
    measure = _ccc_with(trusted) if pair == "ccc" else _inner_with(pair, trusted)
    size = max(1, _BLOCK_ENTRIES // trusted.shape[1])
    for start in range(0, test.shape[1], size):
        yield start, measure(_moments(test[:, start : start + size]))


def _inner_with(pair: Pair, trusted: LossMatrix) -> Callable[[_Moments], np.ndarray]:
    references = _scaled(pair, _moments(trusted)).T
    return lambda moments: references @ _scaled(pair, moments)


def _ccc_with(trusted: LossMatrix) -> Callable[[_Moments], np.ndarray]:
    x = _moments(trusted)

    def measure(y: _Moments) -> np.ndarray:
        covariance = x.centered.T @ y.centered / len(x.centered)
        spread = x.variance[:, None] + y.variance + np.square(x.mean[:, None] - y.mean)
        # both constant and equal: no variance to share
        return np.divide(2 * covariance, spread, out=np.zeros_like(spread), where=spread > 0)

    return measure
