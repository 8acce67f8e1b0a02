"""The types that every room of the package shares.

A *draw* is one set of parameters near the trained ones, an *example* one input with its label. Matrices of losses are
always float32 `[num_draws, num_examples]`; the column of an example is its *loss trace*.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

# A pytree of arrays: an `nnx.State`, Linen's dict of variables, or anything of the user's own.
Params = Any

# A pytree of arrays whose leading axis counts examples, usually {"image": [n, ...], "label": int32 [n]}.
Batch = Any

# (params, batch) -> float32 [n]: one loss an example, never reduced.
LossFn = Callable[[Params, Batch], jax.Array]

# float32 [num_draws, num_examples], on the host.
LossMatrix = np.ndarray

# what a loss has to exceed to count where its logarithm is taken, in nats
SMALL_LOSS = 1e-7


class Stage(NamedTuple):
    """A part of a loss that runs on parameters of its own, see `madjax.sampling.layerwise`.

    Attributes:
      numbers: pytree of int: where the leaves of its parameters stand among all, in flattening order.
      run: (parameters, what the stage before returned) -> what the next one takes; the first stage takes a batch that
        the loss has cut, the last returns losses. Pure, traceable and hashable; equal for layers that differ in nothing
        else.
    """

    numbers: Any
    run: Callable[[Params, Any], Any]


def num_examples(batch: Batch, name: str = "examples") -> int:
    """The common length of the leading axes of `batch`.

    Raises:
      ValueError: where the batch holds no array, or arrays of different lengths; `name` is the argument to blame.
    """
    lengths = {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.shape(leaf)[0] if np.ndim(leaf) else None
        for path, leaf in jax.tree_util.tree_leaves_with_path(batch)
    }
    if not lengths or None in lengths.values() or len(set(lengths.values())) > 1:
        raise ValueError(f"{name}: wanted arrays with one common leading axis, got lengths {lengths}")
    return next(iter(lengths.values()))  # pyright: ignore[reportReturnType]
