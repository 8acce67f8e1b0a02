"""Adversarial inputs: small changes of an image, found by its gradient, that change what a model says of it.

Images are uint8 `[n, height, width, channels]`, and `epsilon` and `step_size` are in the same levels of 0..255: the
literature's ∞-norm of 8/255 is 8 here. The results are rounded to uint8, as real images are, and judged after that; in
the ∞-norm they stay within `epsilon`, in the 2-norm within it before rounding. Attacks are untargeted unless they are
given `targets`.

FGSM: Goodfellow et al. 2015, arXiv 1412.6572. PGD: Madry et al. 2018, 1706.06083. The margin loss: Carlini and Wagner
2017, 1608.04644. Auto-PGD: Croce and Hein 2020, 2003.01690. `adaptive_pgd` attacks the detector too, to which it turns
once the model is fooled, as Bryniarski et al. 2021, 2106.15023, do.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax

from madjax.coupling import CLASS_PRIOR, PEERS, TOP_K, leave_one_out, lookup
from madjax.detector import Detector
from madjax.losses import ClassificationLoss
from madjax.sampling import TangentDraws
from madjax.scorer import Scorer, Traces
from madjax.sweep import loss_matrix
from madjax.traces import log_map
from madjax.types import Params

Norm = Literal["inf", "2"]
Objective = Literal["cross_entropy", "margin"]

_MOMENTUM = 0.75  # of auto-PGD, and the share of steps that have to gain
_CONFIDENCE = 1.0  # nats by which the adaptive attack wants the model fooled before it turns to the detector


class Attacked(NamedTuple):
    """What an attack made of images.

    Attributes:
      images: uint8, like the ones attacked.
      prediction: int32 `[n]`, what the model says of them.
      fooled: bool `[n]`: whether that is another class than `labels`, or is `targets` where they were given.
    """

    images: np.ndarray
    prediction: np.ndarray
    fooled: np.ndarray


def fgsm(
    loss_fn: ClassificationLoss,
    params: Params,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    norm: Norm = "inf",
    epsilon: float = 8.0,
    targets: np.ndarray | None = None,
    batch_size: int = 256,
) -> Attacked:
    """One step of size `epsilon` along the gradient's sign, or along the gradient in the 2-norm."""
    problem = _Problem(loss_fn, params, images, labels, targets, norm, epsilon, batch_size)
    return problem.judge(problem.walk("cross_entropy", [epsilon]))


def pgd(
    rng_key: jax.Array,
    loss_fn: ClassificationLoss,
    params: Params,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    norm: Norm = "inf",
    epsilon: float = 8.0,
    step_size: float = 2.0,
    num_steps: int = 40,
    objective: Objective = "cross_entropy",
    targets: np.ndarray | None = None,
    batch_size: int = 256,
) -> Attacked:
    """Projected gradient steps from a random point within `epsilon`.

    Args:
      loss_fn, params: of `from_nnx` or `from_linen`.
      labels: int `[n]`, the classes to lead away from.
      objective: what is raised: the cross-entropy, or the margin of the best other class over the label's (Carlini and
        Wagner's loss), which has a gradient where the cross-entropy is saturated.
      targets: int `[n]`, the classes to lead to instead.
      batch_size: images of one gradient.

    Raises:
      ValueError: a model without a gradient by its input, images that are not uint8, an `epsilon` that is not in levels
        of 0..255.
    """
    _check_step(step_size, num_steps)
    problem = _Problem(loss_fn, params, images, labels, targets, norm, epsilon, batch_size)
    return problem.judge(problem.walk(objective, [step_size] * num_steps, rng_key))


def auto_pgd(
    rng_key: jax.Array,
    loss_fn: ClassificationLoss,
    params: Params,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    norm: Norm = "inf",
    epsilon: float = 8.0,
    num_steps: int = 100,
    num_restarts: int = 1,
    objective: Objective = "margin",
    targets: np.ndarray | None = None,
    batch_size: int = 256,
) -> Attacked:
    """PGD with momentum that halves each image's step, from 2 `epsilon`, where it no longer gains, and keeps the best.

    Args:
      num_restarts: random starts; an image that one of them fooled is not tried again.

    Other arguments and errors as for `pgd`.
    """
    _check_step(2 * epsilon, num_steps)
    if num_restarts < 1:
        raise ValueError(f"num_restarts: wanted at least 1, got {num_restarts}")
    problem = _Problem(loss_fn, params, images, labels, targets, norm, epsilon, batch_size)
    result, left = images.copy(), np.arange(len(images))
    for restart in range(num_restarts):
        part = problem.part(left)
        result[left] = part.auto_walk(objective, num_steps, jax.random.fold_in(rng_key, restart), left)
        left = left[~part.judge(result[left]).fooled]
        if not len(left):
            break
    return problem.judge(result)


