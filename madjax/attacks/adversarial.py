"""Adversarial inputs: small changes of an image, found by its gradient, that change what a model says of it.

Images are uint8 `[n, height, width, channels]`, and `epsilon` and `step_size` are in the same levels of 0..255: the
literature's ∞-norm of 8/255 is 8 here. The results are rounded to uint8, as real images are, and judged after that; in
the ∞-norm they stay within `epsilon`, in the 2-norm within it before rounding. Attacks are untargeted unless they are
given `targets`.

FGSM: Goodfellow et al. 2015, arXiv 1412.6572. PGD: Madry et al. 2018, 1706.06083. The margin loss: Carlini and Wagner
2017, 1608.04644. Auto-PGD: Croce and Hein 2020, 2003.01690. `madjax.attacks.evasion` attacks the detector too.
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

from madjax.losses import ClassificationLoss
from madjax.types import Params

Norm = Literal["inf", "2"]
Objective = Literal["cross_entropy", "margin"]

_MOMENTUM = 0.75  # of auto-PGD, and the share of steps that have to gain


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
    problem = Problem(loss_fn, params, images, labels, targets, norm, epsilon, batch_size)
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
    check_step(step_size, num_steps)
    problem = Problem(loss_fn, params, images, labels, targets, norm, epsilon, batch_size)
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
    check_step(2 * epsilon, num_steps)
    if num_restarts < 1:
        raise ValueError(f"num_restarts: wanted at least 1, got {num_restarts}")
    problem = Problem(loss_fn, params, images, labels, targets, norm, epsilon, batch_size)
    result, left = images.copy(), np.arange(len(images))
    for restart in range(num_restarts):
        part = problem.part(left)
        result[left] = part.auto_walk(objective, num_steps, jax.random.fold_in(rng_key, restart), left)
        left = left[~part.judge(result[left]).fooled]
        if not len(left):
            break
    return problem.judge(result)


def check_epsilon(epsilon: float, largest: float = 255) -> None:
    """Raises ValueError unless it is 1 to `largest`: less is lost when images are rounded, and of 0..1 as it seems."""
    if not 1 <= epsilon <= largest:
        hint = f", of 0..1 as it seems: wanted {255 * epsilon:g}" if 0 < epsilon < 1 else ""
        raise ValueError(f"epsilon: wanted 1 to {largest:g}, in levels of 0..255 (8 for 8/255), got {epsilon}{hint}")


def check_step(step_size: float, num_steps: int) -> None:
    """Raises ValueError unless there is a step and it has a size."""
    if not step_size > 0:
        raise ValueError(f"step_size: wanted a positive number of levels of 0..255, got {step_size}")
    if num_steps < 1:
        raise ValueError(f"num_steps: wanted at least 1, got {num_steps}")


class Problem:
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

    def part(self, index: np.ndarray) -> Problem:
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
            x = origin if rng_key is None else self.start(rng_key, origin, rows)
            for step_size in step_sizes:
                _, gradient = self.climb(objective, x, goal)
                x = move(self.norm, x, gradient, origin, self.epsilon, step_size)
            return x

        return self.each_block(block)

    def auto_walk(self, objective: Objective, num_steps: int, rng_key: jax.Array, numbers: np.ndarray) -> np.ndarray:
        """Auto-PGD, its algorithm 1; `numbers` tell images apart whose random start is to be their own."""
        checkpoints = _checkpoints(num_steps)

        def block(origin: jax.Array, goal: jax.Array, rows: np.ndarray) -> jax.Array:
            state = _AutoState.start(self.start(rng_key, origin, numbers[rows]), self.epsilon)
            for index in range(num_steps):
                value, gradient = self.climb(objective, state.x, goal)
                window = checkpoints.get(index, 0)
                state = _auto_step(self.norm, state, value, gradient, origin, self.epsilon, window, index == 0)
            value, _ = self.climb(objective, state.x, goal)
            return where(value > state.best_value, state.x, state.best)

        return self.each_block(block)

    def _check_gradient(self, origin: np.ndarray, goal: np.ndarray) -> None:
        _, gradient = self.climb("margin", jnp.asarray(origin), jnp.asarray(goal))
        if not bool(jnp.any(gradient)):
            raise ValueError(
                f"loss_fn: the gradient by the image is zero for all of {len(origin)} images, wanted a model that can "
                "be differentiated, which one that rounds its input or casts it to whole numbers cannot"
            )

    def climb(self, objective: Objective, x: jax.Array, goal: jax.Array) -> tuple[jax.Array, jax.Array]:
        return _value_and_gradient(self.loss_fn.module, objective, self.params, x, goal, self.sign)

    def start(self, rng_key: jax.Array, origin: jax.Array, rows: np.ndarray) -> jax.Array:
        return _random_start(self.norm, rng_key, jnp.asarray(rows), origin, self.epsilon)

    def _blocks(self) -> list[tuple[np.ndarray, int]]:
        """Indices of each block, all of one length, and how many of them are not repetitions."""
        count = len(self.images)
        return [
            (np.minimum(np.arange(start, start + self.batch_size), count - 1), min(self.batch_size, count - start))
            for start in range(0, count, self.batch_size)
        ]

    def each_block(self, block: Callable[[jax.Array, jax.Array, np.ndarray], jax.Array]) -> np.ndarray:
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


def _norms(x: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.square(x).sum((1, 2, 3), keepdims=True))


def unit(x: jax.Array) -> jax.Array:
    """Each image's part of `x`, scaled to a 2-norm of 1; zeros stay."""
    return x / jnp.maximum(_norms(x), 1e-12)


