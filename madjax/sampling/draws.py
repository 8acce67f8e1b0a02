"""What the sweep asks of a set of draws, whoever made them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import jax
import numpy as np

from madjax.types import Params

# flat dict of arrays: where a walk stands, for a file
WalkState = dict[str, Any]


class Walk(Protocol):
    """An iterator over the items of a set of draws, which can say where it stands."""

    def __iter__(self) -> Iterator[Any]: ...

    def __next__(self) -> Any: ...

    def state(self) -> WalkState | None:
        """What `Draws.items` needs to go on after the last item; None where its number is enough."""
        ...

    def info(self) -> dict[str, list[float]]:
        """What was seen on the way to each item of this walk so far, such as a minibatch's loss."""
        ...


class Draws(Protocol):
    """An ordered set of `num_draws` parameter pytrees near the trained ones.

    It is a pytree itself, so a compiled sweep takes it as an argument. The host walks `items`; inside the compiled
    program `params` turns one of them into parameters. Independent draws pass their number and make the noise on the
    device; chains pass the parameters they have reached.
    """

    @property
    def num_draws(self) -> int: ...

    @property
    def drawn(self) -> tuple[bool, ...] | None:
        """Which leaves of the parameters differ between draws, in flattening order; None: any may."""
        ...

    def items(self, start: int = 0, state: WalkState | None = None) -> Walk:
        """Yields one pytree of arrays a draw, in order, from draw `start` on.

        Args:
          state: of an earlier walk after `start` items; without it a chain walks there again.
        """
        ...

    def any_item(self) -> Any:
        """An item of the right shapes, to try a program with."""
        ...

    def params(self, item: Any) -> Params:
        """The parameters of one draw. Pure and traceable."""
        ...


class IndexedWalk:
    """A walk over items that can be told from their number."""

    def __init__(self, item: Callable[[int], Any], start: int, stop: int):
        self._item, self._numbers = item, iter(range(start, stop))

    def __iter__(self) -> IndexedWalk:
        return self

    def __next__(self) -> Any:
        return self._item(next(self._numbers))

    def state(self) -> None:
        return None

    def info(self) -> dict[str, list[float]]:
        return {}


class NumberedDraws:
    """Draws that come back from a key and their number, which is all that their items are."""

    def items(self: Draws, start: int = 0, state: WalkState | None = None) -> IndexedWalk:
        del state
        return IndexedWalk(np.int32, start, self.num_draws)

    def any_item(self) -> np.int32:
        return np.int32(0)


# a leafless pytree: inside the compiled sweep an item already is the parameters
@functools.partial(jax.tree_util.register_static)
@dataclasses.dataclass(frozen=True, eq=False)
class StoredDraws:
    """Draws kept in memory, for instance a chain's.

    Attributes:
      stacked: parameters with a leading axis of `num_draws`.
    """

    stacked: Params

    @property
    def num_draws(self) -> int:
        return jax.tree.leaves(self.stacked)[0].shape[0]

    @property
    def drawn(self) -> tuple[bool, ...]:
        return tuple(bool((np.asarray(leaf) != np.asarray(leaf[:1])).any()) for leaf in jax.tree.leaves(self.stacked))

    def items(self, start: int = 0, state: WalkState | None = None) -> IndexedWalk:
        del state
        return IndexedWalk(lambda index: jax.tree.map(lambda leaf: leaf[index], self.stacked), start, self.num_draws)

    def any_item(self) -> Params:
        return next(self.items())

    def params(self, item: Params) -> Params:
        return item


@functools.partial(jax.tree_util.register_static)
class RecordedDraws:
    """Other draws, kept on the host as a sweep walks them."""

    def __init__(self, draws: Draws):
        self._draws = draws
        self._seen: list[Params] = []

    @property
    def num_draws(self) -> int:
        return self._draws.num_draws

    @property
    def drawn(self) -> tuple[bool, ...] | None:
        return self._draws.drawn

    def items(self, start: int = 0, state: WalkState | None = None) -> Walk:
        del state  # what came before has to be seen again
        self._seen.clear()
        walk = _RecordingWalk(self._draws.items(), self._seen, start)
        for _ in range(start):
            next(walk)
        return walk

    def any_item(self) -> Params:
        return self._draws.any_item()

    def params(self, item: Params) -> Params:
        return self._draws.params(item)

    def stored(self) -> StoredDraws:
        """What was walked; the sweep must have come to its end."""
        return StoredDraws(jax.tree.map(lambda *leaves: np.stack(leaves), *self._seen))


@dataclasses.dataclass
class _RecordingWalk:
    walk: Walk
    seen: list[Params]
    start: int

    def __iter__(self) -> _RecordingWalk:
        return self

    def __next__(self) -> Params:
        item = next(self.walk)
        self.seen.append(jax.tree.map(np.asarray, item))
        return item

    def state(self) -> None:
        return None

    def info(self) -> dict[str, list[float]]:
        return {name: values[self.start :] for name, values in self.walk.info().items()}