def adaptive_pgd(
    rng_key: jax.Array,
    detector: Detector,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    weight: float = 1.0,
    num_draws: int = 8,
    norm: Norm = "inf",
    epsilon: float = 8.0,
    step_size: float = 2.0,
    num_steps: int = 40,
    targets: np.ndarray | None = None,
    batch_size: int = 256,
) -> Attacked:
    """PGD that fools the model and its detector, of which it knows everything: trusted examples, draws and coupling.

    Until an image is taken for its target it climbs the margin. From then on it climbs `(1 - weight)` times the
    margin's gradient plus `weight` times that of the detector's coupling, both of unit norm. Every step differentiates
    the losses at `num_draws` draws taken at random, and weighs them by the derivative of the coupling at the whole
    trace, in which only the losses at these draws are renewed: an expectation over draws at a fraction of its cost.

    Args:
      detector: of a model from `from_nnx` or `from_linen`, with a coupling that no information is in.
      weight: 0 spares the detector, 1 looks at nothing else once the model is fooled.
      targets: where not given, each image is led to the class that comes second, for the trace depends on the class.

    Other arguments and errors as for `pgd`; `fooled` is about `labels` where no `targets` are given.
    """
    _check_step(step_size, num_steps)
    if not 0 <= weight <= 1:
        raise ValueError(f"weight: wanted 0 to 1, got {weight}")
    if lookup(detector.scorer.coupling).reduction in ("peer_joint", "profile"):
        raise ValueError(f"detector: the attack has no gradient of the coupling {detector.scorer.coupling!r}")
    if isinstance(detector.draws, TangentDraws):
        raise ValueError("detector: the attack passes images through drawn parameters, and a tangent has none")
    if not 1 <= num_draws <= detector.draws.num_draws:
        raise ValueError(f"num_draws: wanted 1 to the detector's {detector.draws.num_draws}, got {num_draws}")
    loss_fn: Any = detector.loss_fn
    judged = _Problem(loss_fn, detector.params, images, labels, targets, norm, epsilon, batch_size)
    goal = targets
    if goal is None:
        logits = np.array(judged.logits(images))
        logits[np.arange(len(labels)), labels] = -np.inf
        goal = logits.argmax(1)
    problem = _Problem(loss_fn, detector.params, images, labels, goal, norm, epsilon, batch_size)
    return judged.judge(problem.evade(detector, weight, num_draws, [step_size] * num_steps, rng_key))


def check_epsilon(epsilon: float, largest: float = 255) -> None:
    """Raises ValueError unless it is 1 to `largest`: less is lost when images are rounded, and of 0..1 as it seems."""
    if not 1 <= epsilon <= largest:
        hint = f", of 0..1 as it seems: wanted {255 * epsilon:g}" if 0 < epsilon < 1 else ""
        raise ValueError(f"epsilon: wanted 1 to {largest:g}, in levels of 0..255 (8 for 8/255), got {epsilon}{hint}")


def _check_step(step_size: float, num_steps: int) -> None:
    if not step_size > 0:
        raise ValueError(f"step_size: wanted a positive number of levels of 0..255, got {step_size}")
    if num_steps < 1:
        raise ValueError(f"num_steps: wanted at least 1, got {num_steps}")


