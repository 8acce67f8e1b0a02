r"""Speed and memory of a language model's sweep on this device.

    python -m experiments.bench_language --model=tiny
    python -m experiments.bench_language --model=smollm2 --num_sequences=32 --num_draws=2

Prints one JSON object: sequences a second (losses of one draw and one sequence; median over turns, compilation apart),
bytes of the weights, and bytes that the compiled program of one draw takes beside them, as XLA plans it.
"""

from __future__ import annotations

import json
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments import common
from experiments.language_models import LanguageRecipe, read_model
from madjax import loss_matrix
from madjax.losses import from_decoder
from madjax.sampling import drawn_parameters, gaussian

flags.DEFINE_string("model", "tiny", "tiny, smollm2, a Hugging Face folder or a GGUF file; weights as they are.")
flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of weights and computation.")
flags.DEFINE_string("parameters", None, "Regular expression of the parameters' paths to draw; all where not given.")
flags.DEFINE_integer("num_sequences", 64, "Sequences.", lower_bound=1)
flags.DEFINE_integer("prompt_tokens", 64, "Tokens of a prompt.", lower_bound=1)
flags.DEFINE_integer("num_tokens", 10, "Tokens of a completion.", lower_bound=1)
flags.DEFINE_integer("num_draws", 4, "Draws of one turn.", lower_bound=1)
flags.DEFINE_integer("batch_size", 32, "Sequences of one forward pass.", lower_bound=1)
flags.DEFINE_integer("repeats", 5, "Turns.", lower_bound=1)


def main() -> None:
    """Measures and prints."""
    values = flags.FLAGS
    model, _ = read_model(LanguageRecipe(model=values.model, dtype=values.dtype), 0)
    loss_fn, params = from_decoder(model)
    examples = common.random_sequences(
        np.random.default_rng(0), model.config.vocab_size, values.num_sequences, values.prompt_tokens, values.num_tokens
    )
    mask = drawn_parameters(params, values.parameters)
    draws = gaussian(jax.random.key(0), params, 1e-3, num_draws=values.num_draws, mask=mask)

    start = time.perf_counter()
    sweep = {"sweep": lambda: loss_matrix(loss_fn, draws, examples, layout="host", batch_size=values.batch_size)}
    sweep["sweep"]()
    first = time.perf_counter() - start
    seconds = statistics.median(common.time_in_turns(sweep, values.repeats)["sweep"])

    batch = jax.tree.map(lambda leaf: jnp.asarray(leaf[: values.batch_size]), examples)
    one_draw = jax.jit(lambda draws, item, batch: loss_fn(draws.params(item), batch))
    planned = one_draw.lower(draws, draws.any_item(), batch).compile().memory_analysis()
    leaves = jax.tree.leaves(params)
    row = {
        "device": common.device(),
        "model": values.model,
        "dtype": values.dtype,
        "num_parameters": sum(leaf.size for leaf in leaves),
        "num_drawn": sum(leaf.size for leaf, drawn in zip(leaves, jax.tree.leaves(mask), strict=True) if drawn),
        "tokens_a_sequence": values.prompt_tokens + values.num_tokens,
        "sequences_a_second": values.num_sequences * values.num_draws / seconds,
        "seconds_a_draw": seconds / values.num_draws,
        "compile_seconds": max(0.0, first - seconds),
        "weight_bytes": sum(leaf.size * leaf.dtype.itemsize for leaf in leaves),
        "program_bytes": None if planned is None else planned.temp_size_in_bytes,
        "peak_bytes": common.peak_memory(),
    }
    print(json.dumps(row))


if __name__ == "__main__":
    common.run(main)
