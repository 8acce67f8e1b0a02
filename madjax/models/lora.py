"""LoRA: low-rank products beside a decoder's linear layers (Hu et al. 2021, arXiv 2106.09685), new or read from PEFT.

Their parameters are called `lora_a` and `lora_b`, so `parameters="lora_"` draws, and trains, the adapter alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import jax.numpy as jnp
from flax import nnx

from madjax.interop.guard import shown
from madjax.interop.huggingface import AdapterFiles
from madjax.models.decoder import Decoder
from madjax.models.load_decoder import torch_name

# of one layer; q and v are those of the paper
LINEAR = ("attention.q", "attention.k", "attention.v", "attention.o", "mlp.gate", "mlp.up", "mlp.down")


def add_lora(model: Decoder, rank: int, *, targets: tuple[str, ...] = LINEAR, rngs: nnx.Rngs) -> None:
    """Puts a product of rank `rank` beside the linear layers `targets` of every layer; it is zero to begin with.

    The model is changed in place. A PEFT `lora_alpha` is the factor that multiplies the product's learning rate; here
    it is left at `rank`, a factor of one.

    Raises:
      ValueError: for a rank under 1, or a target that is none of `LINEAR`.
    """
    if rank < 1:
        raise ValueError(f"rank: wanted at least 1, got {rank}")
    if wrong := [target for target in targets if target not in LINEAR]:
        raise ValueError(f"targets: wanted some of {', '.join(LINEAR)}, got {', '.join(wrong)}")
    for _, block, name in _linear_layers(model, targets):
        linear = getattr(block, name)
        setattr(block, name, _beside(linear, rank, rngs))


def load_lora(model: Decoder, files: AdapterFiles, base: str | None = None) -> None:
    """Puts a PEFT adapter into the model, in place; its scale is folded into `lora_b`.

    Args:
      base: the name of the model that `model` was read from, where it is known; the adapter must be for that one.

    Raises:
      ValueError: an adapter for another base, or tensors with no place in the model, all listed.
    """
    if base is not None and files.base is not None and base != files.base:
        raise ValueError(f"path: the adapter {files.path} is for '{shown(files.base)}', the model is '{shown(base)}'")
    left, problems = dict(files.weights), []
    for path, block, name in list(_linear_layers(model, LINEAR)):
        linear, torch = getattr(block, name), torch_name(path, model.config)
        a, b = (left.pop(f"{torch}.lora_{part}.weight", None) for part in "AB")
        if a is None and b is None:
            continue
        wanted = (files.rank, linear.in_features), (linear.out_features, files.rank)
        if a is None or b is None or (a.shape, b.shape) != wanted:
            got = tuple(None if part is None else part.shape for part in (a, b))
            problems.append(f"{torch} has shapes {got}, wanted {wanted}")
            continue
        lora = _beside(linear, files.rank, nnx.Rngs(0))
        dtype = lora.lora_a.dtype
        lora.lora_a[...] = jnp.asarray(a.T, dtype)
        lora.lora_b[...] = jnp.asarray(b.T.astype("float32") * files.scale, dtype)
        setattr(block, name, lora)
    problems += [f"{shown(name)} has no place in the model" for name in left]
    if problems or not files.weights:
        raise ValueError(
            f"path: the adapter {files.path} is for another base: {'; '.join(problems[:5]) or 'it is empty'}"
            + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        )


def _linear_layers(model: Decoder, targets: tuple[str, ...]) -> Iterator[tuple[str, nnx.Module, str]]:
    """Yields (path, the module that holds it, its name there)."""
    for index, layer in enumerate(model.layers):
        for target in targets:
            part, name = re.fullmatch(r"(\w+)\.(\w+)", target).groups()  # pyright: ignore
            yield f"layers.{index}.{target}", getattr(layer, part), name


def _beside(linear: nnx.Linear, rank: int, rngs: nnx.Rngs) -> nnx.LoRA:
    # both in float32: a bfloat16 adapter could not be trained in small steps
    return nnx.LoRA(
        linear.in_features, rank, linear.out_features, base_module=linear, dtype=linear.dtype, rngs=rngs,
        param_dtype=jnp.float32,
    )  # fmt: skip