def where(chosen: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    """Rows of `x` where `chosen` `[n]`, and of `y` elsewhere."""
    return jnp.where(chosen.reshape(-1, *(1,) * (x.ndim - 1)), x, y)


def _project(norm: Norm, x: jax.Array, origin: jax.Array, epsilon: jax.Array) -> jax.Array:
    change = x - origin
    if norm == "inf":
        change = jnp.clip(change, -epsilon, epsilon)
    else:
        change *= jnp.minimum(1, epsilon / jnp.maximum(_norms(change), 1e-12))
    return jnp.clip(origin + change, 0, 255)


def _direction(norm: Norm, gradient: jax.Array) -> jax.Array:
    return jnp.sign(gradient) if norm == "inf" else unit(gradient)


@partial(jax.jit, static_argnums=0)
def move(
    norm: Norm, x: jax.Array, gradient: jax.Array, origin: jax.Array, epsilon: jax.Array, step_size: jax.Array
) -> jax.Array:
    """A step of each image along its gradient, back into the ball around `origin` and into 0..255."""
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
    best, best_gradient = where(gains, state.x, state.best), where(gains, gradient, state.best_gradient)
    best_value = jnp.maximum(value, state.best_value)
    num_gains = state.num_gains + (value > state.last_value)
    stuck = (num_gains < _MOMENTUM * window) | (~state.halved & (state.checked_value >= best_value))
    halve = (window > 0) & stuck
    step_size = jnp.where(halve, state.step_size / 2, state.step_size)
    x, gradient = where(halve, best, state.x), where(halve, best_gradient, gradient)
    z = _project(norm, x + step_size[:, None, None, None] * _direction(norm, gradient), origin, epsilon)
    share = jnp.where(is_first, 1.0, _MOMENTUM)
    moved = _project(norm, x + share * (z - x) + (1 - share) * (x - state.previous), origin, epsilon)
    checked = window > 0
    return _AutoState(
        moved, x, value, best, best_value, best_gradient, step_size, jnp.where(checked, 0, num_gains),
        jnp.where(checked, best_value, state.checked_value), jnp.where(checked, halve, state.halved),
    )  # fmt: skip
