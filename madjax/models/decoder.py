"""Decoders of the Llama and Gemma families, in one compact NNX module.

The families differ in what `DecoderConfig` names, and in nothing else: Llama 3 (arXiv 2407.21783) and SmolLM2, which is
a Llama (arXiv 2502.02737); Gemma (arXiv 2403.08295) and Gemma 2 (arXiv 2408.00118). Layers are a Python list and not a
scan, so that each has names of its own to draw by, and the layers before the first drawn one are a frozen prefix.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

_INIT = nnx.initializers.normal(0.02)


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes of a decoder, and what tells the families apart.

    Attributes:
      head_size: features of one attention head; num_kv_heads: heads of keys and values, each shared by several queries.
      context: tokens that the model was made for.
      rope_divisors: Llama 3.1: what each rotary frequency is divided by, `[head_size / 2]`, for a longer context.
      tied: whether the embedding is the output's matrix as well.
      activation: "silu" or "gelu" (its tanh form), of the gated feed-forward part.
      unit_offset: Gemma: a norm multiplies by 1 + its scale, and embeddings by the root of their size.
      post_norms: Gemma 2: a second norm behind attention and feed-forward.
      query_size: queries are divided by its root; `head_size` where None.
      attention_cap, logit_cap: Gemma 2: x becomes cap · tanh(x / cap).
      window: Gemma 2: even layers look back at so many tokens.
    """

    vocab_size: int
    size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    context: int = 2048
    rope_base: float = 1e4
    rope_divisors: tuple[float, ...] | None = None
    norm_epsilon: float = 1e-5
    tied: bool = True
    attention_bias: bool = False
    mlp_bias: bool = False
    activation: str = "silu"
    unit_offset: bool = False
    post_norms: bool = False
    query_size: float | None = None
    attention_cap: float | None = None
    logit_cap: float | None = None
    window: int | None = None


# of the tokens that all sequences begin with, and of the rest of each
Pair = tuple[jax.Array, jax.Array]


class Cache(NamedTuple):
    """Keys and values of the tokens that were passed, `[n, slots, num_kv_heads, head_size]` a layer.

    Attributes:
      positions: int32 `[n, slots]`, -1 where a slot is empty or holds padding; filled: slots in use.
    """

    keys: list[jax.Array]
    values: list[jax.Array]
    positions: jax.Array
    filled: jax.Array | int


