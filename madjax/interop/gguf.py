"""Reads a GGUF file, as llama.cpp and its kin keep models: weights, tokenizer and chat template in one.

The format is read, and quantized tensors are unfolded, by the `gguf` package. Everything gets the names that a Hugging
Face folder has.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from madjax.interop.guard import shown
from madjax.interop.huggingface import LanguageFiles

# GGUF's names of tensors -> Hugging Face's
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm",
}  # fmt: skip
_LLAMA_NORMS = {"ffn_norm": "post_attention_layernorm"}
_GEMMA2_NORMS = {
    "ffn_norm": "pre_feedforward_layernorm", "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}  # fmt: skip
# metadata behind the architecture's name -> config.json's
_SIZES = {
    "block_count": "num_hidden_layers", "context_length": "max_position_embeddings", "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size", "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads", "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta", "attention.key_length": "head_dim",
    "attn_logit_softcapping": "attn_logit_softcapping", "final_logit_softcapping": "final_logit_softcapping",
    "attention.sliding_window": "sliding_window",
}  # fmt: skip
_DIGITS = {"type": "Digits", "individual_digits": True}
_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
# as the tokenizer.json of these models splits text before it merges bytes
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_SPLITS = {
    "smollm": [_DIGITS, _BYTES],
    "llama-bpe": [
        {"type": "Split", "pattern": {"Regex": _LLAMA3_SPLIT}, "behavior": "Isolated", "invert": False},
        _BYTES | {"use_regex": False},
    ],
    "gpt-2": [_BYTES],
    "default": [_BYTES],
}
_CONTROL, _USER_DEFINED = 3, 4


def read_gguf(path: str | Path) -> LanguageFiles:
    """The model in a GGUF file, its weights as float32.

    Raises:
      ValueError: no such file, a damaged one, an architecture that is not read. A tokenizer of another kind than
        byte-level BPE is left out; a `tokenizer.json` beside the file is taken before the one inside.
    """
    from gguf import GGUFReader, dequantize  # of the extra madjax[llm]

    path = Path(path)
    if not path.is_file():
        raise ValueError(f"path: {path} is not there, wanted a GGUF file")
    try:
        reader = GGUFReader(path)
        told = {name: field.contents() for name, field in reader.fields.items()}
        tensors = {tensor.name: dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    except Exception as error:  # of many kinds: the reader looks where the file tells it to
        raise ValueError(f"path: {path} cannot be read as GGUF ({shown(error)})") from error
    kind = told.get("general.architecture")
    if kind not in ("llama", "gemma", "gemma2"):
        raise ValueError(f"path: {path} has the architecture '{shown(kind)}', wanted llama, gemma or gemma2")
    config: dict[str, Any] = {name: told[f"{kind}.{key}"] for key, name in _SIZES.items() if f"{kind}.{key}" in told}
    config |= {"model_type": kind, "tie_word_embeddings": "output.weight" not in tensors}
    tokens = told.get("tokenizer.ggml.tokens", [])
    config["vocab_size"] = len(np.asarray(tensors.get("token_embd.weight", tokens)))
    names = {"bos_token": "bos_token_id", "eos_token": "eos_token_id"}
    special = {}
    for name, key in names.items():
        index = told.get(f"tokenizer.ggml.{key}")
        if isinstance(index, int) and 0 <= index < len(tokens):
            config[key], special[name] = index, tokens[index]
    if "rope_freqs.weight" in tensors:
        config["rope_parameters"] = {"divisors": tuple(tensors.pop("rope_freqs.weight").tolist())}
    beside = path.with_name("tokenizer.json")
    tokenizer = beside.read_text(encoding="utf-8") if beside.is_file() else _tokenizer(told)
    return LanguageFiles(
        path, config, _renamed(tensors, config, path), tokenizer, told.get("tokenizer.chat_template"), special
    )


def _renamed(tensors: dict[str, np.ndarray], config: dict[str, Any], path: Path) -> dict[str, np.ndarray]:
    kind = config["model_type"]
    layer_names = _LAYER | (_GEMMA2_NORMS if kind == "gemma2" else _LLAMA_NORMS)
    weights, unknown = {}, []
    for name, array in tensors.items():
        *start, part, leaf = name.split(".")
        if not start and part in _TOP:
            renamed = f"{_TOP[part]}.{leaf}"
        elif len(start) == 2 and start[0] == "blk" and part in layer_names:
            renamed = f"model.layers.{start[1]}.{layer_names[part]}.{leaf}"
        else:
            unknown.append(name)
            continue
        if kind == "llama" and part in ("attn_q", "attn_k"):
            heads = config["num_attention_heads" if part == "attn_q" else "num_key_value_heads"]
            array = _halves(array, heads)
        if kind != "llama" and "norm" in renamed:
            array = array - 1  # llama.cpp keeps Gemma's 1 + scale
        weights[renamed] = array
    if unknown:
        raise ValueError(f"path: {path} has tensors that no {kind} has: {shown(', '.join(unknown))}")
    return weights


def _halves(array: np.ndarray, heads: int) -> np.ndarray:
    """From rotary pairs side by side, as llama.cpp's llama has them, to first and second half of each head."""
    return array.reshape(heads, -1, 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


def _tokenizer(told: dict[str, Any]) -> str | None:
    """A `tokenizer.json` out of the metadata; None for other kinds than byte-level BPE."""
    tokens, types = told.get("tokenizer.ggml.tokens", []), told.get("tokenizer.ggml.token_type", [])
    split = _SPLITS.get(told.get("tokenizer.ggml.pre", "default"))
    if told.get("tokenizer.ggml.model") != "gpt2" or split is None:
        return None
    added = [
        {
            "id": index, "content": tokens[index], "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": False, "special": kind == _CONTROL,
        }
        for index, kind in enumerate(types)
        if kind in (_CONTROL, _USER_DEFINED)
    ]  # fmt: skip
    return json.dumps(
        {
            "version": "1.0",
            "added_tokens": added,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": split},
            "decoder": _BYTES,
            "model": {
                "type": "BPE",
                "vocab": {token: index for index, token in enumerate(tokens)},
                "merges": told.get("tokenizer.ggml.merges", []),
                "ignore_merges": told.get("tokenizer.ggml.pre") == "llama-bpe",
            },
        }
    )
