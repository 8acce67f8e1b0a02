"""From a torch state dict to an NNX model: by name, with everything that does not fit listed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

import jax.numpy as jnp
import numpy as np
from flax import nnx

Model = TypeVar("Model", bound=nnx.Module)

_TORCH_NAMES = {
    "kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var",
}  # fmt: skip


def load_state_dict(
    model: Model, state_dict: Mapping[str, np.ndarray], rename: Callable[[str], str] = lambda module: module
) -> Model:
    """The model with the weights of a torch state dict.

    Args:
      state_dict: by torch's names; a leading `module.` is dropped, and `num_batches_tracked` is not needed.
      rename: from the dotted path of a module here to its path there.

    Raises:
      ValueError: lists every missing, extra and misshapen tensor.
    """
    left = {
        name.removeprefix("module."): array
        for name, array in state_dict.items()
        if not name.endswith("num_batches_tracked")
    }
    graphdef, state = nnx.split(model)
    flat, problems = [], []
    for path, variable in nnx.to_flat_state(state):
        *module, leaf = map(str, path)
        name = f"{rename('.'.join(module))}.{_TORCH_NAMES[leaf]}"
        array = left.pop(name, None)
        if array is None:
            problems.append(f"{name} is missing")
            continue
        if leaf == "kernel":  # torch keeps outputs first
            array = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T
        if array.shape != variable.shape:
            problems.append(f"{name} has shape {array.shape}, wanted {variable.shape}")
        flat.append((path, variable.replace(jnp.asarray(array, variable.dtype))))
    problems += [f"{name} has no place in the model" for name in left]
    if problems:
        raise ValueError(f"state_dict: does not fit {type(model).__name__}: {'; '.join(problems)}")
    return nnx.merge(graphdef, nnx.from_flat_state(flat))
