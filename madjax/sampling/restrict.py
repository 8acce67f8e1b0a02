"""Which parameters are drawn: a mask over the pytree, from path patterns or the user's own."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp

from madjax.types import Params


def path_names(params: Params) -> list[str]:
    """The path of every leaf, as patterns see it, for instance `block3/layers/0/conv1/kernel`."""
    # NNX wraps each array in a Variable whose only child is called `value`; no user writes that
    return [
        jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")
        for path, _ in jax.tree_util.tree_leaves_with_path(params)
    ]


def drawn_parameters(params: Params, pattern: str | None = None, trainable: Any = None) -> Any:
    """A mask of the leaves to draw: floating, trainable, and with a path in which `pattern` is found.

    Args:
      pattern: a regular expression searched in each leaf's path: `"^fc/"` the last layer, `"bias$"` only biases.
        None: every trainable leaf.
      trainable: pytree of bool like `params`, or None for all; `ClassificationLoss.is_trainable` gives it.

    Returns:
      A pytree of bool like `params`.

    Raises:
      ValueError: where nothing is left to draw; the message lists the paths there are.
    """
    leaves, treedef = jax.tree.flatten(params)
    names = path_names(params)
    allowed = [True] * len(leaves) if trainable is None else jax.tree.leaves(trainable)
    mask = [
        bool(may) and jnp.issubdtype(jnp.result_type(leaf), jnp.floating) and bool(re.search(pattern or "", name))
        for leaf, name, may in zip(leaves, names, allowed, strict=True)
    ]
    if not any(mask):
        raise ValueError(f"pattern: {pattern!r} matches no trainable parameter; the paths are {', '.join(names)}")
    return jax.tree.unflatten(treedef, mask)