class _Problem:
    """A model, images and the ball around them; its walks go through the images block by block."""

    def __init__(
        self,
        loss_fn: ClassificationLoss,
        params: Params,
        images: np.ndarray,
        labels: np.ndarray,
        targets: np.ndarray | None,
        norm: Norm,
        epsilon: float,
        batch_size: int,
    ):
        if not hasattr(getattr(loss_fn, "module", None), "apply"):
            raise ValueError(
                f"loss_fn: wanted one of from_nnx or from_linen, whose logits can be read, got {loss_fn!r}"
            )
        if images.dtype != np.uint8 or images.ndim != 4 or not len(images):
            raise ValueError(f"images: wanted uint8 [n, height, width, channels], got {images.dtype} {images.shape}")
        if norm not in get_args(Norm):
            raise ValueError(f"norm: wanted inf or 2, got {norm!r}")
        check_epsilon(epsilon, 255 if norm == "inf" else 255 * np.sqrt(images[0].size))
        for name, classes in (("labels", labels), ("targets", targets)):
            if classes is not None and np.shape(classes) != images.shape[:1]:
                raise ValueError(f"{name}: wanted one for each of {len(images)} images, got {np.shape(classes)}")
        self.loss_fn, self.params, self.images = loss_fn, params, images
        self.labels, self.targets = np.asarray(labels, np.int32), targets
        self.norm, self.epsilon, self.batch_size = norm, epsilon, min(batch_size, len(images))
        # what is raised: how far the output is from the label, or minus how far it is from the target
        self.goal = self.labels if targets is None else np.asarray(targets, np.int32)
        self.sign = 1.0 if targets is None else -1.0

    def part(self, index: np.ndarray) -> _Problem:
        """The problem of some of the images."""
        part = copy.copy(self)  # of the same batch size, so that one program serves both
        part.images, part.labels, part.goal = self.images[index], self.labels[index], self.goal[index]
        return part

    def logits(self, images: np.ndarray) -> jax.Array:
        blocks = [_logits(self.loss_fn.module, self.params, images[rows]) for rows, _ in self._blocks()]
        return jnp.concatenate([block[:size] for block, (_, size) in zip(blocks, self._blocks(), strict=True)])

    def judge(self, images: np.ndarray) -> Attacked:
        prediction = np.asarray(self.logits(images).argmax(1), np.int32)
        return Attacked(
            images, prediction, prediction != self.labels if self.targets is None else prediction == self.goal
        )

    def walk(self, objective: Objective, step_sizes: list[float], rng_key: jax.Array | None = None) -> np.ndarray:
        """Steps from a random point, or from the images where no key is given."""

        def block(origin: jax.Array, goal: jax.Array, rows: np.ndarray) -> jax.Array:
            x = origin if rng_key is None else self._start(rng_key, origin, rows)
            for step_size in step_sizes:
                _, gradient = self._climb(objective, x, goal)
                x = _move(self.norm, x, gradient, origin, self.epsilon, step_size)
            return x

        return self._each_block(block)

    def auto_walk(self, objective: Objective, num_steps: int, rng_key: jax.Array, numbers: np.ndarray) -> np.ndarray:
        """Auto-PGD, its algorithm 1; `numbers` tell images apart whose random start is to be their own."""
        checkpoints = _checkpoints(num_steps)

        def block(origin: jax.Array, goal: jax.Array, rows: np.ndarray) -> jax.Array:
            state = _AutoState.start(self._start(rng_key, origin, numbers[rows]), self.epsilon)
            for index in range(num_steps):
                value, gradient = self._climb(objective, state.x, goal)
                window = checkpoints.get(index, 0)
                state = _auto_step(self.norm, state, value, gradient, origin, self.epsilon, window, index == 0)
            value, _ = self._climb(objective, state.x, goal)
            return _where(value > state.best_value, state.x, state.best)

        return self._each_block(block)

    def evade(
        self, detector: Detector, weight: float, num_draws: int, step_sizes: list[float], rng_key: jax.Array
    ) -> np.ndarray:
        """See `adaptive_pgd`; all images are led to `targets`."""
        scorer, known = detector.scorer, _Coupling.of(detector.scorer)
        items = list(detector.draws.items())

        def block(origin: jax.Array, goal: jax.Array, rows: np.ndarray) -> jax.Array:
            x = self._start(rng_key, origin, rows)
            examples = {"image": np.asarray(x), "label": np.asarray(goal)}
            losses = jnp.asarray(
                loss_matrix(self.loss_fn, detector.draws, examples, layout="host", batch_size=len(rows)), jnp.float32
            )
            rng = np.random.default_rng(np.asarray(jax.random.key_data(rng_key)))
            for step_size in step_sizes:
                value, gradient = self._climb("margin", x, goal)
                chosen = rng.choice(len(items), num_draws, replace=False) if weight else []
                towards = jnp.zeros_like(x)
                derivative = _coupling_gradient(scorer.coupling, scorer.traces, known, losses)
                for draw in chosen:
                    loss, by_image = _loss_gradient(self.loss_fn, detector.draws, items[draw], x, goal)
                    losses = losses.at[draw].set(loss)
                    towards += derivative[draw][:, None, None, None] * by_image
                gradient, towards = _unit(gradient), _unit(towards)
                both = (1 - weight) * gradient + weight * towards
                gradient = _where(value > _CONFIDENCE, both, gradient)
                x = _move(self.norm, x, gradient, origin, self.epsilon, step_size)
            return x

        return self._each_block(block)

    def _check_gradient(self, origin: np.ndarray, goal: np.ndarray) -> None:
        _, gradient = self._climb("margin", jnp.asarray(origin), jnp.asarray(goal))
        if not bool(jnp.any(gradient)):
            raise ValueError(
                f"loss_fn: the gradient by the image is zero for all of {len(origin)} images, wanted a model that can "
                "be differentiated, which one that rounds its input or casts it to whole numbers cannot"
            )

    def _climb(self, objective: Objective, x: jax.Array, goal: jax.Array) -> tuple[jax.Array, jax.Array]:
        return _value_and_gradient(self.loss_fn.module, objective, self.params, x, goal, self.sign)

    def _start(self, rng_key: jax.Array, origin: jax.Array, rows: np.ndarray) -> jax.Array:
        return _random_start(self.norm, rng_key, jnp.asarray(rows), origin, self.epsilon)

    def _blocks(self) -> list[tuple[np.ndarray, int]]:
        """Indices of each block, all of one length, and how many of them are not repetitions."""
        count = len(self.images)
        return [
            (np.minimum(np.arange(start, start + self.batch_size), count - 1), min(self.batch_size, count - start))
            for start in range(0, count, self.batch_size)
        ]

    def _each_block(self, block: Callable[[jax.Array, jax.Array, np.ndarray], jax.Array]) -> np.ndarray:
        result = np.empty_like(self.images)
        for rows, size in self._blocks():
            origin = self.images[rows].astype(np.float32)
            if rows[0] == 0:
                self._check_gradient(origin, self.goal[rows])
            change = np.rint(np.asarray(block(jnp.asarray(origin), jnp.asarray(self.goal[rows]), rows)) - origin)
            if self.norm == "inf":
                change = np.clip(change, -np.floor(self.epsilon), np.floor(self.epsilon))
            result[rows[:size]] = (origin + change)[:size]
        return result


