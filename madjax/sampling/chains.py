"""Parallel chains: burn-in, thinning, reshuffled minibatches; the draws are the positions they pass.

As many chains as the devices of a host can share evenly run side by side, one a device; such groups take turns. The
steps run from a loop on the host over one compiled step: on the CPU backend a convolution's gradient inside a
`lax.scan` is twenty times slower, and elsewhere the calls are queued ahead of the devices.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from madjax.sampling.diagnostics import ensure_finite
from madjax.sampling.draws import WalkState
from madjax.sampling.sgld import ChainState, Sampler, StepInfo
from madjax.sampling.target import Target
from madjax.sharding import Placement, part, place_chains, put_chains, put_model, side_by_side
from madjax.types import Batch, Params, num_examples


# a leafless pytree: inside the compiled sweep an item already is the parameters
@partial(jax.tree_util.register_static)
@dataclasses.dataclass(frozen=True, eq=False)
class ChainDraws:
    """`num_chains` independent chains from the center; row t · num_chains + c is draw t of chain c.

    Attributes:
      examples: what the chains train on, with *true* labels; split off from the trusted set.
      num_burnin_steps: steps of each chain before its first draw.
      num_steps_between_draws: 1 keeps every step.
      step_size: ε; drift ε/2, noise √ε.
      batch_size: examples a step. Every epoch is a new shuffle, and its last, smaller batch is used.
      drawn: the leaves that move, in flattening order, where it is known that others do not.
    """

    rng_key: jax.Array
    sampler: Sampler
    target: Target
    examples: Batch
    num_draws: int
    num_chains: int = 1
    num_burnin_steps: int = 250
    num_steps_between_draws: int = 1
    step_size: float = 1e-6
    batch_size: int = 256
    drawn: tuple[bool, ...] | None = None

    def __post_init__(self):
        for name in ("num_draws", "num_chains", "num_burnin_steps", "num_steps_between_draws", "batch_size"):
            least = 0 if name == "num_burnin_steps" else 1
            if getattr(self, name) < least:
                raise ValueError(f"{name}: wanted at least {least}, got {getattr(self, name)}")
        if self.num_draws % self.num_chains:
            raise ValueError(f"num_draws: {self.num_draws} is no multiple of num_chains, {self.num_chains}")
        num_examples(self.examples, "sampling")

    def items(self, start: int = 0, state: WalkState | None = None) -> ChainWalk:
        return ChainWalk(self, start, state)

    def any_item(self) -> Params:
        return self.target.center

    def params(self, item: Params) -> Params:
        return item


class ChainWalk:
    """A walk along the chains, a draw of each in turn."""

    def __init__(self, draws: ChainDraws, start: int, state: WalkState | None):
        self._draws, self._next = draws, 0 if state is None else start
        placement = place_chains(draws.num_chains, draws.target.center)
        size = placement.parts("draws")
        self._groups = [
            _Group(draws, range(first, first + size), placement, state) for first in range(0, draws.num_chains, size)
        ]
        self._losses: list[float] = []
        while self._next < start:
            next(self)
        self._losses.clear()

    def __iter__(self) -> ChainWalk:
        return self

    def __next__(self) -> Params:
        draws = self._draws
        if self._next == draws.num_draws:
            raise StopIteration
        draw, number = divmod(self._next, draws.num_chains)
        group, member = divmod(number, len(self._groups[0].numbers))
        if member == 0:
            steps = draws.num_steps_between_draws + (draws.num_burnin_steps if draw == 0 else 0)
            self._groups[group].advance(steps)
        loss = self._groups[group].losses[member]
        ensure_finite(loss, f"minibatch loss of chain {number} at draw {draw}")
        self._losses.append(float(loss))
        self._next += 1
        return self._groups[group].take(member).position

    def state(self) -> WalkState:
        """Where every chain stands; `items` goes on from it to the bit."""
        return {name: leaf for group in self._groups for name, leaf in group.saved().items()}

    def info(self) -> dict[str, list[float]]:
        """The mean loss, in nats, of the last minibatch before each item."""
        return {"minibatch_loss": self._losses}


class _Group:
    """Chains that step together, one a device; `states` and `losses` have a leading axis over them."""

    def __init__(self, settings: ChainDraws, numbers: range, placement: Placement, state: WalkState | None):
        self.settings, self.numbers, self.placement = settings, numbers, placement
        keys = [jax.random.fold_in(settings.rng_key, number) for number in numbers]
        self._keys = put_chains(keys, placement)
        # a stream of its own, so that no shuffle shares a key with a step's noise
        self._shuffle_keys = [jax.random.fold_in(key, 2**31 - 1) for key in keys]
        self._target = settings.target._replace(center=put_model(settings.target.center, placement))
        first = settings.sampler.init(settings.target.center)
        self.num_steps, self.losses = 0, np.zeros(len(numbers), np.float32)
        self._epoch, self._orders = -1, []
        if state is None:
            states = [first] * len(numbers)
        else:
            self.num_steps = int(state[f"{numbers[0]}/num_steps"])
            self.losses = np.array([state[f"{number}/loss"] for number in numbers])
            names, treedef = range(len(jax.tree.leaves(first))), jax.tree.structure(first)
            states = [treedef.unflatten([state[f"{number}/{name}"] for name in names]) for number in numbers]
        self.states = put_chains(states, placement)

    def take(self, member: int) -> ChainState:
        return part(self.states, member, self.placement)

    def saved(self) -> WalkState:
        result = {}
        for member, number in enumerate(self.numbers):
            leaves = dict(enumerate(jax.tree.leaves(self.take(member))))
            own = {"num_steps": self.num_steps, "loss": self.losses[member], **leaves}
            result |= {f"{number}/{name}": leaf for name, leaf in own.items()}
        return result

    def advance(self, steps: int) -> None:
        settings = self.settings
        info = StepInfo(jnp.asarray(self.losses))
        for _ in range(steps):
            minibatches = put_chains(self._minibatches(), self.placement)
            self.states, info = _step(
                settings.sampler.step, self.placement, self._keys, self.num_steps, self.states, self._target,
                minibatches, settings.step_size,
            )  # fmt: skip
            self.num_steps += 1
        self.losses = np.asarray(info.loss)

    def _minibatches(self) -> list[Batch]:
        size, count = self.settings.batch_size, num_examples(self.settings.examples)
        epoch, batch = divmod(self.num_steps, -(-count // size))
        if epoch != self._epoch:
            keys = [jax.random.fold_in(key, epoch) for key in self._shuffle_keys]
            self._epoch, self._orders = epoch, [np.asarray(jax.random.permutation(key, count)) for key in keys]
        chosen = [order[batch * size : (batch + 1) * size] for order in self._orders]
        return [jax.tree.map(lambda x, rows=rows: x[rows], self.settings.examples) for rows in chosen]


@partial(jax.jit, static_argnums=(0, 1))
def _step(
    step: Any,
    placement: Placement,
    rng_keys: jax.Array,
    num_steps: int,
    states: ChainState,
    target: Target,
    minibatches: Batch,
    step_size: float,
) -> tuple[ChainState, StepInfo]:
    def one(target: Target, step_size: float, num_steps: jax.Array, own: Any) -> Any:
        rng_key, state, minibatch = own
        return step(jax.random.fold_in(rng_key, num_steps), state, target, minibatch, step_size)

    return side_by_side(one, placement)(target, step_size, num_steps, (rng_keys, states, minibatches))


def split_chains(matrix: np.ndarray, num_chains: int) -> np.ndarray:
    """`[num_draws, num_examples]` as swept -> `[num_chains, num_draws / num_chains, num_examples]`."""
    return matrix.reshape(-1, num_chains, matrix.shape[1]).swapaxes(0, 1)
