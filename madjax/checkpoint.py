"""Folders of arrays and settings on disk; the only module that imports orbax."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

_SETTINGS, _ARRAYS = "settings.json", "arrays"


def save(path: str | Path, settings: dict[str, Any], arrays: dict[str, Any]) -> None:
    """Writes `settings` (JSON) and `arrays` (nested dict) to a new folder, which is there whole or not at all.

    Raises:
      ValueError: where the folder exists already.
    """
    folder = Path(path).absolute()
    if folder.exists():
        raise ValueError(f"path: {folder} exists already")
    # renamed once all is there; a part is what an interruption left
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    arrays = jax.tree.map(np.asarray, _with_text_keys(arrays))
    with _checkpointer() as checkpointer:
        checkpointer.save(part / _ARRAYS, arrays)
    (part / _SETTINGS).write_text(json.dumps(settings, indent=1))
    part.rename(folder)


def load(path: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What `save` wrote, the arrays as NumPy's.

    Raises:
      ValueError: where the folder holds no such thing.
    """
    return load_settings(path), load_pytree(Path(path) / _ARRAYS)


def load_settings(path: str | Path) -> dict[str, Any]:
    """The settings alone of what `save` wrote.

    Raises:
      ValueError: where the folder holds none.
    """
    file = Path(path).absolute() / _SETTINGS
    if not file.is_file():
        raise ValueError(f"path: {file.parent} holds nothing saved by madjax ({_SETTINGS} is missing)")
    try:
        settings = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"path: {file} is no JSON ({error})") from error
    if not isinstance(settings, dict):
        raise ValueError(f"path: {file} holds {type(settings).__name__}, wanted settings by name")
    return settings


def load_pytree(path: str | Path) -> dict[str, Any]:
    """The nested dict that an orbax checkpointer wrote, the arrays as NumPy's.

    Raises:
      ValueError: where the folder holds no whole checkpoint.
    """
    folder = Path(path).absolute()
    try:
        with _checkpointer() as checkpointer:
            structure = checkpointer.metadata(folder).item_metadata.tree
            restore = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), structure)
            return checkpointer.restore(folder, restore_args=restore)
    except Exception as error:  # orbax and tensorstore raise of every kind
        raise ValueError(
            f"path: {folder} is no whole orbax checkpoint ({' '.join(str(error).split())[:200]})"
        ) from error


def _checkpointer() -> ocp.Checkpointer:
    """One that does not wait for other hosts: each reads for itself, and the first one writes."""
    host = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=host, active_processes={host}, barrier_sync_key_prefix=f"host{host}"
    )
    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler(multiprocessing_options=alone), multiprocessing_options=alone)


def _with_text_keys(tree: Any) -> Any:
    return {str(k): _with_text_keys(v) for k, v in tree.items()} if isinstance(tree, dict) else tree
