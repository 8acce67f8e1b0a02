"""Adversarial inputs that are made to pass a detector, of which they know everything, and that fool the model as well.

The attack turns to the detector once the model is fooled, as those of Bryniarski et al. 2021, arXiv 2106.15023, do.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from madjax.attacks.adversarial import Attacked, Norm, Problem, check_step, move, unit, where
from madjax.coupling import CLASS_PRIOR, PEERS, TOP_K, leave_one_out, lookup
from madjax.detector import Detector
from madjax.sampling import TangentDraws
from madjax.scorer import Scorer, Traces
from madjax.sweep import loss_matrix
from madjax.traces import log_map

_CONFIDENCE = 1.0  # nats by which the model is to be fooled before the attack turns to the detector


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
    check_step(step_size, num_steps)
    if not 0 <= weight <= 1:
        raise ValueError(f"weight: wanted 0 to 1, got {weight}")
    if lookup(detector.scorer.coupling).reduction in ("peer_joint", "peer_sum", "profile"):
        raise ValueError(f"detector: the attack has no gradient of the coupling {detector.scorer.coupling!r}")
    if isinstance(detector.draws, TangentDraws):
        raise ValueError("detector: the attack passes images through drawn parameters, and a tangent has none")
    if not 1 <= num_draws <= detector.draws.num_draws:
        raise ValueError(f"num_draws: wanted 1 to the detector's {detector.draws.num_draws}, got {num_draws}")
    loss_fn: Any = detector.loss_fn
    judged = Problem(loss_fn, detector.params, images, labels, targets, norm, epsilon, batch_size)
    goal = targets
    if goal is None:
        logits = np.array(judged.logits(images))
        logits[np.arange(len(labels)), labels] = -np.inf
        goal = logits.argmax(1)
    problem = Problem(loss_fn, detector.params, images, labels, goal, norm, epsilon, batch_size)
    return judged.judge(_evade(problem, detector, weight, num_draws, [step_size] * num_steps, rng_key))


def _evade(
    problem: Problem, detector: Detector, weight: float, num_draws: int, step_sizes: list[float], rng_key: jax.Array
) -> np.ndarray:
    """See `adaptive_pgd`; all images are led to the problem's goal."""
    scorer, known = detector.scorer, _Coupling.of(detector.scorer)
    items = list(detector.draws.items())

    def block(origin: jax.Array, goal: jax.Array, rows: np.ndarray) -> jax.Array:
        x = problem.start(rng_key, origin, rows)
        examples = {"image": np.asarray(x), "label": np.asarray(goal)}
        losses = jnp.asarray(
            loss_matrix(problem.loss_fn, detector.draws, examples, layout="host", batch_size=len(rows)), jnp.float32
        )
        rng = np.random.default_rng(np.asarray(jax.random.key_data(rng_key)))
        for step_size in step_sizes:
            value, gradient = problem.climb("margin", x, goal)
            chosen = rng.choice(len(items), num_draws, replace=False) if weight else []
            towards = jnp.zeros_like(x)
            derivative = _coupling_gradient(scorer.coupling, scorer.traces, known, losses)
            for draw in chosen:
                loss, by_image = _loss_gradient(problem.loss_fn, detector.draws, items[draw], x, goal)
                losses = losses.at[draw].set(loss)
                towards += derivative[draw][:, None, None, None] * by_image
            gradient, towards = unit(gradient), unit(towards)
            both = (1 - weight) * gradient + weight * towards
            gradient = where(value > _CONFIDENCE, both, gradient)
            x = move(problem.norm, x, gradient, origin, problem.epsilon, step_size)
        return x

    return problem.each_block(block)


@partial(jax.jit, static_argnums=0)
def _loss_gradient(loss_fn: Any, draws: Any, item: Any, x: jax.Array, goal: jax.Array) -> tuple[jax.Array, jax.Array]:
    def total(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        losses = loss_fn(draws.params(item), {"image": x, "label": goal})
        return losses.sum(), losses

    (_, losses), gradient = jax.value_and_grad(total, has_aux=True)(x)
    return losses, gradient


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
