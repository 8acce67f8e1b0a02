"""Parallel chains: burn-in, thinning, reshuffled minibatches; the draws are the positions they pass.

The steps run from a loop on the host over one compiled step: on the CPU backend a convolution's gradient inside a
`lax.scan` is twenty times slower, and elsewhere the calls are queued ahead of the device.
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
    """A walk along the chains, which take turns."""

    def __init__(self, draws: ChainDraws, start: int, state: WalkState | None):
        self._draws, self._next = draws, 0 if state is None else start
        self._chains = [
            _Chain(draws, jax.random.fold_in(draws.rng_key, number), draws.sampler.init(draws.target.center))
            for number in range(draws.num_chains)
        ]
        self._losses: list[float] = []
        if state is not None:
            for number, chain in enumerate(self._chains):
                chain.restore({key: state[f"{number}/{key}"] for key in chain.saved()})
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
        steps = draws.num_steps_between_draws + (draws.num_burnin_steps if draw == 0 else 0)
        loss = np.asarray(self._chains[number].advance(steps).loss)
        ensure_finite(loss, f"minibatch loss of chain {number} at draw {draw}")
        self._losses.append(float(loss))
        self._next += 1
        return self._chains[number].state.position

    def state(self) -> WalkState:
        """Where every chain stands; `items` goes on from it to the bit."""
        return {
            f"{number}/{key}": leaf for number, chain in enumerate(self._chains) for key, leaf in chain.saved().items()
        }

    def info(self) -> dict[str, list[float]]:
        """The mean loss, in nats, of the last minibatch before each item."""
        return {"minibatch_loss": self._losses}


class _Chain:
    def __init__(self, settings: ChainDraws, rng_key: jax.Array, state: ChainState):
        self.settings, self.rng_key, self.state = settings, rng_key, state
        self.num_steps = 0
        self._epoch, self._order = -1, np.zeros(0, int)

    def saved(self) -> dict[str, Any]:
        leaves = {str(index): leaf for index, leaf in enumerate(jax.tree.leaves(self.state))}
        return {"num_steps": self.num_steps, **leaves}

    def restore(self, saved: WalkState) -> None:
        self.num_steps = int(saved["num_steps"])
        leaves, treedef = jax.tree.flatten(self.state)
        self.state = jax.tree.unflatten(treedef, [jnp.asarray(saved[str(index)]) for index in range(len(leaves))])

    def advance(self, steps: int) -> StepInfo:
        settings = self.settings
        info = StepInfo(jnp.zeros(()))
        for _ in range(steps):
            self.state, info = _step(
                settings.sampler.step,
                jax.random.fold_in(self.rng_key, self.num_steps),
                self.state,
                settings.target,
                self._minibatch(),
                settings.step_size,
            )
            self.num_steps += 1
        return info

    def _minibatch(self) -> Batch:
        count = num_examples(self.settings.examples)
        epoch, batch = divmod(self.num_steps, -(-count // self.settings.batch_size))
        if epoch != self._epoch:
            # a stream of its own, so that no shuffle shares a key with a step's noise
            shuffle_key = jax.random.fold_in(jax.random.fold_in(self.rng_key, 2**31 - 1), epoch)
            self._epoch, self._order = epoch, np.asarray(jax.random.permutation(shuffle_key, count))
        chosen = self._order[batch * self.settings.batch_size : (batch + 1) * self.settings.batch_size]
        return jax.tree.map(lambda x: x[chosen], self.settings.examples)


@partial(jax.jit, static_argnums=0)
def _step(step: Any, rng_key: jax.Array, state: ChainState, target: Target, minibatch: Batch, step_size: float):
    return step(rng_key, state, target, minibatch, step_size)


def split_chains(matrix: np.ndarray, num_chains: int) -> np.ndarray:
    """`[num_draws, num_examples]` as swept -> `[num_chains, num_draws / num_chains, num_examples]`."""
    return matrix.reshape(-1, num_chains, matrix.shape[1]).swapaxes(0, 1)