class RMSNorm(nnx.Module):
    """x / rms(x) · scale, in float32."""

    def __init__(self, size: int, config: DecoderConfig):
        self.scale = nnx.Param(jnp.zeros(size) if config.unit_offset else jnp.ones(size))
        self.epsilon, self.offset = config.norm_epsilon, float(config.unit_offset)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), -1, keepdims=True) + self.epsilon)
        return (y * (self.offset + self.scale.astype(jnp.float32))[None, None]).astype(x.dtype)


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions; a token sees those whose position is at most its own."""

    def __init__(self, config: DecoderConfig, window: int | None, dtype: DTypeLike | None, rngs: nnx.Rngs):
        queries, others = config.num_heads * config.head_size, config.num_kv_heads * config.head_size
        bias = config.attention_bias
        self.q = _linear(config.size, queries, bias, dtype, rngs)
        self.k = _linear(config.size, others, bias, dtype, rngs)
        self.v = _linear(config.size, others, bias, dtype, rngs)
        self.o = _linear(queries, config.size, bias, dtype, rngs)
        self.config, self.window = config, window

    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array,
        angles: jax.Array,
        slots: tuple[jax.Array, jax.Array],
        filled: jax.Array | int,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """`[n, length, size]`, and keys and values with those of `x` written behind the `filled` slots.

        Args:
          positions: `[n, num_slots]` of the keys; angles: `[n, length, head_size / 2]`.
        """
        config, (n, length, _) = self.config, x.shape
        group = config.num_heads // config.num_kv_heads
        query = _rotate(self.q(x).reshape(n, length, config.num_heads, -1), angles)
        key = _rotate(self.k(x).reshape(n, length, config.num_kv_heads, -1), angles)
        value = self.v(x).reshape(n, length, config.num_kv_heads, -1)
        key, value = (
            jax.lax.dynamic_update_slice(old, new.astype(old.dtype), (0, filled, 0, 0))
            for old, new in zip(slots, (key, value), strict=True)
        )
        query = query.reshape(n, length, config.num_kv_heads, group, -1) / math.sqrt(
            config.query_size or config.head_size
        )
        weights = jnp.einsum("nqkgh,nskh->nkgqs", query, key, preferred_element_type=jnp.float32)
        weights = _cap(weights, config.attention_cap)
        own = jax.lax.dynamic_slice_in_dim(positions, filled, length, axis=1)[:, :, None]
        seen = (positions[:, None] >= 0) & (positions[:, None] <= own)
        if self.window is not None:
            seen &= own - positions[:, None] < self.window
        # finite, so that padding, which sees nothing, gets no NaN
        weights = jnp.where(seen[:, None, None], weights, -1e30)
        weights = jax.nn.softmax(weights, axis=-1).astype(value.dtype)
        result = jnp.einsum("nkgqs,nskh->nqkgh", weights, value)
        return self.o(result.reshape(n, length, -1)), (key, value)


class FeedForward(nnx.Module):
    """down(activation(gate(x)) · up(x))."""

    def __init__(self, config: DecoderConfig, dtype: DTypeLike | None, rngs: nnx.Rngs):
        self.gate = _linear(config.size, config.hidden_size, config.mlp_bias, dtype, rngs)
        self.up = _linear(config.size, config.hidden_size, config.mlp_bias, dtype, rngs)
        self.down = _linear(config.hidden_size, config.size, config.mlp_bias, dtype, rngs)
        self.activation = {"silu": jax.nn.silu, "gelu": jax.nn.gelu}[config.activation]

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(self.activation(self.gate(x)) * self.up(x))


class Layer(nnx.Module):
    """Attention and feed-forward, each behind a norm and beside a shortcut."""

    def __init__(self, config: DecoderConfig, index: int, dtype: DTypeLike | None, rngs: nnx.Rngs):
        window = config.window if index % 2 == 0 else None
        self.attention_norm, self.mlp_norm = RMSNorm(config.size, config), RMSNorm(config.size, config)
        self.attention = Attention(config, window, dtype, rngs)
        self.mlp = FeedForward(config, dtype, rngs)
        if config.post_norms:
            self.attention_post_norm, self.mlp_post_norm = RMSNorm(config.size, config), RMSNorm(config.size, config)
        self.post_norms = config.post_norms

    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array,
        angles: jax.Array,
        slots: tuple[jax.Array, jax.Array],
        filled: jax.Array | int,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """As `Attention`."""
        new, slots = self.attention(self.attention_norm(x), positions, angles, slots, filled)
        x = x + (self.attention_post_norm(new) if self.post_norms else new)
        new = self.mlp(self.mlp_norm(x))
        return x + (self.mlp_post_norm(new) if self.post_norms else new), slots


class Decoder(nnx.Module):
    """A causal language model: tokens and their positions -> logits of the tokens that follow."""

    def __init__(self, config: DecoderConfig, *, dtype: DTypeLike | None = None, rngs: nnx.Rngs):
        """`dtype`: of parameters and computation, float32 or bfloat16; norms, softmax and logits are float32."""
        dtype = dtype or jnp.float32
        self.embedding = nnx.Embed(
            config.vocab_size, config.size, dtype=dtype, param_dtype=dtype, embedding_init=_INIT, rngs=rngs
        )
        self.layers = nnx.List([Layer(config, index, dtype, rngs) for index in range(config.num_layers)])
        self.norm = RMSNorm(config.size, config)
        self.head = None if config.tied else _linear(config.size, config.vocab_size, False, dtype, rngs)
        self.config, self.dtype = config, dtype

    def __call__(self, tokens: jax.Array, positions: jax.Array, *, last: int | None = None) -> jax.Array:
        """Float32 logits `[n, last, vocab_size]` behind the last tokens, or behind all where `last` is None.

        Args:
          tokens: int32 `[n, length]`; positions: int32 `[n, length]`, -1 for padding, on whichever side.
        """
        hidden, _ = self.hidden(tokens, positions, self.empty_cache(len(tokens), tokens.shape[1]))
        return self.logits(hidden if last is None else hidden[:, -last:])

    def stages(self) -> list[tuple[Any, Callable[[Any, Pair, Pair], Any]]]:
        """What a call does, in parts: modules and a function (modules, x, positions) -> x, equal for layers alike.

        x and positions are pairs: of the tokens that all sequences begin with, `[1, shared, ...]`, which may be none,
        and of the rest of each, `[n, length, ...]`. The first x are tokens; the last part returns the rest's logits.
        """
        out = self.embedding if self.head is None else self.head
        layers = [(layer, _pass_layer) for layer in self.layers]
        return [(self.embedding, _Embed(self.config)), *layers, ((self.norm, out), _Logits(self.config))]

    def empty_cache(self, n: int, slots: int) -> Cache:
        """Room for `slots` tokens of `n` sequences."""
        room = [_room(self.config, n, slots, self.dtype)] * self.config.num_layers
        return Cache(room, room, jnp.full((n, slots), -1, jnp.int32), 0)

    def hidden(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        cache: Cache,
        watch: Callable[[int, jax.Array], None] = lambda index, state: None,
    ) -> tuple[jax.Array, Cache]:
        """States `[n, length, size]` after the last norm, and the cache with these tokens in it.

        `watch` is told the index of every layer and the state behind it.
        """
        x, length = _embed(self.config, self.embedding, tokens), tokens.shape[1]
        angles = _angles(self.config, positions)
        all_positions = jax.lax.dynamic_update_slice(cache.positions, positions, (0, cache.filled))
        slots = list(zip(cache.keys, cache.values, strict=True))
        for index, layer in enumerate(self.layers):
            x, slots[index] = layer(x, all_positions, angles, slots[index], cache.filled)
            watch(index, x)
        keys, values = ([slot[i] for slot in slots] for i in range(2))
        return self.norm(x), Cache(keys, values, all_positions, cache.filled + length)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Float32 `[n, length, vocab_size]`."""
        return _logits(self.config, self.embedding if self.head is None else self.head, hidden)


