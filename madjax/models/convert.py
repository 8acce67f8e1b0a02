"""From a torch state dict, or a Flax one, to an NNX model: by name, with everything that does not fit listed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from madjax.interop.guard import shown
from madjax.models.classifier import Classifier
from madjax.models.registry import build_model

Model = TypeVar("Model", bound=nnx.Module)

# a variable's name here -> torch's
TORCH_LEAVES = {
    "kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias", "mean": "running_mean",
    "var": "running_var",
}  # fmt: skip


def from_torch(
    name: str,
    weights: Mapping[str, np.ndarray],
    image_shape: tuple[int, ...],
    *,
    num_classes: int | None = None,
    dtype: DTypeLike | None = None,
) -> Classifier:
    """The model `name` of the registry with the weights of a torch state dict, in eval mode.

    Args:
      weights: by torch's names or the model's own, as for `load_state_dict`.
      image_shape: (height, width, channels).
      num_classes: read from the head's weight unless given; if given, the weights must agree.
      dtype: of the computation, see `build_model`.

    Raises:
      ValueError: lists every missing, extra and misshapen tensor; or see `build_model`.
    """
    weights = _arrays(weights)

    def abstract(num_classes: int) -> Classifier:  # no time is spent on initial values that are then replaced
        return nnx.eval_shape(lambda: build_model(name, num_classes, image_shape, dtype=dtype, rngs=nnx.Rngs(0)))

    if num_classes is None:
        model = abstract(1)
        heads = {f"{rename(model.HEAD)}.weight": 0 for rename in model.TORCH_NAMES} | {f"{model.HEAD}.kernel": -1}
        # without any head the weights are another model's, whatever the number
        num_classes = next(
            (int(weights[head].shape[i]) for head, i in heads.items() if np.ndim(weights.get(head, 0))), 1
        )
    model = load_state_dict(abstract(num_classes), weights)
    model.eval()
    return model


def load_state_dict(
    model: Model, weights: Mapping[str, np.ndarray], rename: Callable[[str], str] | None = None
) -> Model:
    """The model with the weights of a torch state dict.

    Args:
      weights: by torch's names, or by the model's own (`layers.0.kernel`), as Flax keeps them; a leading `module.` is
        dropped, and `num_batches_tracked` is not needed.
      rename: from the dotted path of a module here to its path there; by default that of the architecture's known
        namings, `TORCH_NAMES` of its class and its own names, which fits best.

    Raises:
      ValueError: lists every missing, extra and misshapen tensor.
    """
    weights = _arrays(weights)
    graphdef, state = nnx.split(model)
    fits = [_fit(state, weights, r) for r in ([rename] if rename else [*_renames(model), None])]
    flat, problems = min(fits, key=lambda fit: sum(map(len, fit[1])))
    if any(problems):
        listed = "; ".join(problem for some in problems for problem in some)
        raise ValueError(f"weights: do not fit {type(model).__name__}: {listed}")
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


def _fit(state: nnx.State, weights: dict[str, np.ndarray], rename: Callable[[str], str] | None):
    """The flat state with the weights, by the model's own names without `rename`; what is missing, misshapen, left."""
    left = dict(weights)
    flat, missing, misshapen = [], [], []
    for path, variable in nnx.to_flat_state(state):
        *module, leaf = map(str, path)
        if rename is None:
            name, order = ".".join(map(str, path)), tuple(range(variable.ndim))
        else:
            name = f"{rename('.'.join(module))}.{TORCH_LEAVES[leaf]}"
            # torch keeps outputs first
            outputs_first = {4: (3, 2, 0, 1), 2: (1, 0)}
            order = outputs_first[variable.ndim] if leaf == "kernel" else tuple(range(variable.ndim))
        shape = tuple(variable.shape[axis] for axis in order)
        array = left.pop(name, None)
        if array is None:
            missing.append(f"{name} is missing")
        elif array.shape != shape:
            misshapen.append(f"{name} has shape {array.shape}, wanted {shape}")
        else:
            flat.append((path, variable.replace(jnp.asarray(array.transpose(np.argsort(order)), variable.dtype))))
    return flat, (missing, misshapen, [f"{shown(name)} has no place in the model" for name in left])


def _renames(model: nnx.Module) -> tuple[Callable[[str], str], ...]:
    return getattr(model, "TORCH_NAMES", (str,))


def _arrays(weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    arrays = {name.removeprefix("module."): np.asarray(value) for name, value in weights.items()}
    if others := [name for name, array in arrays.items() if array.dtype == object or array.dtype.kind in "US"]:
        raise ValueError(f"weights: wanted a flat dict of arrays, got none at {', '.join(map(shown, others))}")
    return {name: array for name, array in arrays.items() if not name.endswith("num_batches_tracked")}
