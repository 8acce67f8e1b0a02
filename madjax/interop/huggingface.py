"""Reads a Hugging Face folder, and a folder of a PEFT LoRA adapter, without any of their libraries and offline.

Only JSON, safetensors and the chat template are read. Nothing in the folder is executed but the template, and that in
Jinja's sandbox (`madjax.interop.tokenizer`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import safe_open

from madjax.interop.guard import shown

_MOST_JSON = 2**26


class LanguageFiles(NamedTuple):
    """What a language model's files hold, by Hugging Face's names.

    Attributes:
      path: where it was read, for messages.
      config: of `config.json`.
      weights: arrays by name, `model.layers.0.self_attn.q_proj.weight`, outputs first.
      tokenizer: the text of `tokenizer.json`, or None.
      chat_template: Jinja, or None; special_tokens: `bos_token` and `eos_token`, where they are told.
    """

    path: Path
    config: dict[str, Any]
    weights: dict[str, np.ndarray]
    tokenizer: str | None
    chat_template: str | None
    special_tokens: dict[str, str]


class AdapterFiles(NamedTuple):
    """A LoRA adapter: `weights` by PEFT's names without `base_model.model.`; its products are multiplied by `scale`."""

    path: Path
    base: str | None
    rank: int
    scale: float
    weights: dict[str, np.ndarray]


def read_folder(path: str | Path) -> LanguageFiles:
    """The model in a folder with `config.json` and `model*.safetensors`.

    Raises:
      ValueError: what is missing or damaged, with the file's name.
    """
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"path: {path} is not there, wanted a folder with config.json and safetensors")
    config = read_json(path / "config.json")
    index = path / "model.safetensors.index.json"
    if index.is_file():
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not shards or not all(isinstance(name, str) for name in shards.values()):
            raise ValueError(f"path: {index} has no weight_map of names and files")
        # a name out of a download must not leave its folder
        names = sorted({Path(name).name for name in shards.values()})
    else:
        shards, names = {}, ["model.safetensors"]
    if missing := [name for name in names if not (path / name).is_file()]:
        raise ValueError(f"path: {path} lacks {len(missing)} of {len(names)} files of weights: {shown(missing)}")
    weights = {}
    for name in names:
        weights |= read_safetensors(path / name)
    if lost := sorted(shards.keys() - weights.keys()):
        raise ValueError(f"path: the index of {path} promises tensors that its files lack: {shown(', '.join(lost))}")
    told = read_json(path / "tokenizer_config.json") if (path / "tokenizer_config.json").is_file() else {}
    template = told.get("chat_template")
    if (path / "chat_template.jinja").is_file():
        template = _read_text(path / "chat_template.jinja")
    elif isinstance(template, list):  # several, by name
        named = {item.get("name"): item.get("template") for item in template if isinstance(item, dict)}
        template = named.get("default")
    special = {name: _token(told.get(name)) for name in ("bos_token", "eos_token")}
    tokenizer = path / "tokenizer.json"
    return LanguageFiles(
        path,
        config,
        weights,
        _read_text(tokenizer) if tokenizer.is_file() else None,
        template if isinstance(template, str) else None,
        {name: token for name, token in special.items() if token is not None},
    )


def read_adapter(path: str | Path) -> AdapterFiles:
    """The LoRA adapter in a folder with `adapter_config.json` and `adapter_model.safetensors`.

    Raises:
      ValueError: what is missing or damaged, or an adapter that is more than LoRA on linear layers.
    """
    path = Path(path)
    config = read_json(path / "adapter_config.json")
    kind, rank, alpha = (config.get(name) for name in ("peft_type", "r", "lora_alpha"))
    if kind != "LORA" or not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
        raise ValueError(f"path: {path / 'adapter_config.json'} is no LoRA adapter with r and lora_alpha")
    extra = ("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern", "fan_in_fan_out")
    bias = [] if config.get("bias", "none") == "none" else ["bias"]
    if unknown := [name for name in extra if config.get(name)] + bias:
        raise ValueError(f"path: {path / 'adapter_config.json'} asks for {', '.join(unknown)}, wanted plain LoRA")
    weights = {
        name.removeprefix("base_model.model."): array
        for name, array in read_safetensors(path / "adapter_model.safetensors").items()
    }
    base = config.get("base_model_name_or_path")
    scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
    return AdapterFiles(path, base if isinstance(base, str) else None, rank, scale, weights)


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """All tensors of a file; bfloat16 ones as `ml_dtypes` has them.

    Raises:
      ValueError: no such file, or a damaged one.
    """
    if not path.is_file():
        raise ValueError(f"path: {path} is not there, wanted safetensors")
    try:
        with safe_open(path, "numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except Exception as error:  # of the library's own kinds
        raise ValueError(f"path: {path} cannot be read as safetensors ({shown(error)})") from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
      ValueError: no such file, or none with an object.
    """
    if not path.is_file():
        raise ValueError(f"path: {path} is not there")
    try:
        value = json.loads(_read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"path: {path} is no JSON ({shown(error)})") from error
    if not isinstance(value, dict):
        raise ValueError(f"path: {path} holds no object but {shown(type(value).__name__)}")
    return value


def _read_text(path: Path) -> str:
    if path.stat().st_size > _MOST_JSON:
        raise ValueError(f"path: {path} has {path.stat().st_size} bytes, wanted at most {_MOST_JSON}")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"path: {path} is no UTF-8 ({shown(error)})") from error


def _token(value: Any) -> str | None:
    if isinstance(value, dict):  # with how it is to be stripped
        value = value.get("content")
    return value if isinstance(value, str) else None