@dataclasses.dataclass(frozen=True)
class _Embed:
    """The stage of embeddings."""

    config: DecoderConfig

    def __call__(self, embedding: nnx.Embed, tokens: Pair, positions: Pair) -> Pair:
        del positions
        shared, rest = (_embed(self.config, embedding, part) for part in tokens)
        return shared, rest


def _embed(config: DecoderConfig, embedding: nnx.Embed, tokens: jax.Array) -> jax.Array:
    x = embedding(tokens)
    # rounded as the models were trained with
    return x * jnp.asarray(math.sqrt(config.size), x.dtype) if config.unit_offset else x


def _pass_layer(layer: Layer, x: Pair, positions: Pair) -> Pair:
    """One layer on what all sequences begin with, once, and on the rest of each, which sees it."""
    config, (shared, rest), (before, own) = layer.attention.config, x, positions
    n, filled = len(rest), shared.shape[1]
    keys = values = _room(config, 1, filled, rest.dtype)
    if filled:
        shared, (keys, values) = layer(shared, before, _angles(config, before), (keys, values), 0)
    room = _room(config, n, rest.shape[1], rest.dtype)
    keys, values, before = (
        jnp.concatenate([jnp.broadcast_to(part, (n, *part.shape[1:])), more], axis=1)
        for part, more in zip((keys, values, before), (room, room, own), strict=True)
    )
    rest, _ = layer(rest, before, _angles(config, own), (keys, values), filled)
    return shared, rest


@dataclasses.dataclass(frozen=True)
class _Logits:
    """The stage of the last norm and the logits, float32."""

    config: DecoderConfig

    def __call__(self, modules: tuple[RMSNorm, Any], x: Pair, positions: Pair) -> jax.Array:
        del positions
        norm, out = modules
        return _logits(self.config, out, norm(x[1]))


def _logits(config: DecoderConfig, out: nnx.Embed | nnx.Linear, hidden: jax.Array) -> jax.Array:
    logits = out.attend(hidden) if isinstance(out, nnx.Embed) else out(hidden)
    return _cap(logits.astype(jnp.float32), config.logit_cap)


def _room(config: DecoderConfig, n: int, slots: int, dtype: DTypeLike | None) -> jax.Array:
    return jnp.zeros((n, slots, config.num_kv_heads, config.head_size), dtype)


def _linear(features: int, out: int, bias: bool, dtype: DTypeLike | None, rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(
        features, out, use_bias=bias, dtype=dtype, param_dtype=dtype or jnp.float32, kernel_init=_INIT, rngs=rngs
    )


def _cap(x: jax.Array, cap: float | None) -> jax.Array:
    return x if cap is None else cap * jnp.tanh(x / cap)


def _angles(config: DecoderConfig, positions: jax.Array) -> jax.Array:
    """Float32 `[n, length, head_size / 2]`, in radians (RoPE, arXiv 2104.09864)."""
    half = config.head_size // 2
    frequencies = config.rope_base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if config.rope_divisors is not None:
        frequencies = frequencies / jnp.asarray(config.rope_divisors)
    return jnp.maximum(positions, 0)[..., None] * frequencies[None, None]


def _rotate(x: jax.Array, angles: jax.Array) -> jax.Array:
    """`[n, length, heads, head_size]`, its first half paired with its second, turned by the angles."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