def _objective(kind: Objective, logits: jax.Array, goal: jax.Array) -> jax.Array:
    """Float32 `[n]`: how far the logits are from the class `goal`."""
    logits = logits.astype(jnp.float32)
    if kind == "cross_entropy":
        return optax.softmax_cross_entropy_with_integer_labels(logits, goal)
    mine = jax.nn.one_hot(goal, logits.shape[-1], dtype=bool)
    return jnp.max(jnp.where(mine, -jnp.inf, logits), -1) - jnp.max(jnp.where(mine, logits, -jnp.inf), -1)


@partial(jax.jit, static_argnums=0)
def _logits(module: Any, params: Params, images: jax.Array) -> jax.Array:
    return module.apply(params, images)


@partial(jax.jit, static_argnums=(0, 1))
def _value_and_gradient(
    module: Any, kind: Objective, params: Params, x: jax.Array, goal: jax.Array, sign: jax.Array
) -> tuple[jax.Array, jax.Array]:
    def total(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        values = sign * _objective(kind, module.apply(params, x), goal)
        return values.sum(), values

    (_, values), gradient = jax.value_and_grad(total, has_aux=True)(x)
    return values, gradient


@partial(jax.jit, static_argnums=0)
def _loss_gradient(loss_fn: Any, draws: Any, item: Any, x: jax.Array, goal: jax.Array) -> tuple[jax.Array, jax.Array]:
    def total(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        losses = loss_fn(draws.params(item), {"image": x, "label": goal})
        return losses.sum(), losses

    (_, losses), gradient = jax.value_and_grad(total, has_aux=True)(x)
    return losses, gradient


def _norms(x: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.square(x).sum((1, 2, 3), keepdims=True))


def _unit(x: jax.Array) -> jax.Array:
    return x / jnp.maximum(_norms(x), 1e-12)


def _where(chosen: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.where(chosen.reshape(-1, *(1,) * (x.ndim - 1)), x, y)


def _project(norm: Norm, x: jax.Array, origin: jax.Array, epsilon: jax.Array) -> jax.Array:
    change = x - origin
    if norm == "inf":
        change = jnp.clip(change, -epsilon, epsilon)
    else:
        change *= jnp.minimum(1, epsilon / jnp.maximum(_norms(change), 1e-12))
    return jnp.clip(origin + change, 0, 255)


def _direction(norm: Norm, gradient: jax.Array) -> jax.Array:
    return jnp.sign(gradient) if norm == "inf" else _unit(gradient)


@partial(jax.jit, static_argnums=0)
def _move(
    norm: Norm, x: jax.Array, gradient: jax.Array, origin: jax.Array, epsilon: jax.Array, step_size: jax.Array
) -> jax.Array:
    return _project(norm, x + step_size * _direction(norm, gradient), origin, epsilon)


@partial(jax.jit, static_argnums=0)
def _random_start(
    norm: Norm, rng_key: jax.Array, numbers: jax.Array, origin: jax.Array, epsilon: jax.Array
) -> jax.Array:
    """Uniform in the ball; every image by its number, so that blocks do not matter."""

    def noise(number: jax.Array) -> jax.Array:
        key = jax.random.fold_in(rng_key, number)
        if norm == "inf":
            return jax.random.uniform(key, origin.shape[1:], minval=-1, maxval=1)
        return jax.random.ball(key, origin[0].size).reshape(origin.shape[1:])

    return _project(norm, origin + epsilon * jax.vmap(noise)(numbers), origin, epsilon)


class _AutoState(NamedTuple):
    x: jax.Array
    previous: jax.Array
    last_value: jax.Array
    best: jax.Array
    best_value: jax.Array
    best_gradient: jax.Array
    step_size: jax.Array
    num_gains: jax.Array  # steps that gained since the last checkpoint
    checked_value: jax.Array  # the best value at the last checkpoint
    halved: jax.Array  # whether the step was halved there

    @classmethod
    def start(cls, x: jax.Array, epsilon: float) -> _AutoState:
        worst = jnp.full(len(x), -jnp.inf)
        zeros = jnp.zeros(len(x))
        return cls(
            x, x, worst, x, worst, jnp.zeros_like(x), jnp.full(len(x), 2 * epsilon), zeros, worst, zeros.astype(bool)
        )


def _checkpoints(num_steps: int) -> dict[int, int]:
    """The steps after which step sizes are judged, and how many steps lie between each and the one before."""
    places, last, gap = [0], 0.0, 0.22
    while last + gap <= 1:
        last, gap = last + gap, max(gap - 0.03, 0.06)
        places.append(int(np.ceil(last * num_steps)))
    return {place: place - before for before, place in pairwise(places) if place > before}


@partial(jax.jit, static_argnums=0)
def _auto_step(
    norm: Norm,
    state: _AutoState,
    value: jax.Array,
    gradient: jax.Array,
    origin: jax.Array,
    epsilon: jax.Array,
    window: jax.Array,
    is_first: jax.Array,
) -> _AutoState:
    """One step from `state.x`, whose objective and gradient are given; `window` > 0 at a checkpoint."""
    gains = value > state.best_value
    best, best_gradient = _where(gains, state.x, state.best), _where(gains, gradient, state.best_gradient)
    best_value = jnp.maximum(value, state.best_value)
    num_gains = state.num_gains + (value > state.last_value)
    stuck = (num_gains < _MOMENTUM * window) | (~state.halved & (state.checked_value >= best_value))
    halve = (window > 0) & stuck
    step_size = jnp.where(halve, state.step_size / 2, state.step_size)
    x, gradient = _where(halve, best, state.x), _where(halve, best_gradient, gradient)
    z = _project(norm, x + step_size[:, None, None, None] * _direction(norm, gradient), origin, epsilon)
    share = jnp.where(is_first, 1.0, _MOMENTUM)
    moved = _project(norm, x + share * (z - x) + (1 - share) * (x - state.previous), origin, epsilon)
    checked = window > 0
    return _AutoState(
        moved, x, value, best, best_value, best_gradient, step_size, jnp.where(checked, 0, num_gains),
        jnp.where(checked, best_value, state.checked_value), jnp.where(checked, halve, state.halved),
    )  # fmt: skip


class _Coupling(NamedTuple):
    """A detector's coupling as JAX can differentiate it; `madjax.coupling` is the same in float64, and slower.

    Attributes:
      trusted: traces `[num_draws, num_trusted]`; members: `[num_classes, num_trusted]` of zeros and ones.
      own: `[num_trusted]`, how far its nearest explain each; where the coupling is held against peers.
      mean, root, least: of the trace map.
    """

    trusted: jax.Array
    members: jax.Array
    own: jax.Array
    mean: jax.Array
    root: jax.Array
    least: jax.Array

    @classmethod
    def of(cls, scorer: Scorer) -> _Coupling:
        classes, (num_draws, count) = scorer.trusted_classes, scorer.trusted.shape
        members = np.ones((1, count)) if classes is None else np.unique(classes)[:, None] == classes
        mean, root, least = scorer.trace_map or log_map(num_draws)  # whose mean changes nothing
        root = np.eye(num_draws) if root is None else root
        traces, has_peers = scorer.map(scorer.trusted), lookup(scorer.coupling).reduction == "peer"
        own = leave_one_out("topk_ccc", traces) if has_peers else np.zeros(count)
        return cls(*(jnp.asarray(x, jnp.float32) for x in (traces, members, own, mean, root, least)))


@partial(jax.jit, static_argnums=(0, 1))
def _couple(name: str, traces: Traces, known: _Coupling, losses: jax.Array) -> jax.Array:
    """Float32 `[n]` of losses `[num_draws, n]`; not standardized, which would not change the way it rises."""
    pair, reduction, _ = lookup(name)
    y = losses
    if traces != "raw":  # log1p(losses / least) would leave float32
        y = jnp.sign(losses) * (jnp.log(jnp.abs(losses) + known.least) - jnp.log(known.least))
    x, y = known.trusted, known.root @ (y - known.mean[:, None])
    measure = (x - x.mean(0, keepdims=True)).T @ (y - y.mean(0, keepdims=True)) / len(y)
    x_variance, y_variance = x.var(0)[:, None], y.var(0)[None]
    if pair == "ccc":
        spread = x_variance + y_variance + jnp.square(x.mean(0)[:, None] - y.mean(0)[None])
        measure = 2 * measure / jnp.maximum(spread, 1e-12)
    elif pair == "correlation":
        measure = measure / jnp.sqrt(jnp.maximum(x_variance * y_variance, 1e-12))
    if reduction == "mean":
        return measure.mean(0)
    prior = CLASS_PRIOR if reduction in ("cluster", "topk_class") else 0
    by_class = (known.members @ measure / (known.members.sum(1, keepdims=True) + prior)).max(0)
    if reduction in ("class", "cluster"):
        return by_class
    top = jax.lax.top_k(measure.T, min(TOP_K, len(measure)))[0].mean(1)
    if reduction == "peer":
        heights = jnp.abs(y.mean(0)[:, None] - x.mean(0)[None])
        of_peers = known.own[jax.lax.top_k(-heights, min(PEERS, len(measure)))[1]].mean(1)
        return _root(top) - _root(of_peers)
    return top if reduction == "topk" or len(known.members) == 1 else (top + by_class) / 2


def _root(values: jax.Array) -> jax.Array:
    return jnp.sign(values) * jnp.sqrt(jnp.maximum(jnp.abs(values), 1e-12))  # whose gradient at zero is finite


@partial(jax.jit, static_argnums=(0, 1))
def _coupling_gradient(name: str, traces: Traces, known: _Coupling, losses: jax.Array) -> jax.Array:
    """The derivative of every example's coupling by its losses, `[num_draws, n]`."""
    return jax.grad(lambda losses: _couple(name, traces, known, losses).sum())(losses)
