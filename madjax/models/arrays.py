"""A Flax NNX model's state as flat names and arrays, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np
from flax import nnx

Model = TypeVar("Model", bound=nnx.Module)


def to_arrays(state: nnx.State, prefix: str = "") -> dict[str, np.ndarray]:
    """Arrays by their dotted paths behind `prefix`: `conv1.kernel`."""
    return {
        prefix + ".".join(map(str, path)): np.asarray(variable.get_value())
        for path, variable in nnx.to_flat_state(state)
    }


def from_arrays(model: Model, arrays: Mapping[str, Any], prefix: str = "") -> Model:
    """A model like `model` with what `to_arrays` returned."""
    graphdef, state = nnx.split(model)
    return nnx.merge(graphdef, state_from_arrays(state, arrays, prefix))


def state_from_arrays(state: nnx.State, arrays: Mapping[str, Any], prefix: str = "") -> nnx.State:
    """A state like `state`, which may be a part of a model's, with what `to_arrays` returned."""
    flat = [
        (path, variable.replace(jnp.asarray(arrays[prefix + ".".join(map(str, path))])))
        for path, variable in nnx.to_flat_state(state)
    ]
    return nnx.from_flat_state(flat)  # pyright: ignore[reportReturnType]
