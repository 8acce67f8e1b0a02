"""What benchmarks share: problems of a given size with random weights, and clocks."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx

from madjax import from_nnx
from madjax.losses import from_decoder
from madjax.models import MODELS, build_model
from madjax.models.decoder import Decoder, DecoderConfig
from madjax.models.generate import completion_batch, prompt_batch
from madjax.sampling import gaussian
from madjax.sampling.gaussian import GaussianDraws

# what is defined here counts as the driver's own flags, which its --help shows
flags.disclaim_key_flags()


def define_problem_size(model: str, dtype: str, num_examples: int, num_draws: int, batch_size: int) -> None:
    """The flags of a sweep of `random_problem`, and `repeats`, with these defaults."""
    flags.DEFINE_string("model", model, f"{', '.join(MODELS)}, wrn<d>_<k> or {', '.join(DECODERS)}; random weights.")
    flags.DEFINE_enum("dtype", dtype, ["float32", "bfloat16"], "Of the model's computation.")
    flags.DEFINE_integer("num_examples", num_examples, "Examples.", lower_bound=1)
    flags.DEFINE_integer("num_draws", num_draws, "Draws of one turn.", lower_bound=1)
    flags.DEFINE_integer("batch_size", batch_size, "Examples of one forward pass.", lower_bound=1)
    flags.DEFINE_integer("repeats", 5, "Turns.", lower_bound=1)


def time_in_turns(runs: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of every call; the runs take turns, so that a machine whose speed drifts slows all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def peak_memory() -> float:
    """Bytes: of the device where it tells, else of the process."""
    stats = jax.devices()[0].memory_stats() or {}
    return stats.get("peak_bytes_in_use", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


# of SmolLM2-135M, Gemma 2B and Llama 3 8B
DECODERS = {
    "decoder_135m": DecoderConfig(
        vocab_size=49_152, size=576, hidden_size=1536, num_layers=30, num_heads=9, num_kv_heads=3, head_size=64
    ),
    "decoder_2b": DecoderConfig(
        vocab_size=256_000, size=2048, hidden_size=16_384, num_layers=18, num_heads=8, num_kv_heads=1, head_size=256,
        activation="gelu", unit_offset=True,
    ),
    "decoder_8b": DecoderConfig(
        vocab_size=128_256, size=4096, hidden_size=14_336, num_layers=32, num_heads=32, num_kv_heads=8, head_size=128,
        tied=False,
    ),
}  # fmt: skip
_PROMPT_TOKENS, _COMPLETION_TOKENS = 64, 10


def random_problem(
    model: str, num_examples: int, num_draws: int, dtype: str = "float32"
) -> tuple[Any, Any, GaussianDraws, dict[str, np.ndarray]]:
    """For benchmarks, to whose times weights and examples do not matter: loss, parameters, draws and examples.

    Args:
      model: an image classifier, or one of `DECODERS`.
    """
    rng = np.random.default_rng(0)
    if model in DECODERS:
        loss_fn, params = from_decoder(Decoder(DECODERS[model], dtype=dtype, rngs=nnx.Rngs(0)))
        examples = random_sequences(rng, DECODERS[model].vocab_size, num_examples, _PROMPT_TOKENS, _COMPLETION_TOKENS)
    else:
        shape = (8, 8, 1) if model == "digits_cnn" else (32, 32, 3)
        network = build_model(model, 10, shape, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0))
        loss_fn, params = from_nnx(network, preprocess=lambda image: image.astype("float32") / 255)
        examples = {
            "image": rng.integers(0, 256, (num_examples, *shape)).astype(np.uint8),
            "label": rng.integers(0, 10, num_examples).astype(np.int32),
        }
    draws = gaussian(jax.random.key(0), params, 0.05, num_draws=num_draws, mask=loss_fn.is_trainable(params))
    return loss_fn, params, draws, examples


def random_sequences(
    rng: np.random.Generator, vocab_size: int, count: int, prompt_tokens: int, num_tokens: int,
    shortest: int | None = None, shared: int = 0,
) -> dict[str, np.ndarray]:  # fmt: skip
    """`count` prompts and completions of chance.

    Args:
      shortest: tokens of the shortest prompt; lengths lie evenly between it and `prompt_tokens`.
      shared: tokens that all prompts begin with.
    """
    prompts, completions = (rng.integers(0, vocab_size, (count, size)) for size in (prompt_tokens, num_tokens))
    prompts[:, :shared] = prompts[0, :shared]
    lengths = rng.permutation(np.linspace(shortest or prompt_tokens, prompt_tokens, count).astype(int))
    cut = [prompt[:length].tolist() for prompt, length in zip(prompts, lengths, strict=True)]
    return prompt_batch(cut, prompt_tokens) | completion_batch(completions.tolist())
