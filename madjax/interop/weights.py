"""Weights by name from other people's files: torch checkpoints, safetensors, and orbax folders of Flax NNX state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from madjax import checkpoint
from madjax.interop.guard import shown
from madjax.interop.huggingface import read_safetensors
from madjax.interop.torch_checkpoint import load_torch_checkpoint

_NAMES = ("state_dict", "model_state_dict", "model_state", "model", "net", "network", "weights", "params")


def load_weights(path: str | Path) -> dict[str, np.ndarray]:
    """Flat names and arrays, as `madjax.models.load_state_dict` takes those of torch.

    Args:
      path: a `.safetensors` file, a folder in which orbax wrote the state of a Flax NNX model (names are joined by
        dots: `layers.0.kernel`), or else a torch checkpoint, read without executing anything.

    Raises:
      ValueError: no such file, a damaged one, one that is refused, or no single dict of arrays in it.
    """
    path = Path(path)
    if path.is_dir():
        return _flat(checkpoint.load_pytree(path))
    if not path.is_file():
        raise ValueError(f"path: {path} is not there, wanted a checkpoint")
    return read_safetensors(path) if path.suffix == ".safetensors" else find_weights(load_torch_checkpoint(path))


def find_weights(loaded: Any) -> dict[str, np.ndarray]:
    """The one dict of arrays in what a checkpoint holds, a leading `module.` (of DataParallel) dropped.

    Args:
      loaded: that dict itself, or a dict that holds it under `state_dict`, `model` or another usual name, or as its
        only dict of arrays.

    Raises:
      ValueError: none or several of them, or two names that differ only in `module.`.
    """
    if not _is_weights(loaded):
        found = {name: value for name, value in loaded.items() if _is_weights(value)} if type(loaded) is dict else {}
        usual = {name: value for name, value in found.items() if name in _NAMES} or found
        if len(usual) != 1:
            names = shown(", ".join(sorted(map(str, usual)))) or "none"
            raise ValueError(f"path: wanted one dict of arrays in the checkpoint, got {names}")
        (loaded,) = usual.values()
    weights = {name.removeprefix("module."): array for name, array in loaded.items()}
    if len(weights) != len(loaded):
        raise ValueError("path: the checkpoint has names that differ only in a leading 'module.'")
    return weights


def _is_weights(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and len(value) > 0
        and all(isinstance(name, str) and isinstance(item, np.ndarray) for name, item in value.items())
    )


def _flat(tree: Any, path: tuple[str, ...] = ()) -> dict[str, np.ndarray]:
    if not isinstance(tree, dict):
        # a state saved with its Variables wraps each array in a field `value`
        return {".".join(path[:-1] if path[-1:] == ("value",) else path): tree}
    return {name: array for key, item in tree.items() for name, array in _flat(item, (*path, str(key))).items()}
