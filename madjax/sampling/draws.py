"""What the sweep asks of a set of draws, whoever made them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import Any, Protocol

import jax
import numpy as np

from madjax.types import Params


class Draws(Protocol):
    """An ordered set of `num_draws` parameter pytrees near the trained ones.

    It is a pytree itself, so a compiled sweep takes it as an argument. The host walks `items`; inside the compiled
    program `params` turns one of them into parameters. Independent draws pass their number and make the noise on the
    device; chains pass the parameters they have reached.
    """

    @property
    def num_draws(self) -> int: ...

    def items(self) -> Iterator[Any]:
        """Yields one pytree of arrays a draw, in order."""
        ...

    def params(self, item: Any) -> Params:
        """The parameters of one draw. Pure and traceable."""
        ...


# a leafless pytree: inside the compiled sweep an item already is the parameters
@partial(jax.tree_util.register_static)
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

    def items(self) -> Iterator[Params]:
        for index in range(self.num_draws):
            yield jax.tree.map(lambda leaf, i=index: leaf[i], self.stacked)

    def params(self, item: Params) -> Params:
        return item


@partial(jax.tree_util.register_static)
class RecordedDraws:
    """Other draws, kept on the host as a sweep walks them."""

    def __init__(self, draws: Draws):
        self._draws = draws
        self._seen: list[Params] = []

    @property
    def num_draws(self) -> int:
        return self._draws.num_draws

    def items(self) -> Iterator[Params]:
        self._seen.clear()
        for item in self._draws.items():
            self._seen.append(jax.tree.map(np.asarray, item))
            yield item

    def params(self, item: Params) -> Params:
        return self._draws.params(item)

    def stored(self) -> StoredDraws:
        """What was walked; the sweep must have come to its end."""
        return StoredDraws(jax.tree.map(lambda *leaves: np.stack(leaves), *self._seen))
