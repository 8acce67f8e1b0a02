"""From files of a language model to a `Decoder`, by name, with everything that does not fit listed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from madjax.interop.gguf import read_gguf
from madjax.interop.guard import shown
from madjax.interop.huggingface import LanguageFiles, read_folder
from madjax.models.convert import load_state_dict
from madjax.models.decoder import Decoder, DecoderConfig

_PARTS = {
    "embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head", "attention": "self_attn",
    "q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj",
    "gate": "gate_proj", "up": "up_proj", "down": "down_proj", "layers": "model.layers",
    "attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm",
}  # fmt: skip
_GEMMA2_PARTS = {
    "attention_post_norm": "post_attention_layernorm", "mlp_norm": "pre_feedforward_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
}  # fmt: skip
_FAMILIES = ("llama", "gemma", "gemma2")


def read_language_files(path: str | Path) -> LanguageFiles:
    """A Hugging Face folder, or a `.gguf` file."""
    return read_gguf(path) if Path(path).suffix == ".gguf" else read_folder(path)


def load_decoder(files: LanguageFiles, *, dtype: DTypeLike | None = None) -> Decoder:
    """The model in the files.

    Args:
      dtype: of parameters and computation, float32 where None.

    Raises:
      ValueError: an architecture that is none of llama, gemma and gemma2, a config that lacks a size, or tensors that
        are missing, extra or misshapen, all listed.
    """
    config = decoder_config(files)
    weights = {name: array for name, array in files.weights.items() if not name.endswith("rotary_emb.inv_freq")}
    if config.tied:
        weights.pop("lm_head.weight", None)
    model = nnx.eval_shape(lambda: Decoder(config, dtype=dtype, rngs=nnx.Rngs(0)))
    try:
        return load_state_dict(model, weights, lambda path: torch_name(path, config))
    except ValueError as error:
        raise ValueError(f"path: {files.path}: {error}") from error


def torch_name(path: str, config: DecoderConfig) -> str:
    """Hugging Face's name of a module.

    >>> torch_name("layers.0.attention.q", DecoderConfig(8, 4, 4, 1, 1, 1, 4))
    'model.layers.0.self_attn.q_proj'
    """
    parts = _PARTS | (_GEMMA2_PARTS if config.post_norms else {})
    return ".".join(parts.get(part, part) for part in path.split("."))


def decoder_config(files: LanguageFiles) -> DecoderConfig:
    """Sizes and family out of `config.json`.

    Raises:
      ValueError: what is unknown or missing, with the file's name.
    """
    told, family = files.config, files.config.get("model_type")
    if family not in _FAMILIES:
        raise ValueError(
            f"path: {files.path} has the architecture '{shown(family)}', wanted one of {', '.join(_FAMILIES)}"
        )

    def number(name: str, default: Any = None) -> Any:
        value = told.get(name)
        value = default if value is None else value
        if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
            raise ValueError(f"path: {files.path}: wanted a positive number as {name}, got {shown(value)}")
        return value

    size, heads, gemma = number("hidden_size"), number("num_attention_heads"), family != "llama"
    head_size = number("head_dim", size // heads)
    rope = told.get("rope_parameters") or told.get("rope_scaling") or {}
    base = float(rope.get("rope_theta") or number("rope_theta", 1e4))
    activation = told.get("hidden_activation") or told.get("hidden_act") or ("gelu_pytorch_tanh" if gemma else "silu")
    # Gemma's first configs say "gelu" and mean its tanh form
    wanted = ("gelu", "gelu_pytorch_tanh") if gemma else ("silu",)
    if activation not in wanted:
        raise ValueError(f"path: {files.path}: the activation is '{shown(activation)}', wanted {' or '.join(wanted)}")
    only = {"attn_logit_softcapping": None, "final_logit_softcapping": None, "sliding_window": None}
    caps = {name: number(name) if family == "gemma2" and told.get(name) is not None else value
            for name, value in only.items()}  # fmt: skip
    return DecoderConfig(
        vocab_size=number("vocab_size"),
        size=size,
        hidden_size=number("intermediate_size"),
        num_layers=number("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=number("num_key_value_heads", heads),
        head_size=head_size,
        context=number("max_position_embeddings", 2048),
        rope_base=base,
        rope_divisors=_rope_divisors(rope, base, head_size, files),
        norm_epsilon=number("rms_norm_eps", 1e-6),
        tied=bool(told.get("tie_word_embeddings", gemma)),
        attention_bias=bool(told.get("attention_bias", False)),
        mlp_bias=bool(told.get("mlp_bias", False)),
        activation="gelu" if gemma else "silu",
        unit_offset=gemma,
        post_norms=family == "gemma2",
        query_size=number("query_pre_attn_scalar") if "query_pre_attn_scalar" in told else None,
        attention_cap=caps["attn_logit_softcapping"],
        logit_cap=caps["final_logit_softcapping"],
        window=caps["sliding_window"],
    )


def _rope_divisors(rope: dict[str, Any], base: float, head_size: int, files: LanguageFiles) -> tuple[float, ...] | None:
    """Llama 3.1's stretched low frequencies (arXiv 2407.21783, section 3.4.1; the formula is that of its release)."""
    given = rope.get("divisors")  # a GGUF file tells them themselves
    kind = rope.get("rope_type", rope.get("type", "default"))
    if given is not None or kind in (None, "default"):
        return given
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    if kind != "llama3" or not all(isinstance(rope.get(name), int | float) for name in names):
        raise ValueError(f"path: {files.path}: the rotary positions are '{shown(kind)}', wanted default or llama3")
    factor, low, high, context = (rope[name] for name in names)
    half = head_size // 2
    turns = context * base ** (-np.arange(half) / half) / (2 * np.pi)
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return tuple(1 / (kept + (1 - kept) / factor))
