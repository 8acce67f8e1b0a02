r"""Speed and memory of a language model's sweep on this device.

    python -m experiments.bench_language --model=tiny
    python -m experiments.bench_language --model=smollm2 --num_sequences=32 --num_draws=2
    python -m experiments.bench_language --model=decoder_8b --dtype=bfloat16 --layouts=layers,gradient
    python -m experiments.bench_language --model=decoder_2b --dtype=bfloat16 --layouts=gradient --random_weights

Prints one JSON object: bytes of the weights and, for each of --layouts, sequences a second (losses of one draw and one
sequence; median over turns, which take turns, compilation apart), how many parameters are drawn, and bytes that a draw
takes beside the weights, as XLA plans it. Of the layout "gradient" they are of one gradient a sequence, which serves
all draws of a tangent.

The third is of a decoder's sizes alone: there are no weights, and nothing is timed. The last one makes some by chance;
what was run tells as well how many bytes it took at most, all layouts, weights and the programs' own included.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx

from experiments import bench, common
from experiments.language_models import LanguageRecipe, read_model
from madjax import loss_matrix
from madjax.losses import SequenceLoss, from_decoder
from madjax.models.decoder import Decoder, DecoderConfig
from madjax.sampling import GaussianDraws, Tangent, TangentDraws, backward, drawn_parameters, gaussian, layerwise
from madjax.sampling.tangent import NUM_DRAWS
from madjax.types import Batch

_SIZES = f"{', '.join(bench.DECODERS)}, without weights unless --random_weights"
flags.DEFINE_string("model", "tiny", f"tiny, smollm2, a Hugging Face folder or a GGUF file; {_SIZES}.")
flags.DEFINE_bool("random_weights", False, "Run a decoder of given sizes with weights of chance.")
flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of weights and computation.")
flags.DEFINE_string(
    "parameters",
    None,
    "Regular expression of the parameters' paths to draw; where not given all, of a gradient a tangent's.",
)
flags.DEFINE_integer("num_sequences", 64, "Sequences.", lower_bound=1)
flags.DEFINE_integer("prompt_tokens", 64, "Tokens of the longest prompt.", lower_bound=1)
flags.DEFINE_integer(
    "shortest", None, "Tokens of the shortest one, as long as the longest if not given.", lower_bound=1
)
flags.DEFINE_integer("shared", 0, "Tokens that all prompts begin with.", lower_bound=0)
flags.DEFINE_integer("num_tokens", 10, "Tokens of a completion.", lower_bound=1)
flags.DEFINE_integer("num_draws", 4, "Draws of one turn.", lower_bound=1)
flags.DEFINE_integer("batch_size", 32, "Sequences of one forward pass.", lower_bound=1)
flags.DEFINE_integer("repeats", 5, "Turns.", lower_bound=1)
_LAYOUTS = ["host", "layers", "gradient"]
common.define_list("layouts", _LAYOUTS, _LAYOUTS, "Layouts of the sweep.")


def main() -> None:
    """Measures and prints."""
    values = flags.FLAGS
    sizes = bench.DECODERS.get(values.model)
    planned_alone = sizes is not None and not values.random_weights
    if sizes is not None:
        model = nnx.eval_shape(lambda: _random(sizes)) if planned_alone else _random(sizes)
    elif values.random_weights:
        raise ValueError(f"random_weights: wanted one of {', '.join(bench.DECODERS)}, got {values.model}")
    else:
        model, _ = read_model(LanguageRecipe(model=values.model, dtype=values.dtype), 0)
    loss_fn, params = from_decoder(model)
    examples = bench.random_sequences(
        np.random.default_rng(0), model.config.vocab_size, values.num_sequences, values.prompt_tokens,
        values.num_tokens, values.shortest, values.shared,
    )  # fmt: skip
    mask = drawn_parameters(params, values.parameters)
    draws = gaussian(jax.random.key(0), params, 1e-3, num_draws=values.num_draws, mask=mask)
    perturbed = Tangent(parameters=values.parameters).perturb(draws.rng_key, loss_fn, params, {}, None, NUM_DRAWS)
    tangent = cast(TangentDraws, perturbed.draws)
    draws_of = {"host": draws, "layers": draws, "gradient": tangent}
    passes = {"host": values.num_draws, "layers": values.num_draws, "gradient": 1}

    def sweep(layout: str) -> None:
        loss_matrix(loss_fn, draws_of[layout], examples, layout=layout, batch_size=values.batch_size)

    rows: dict[str, dict[str, float]] = {layout: {} for layout in values.layouts}
    if not planned_alone:
        runs = {layout: partial(sweep, layout) for layout in values.layouts}
        first = {layout: bench.time_in_turns({layout: run}, 1)[layout][0] for layout, run in runs.items()}
        for layout, times in bench.time_in_turns(runs, values.repeats).items():
            seconds = statistics.median(times)
            rows[layout] |= {
                "sequences_a_second": values.num_sequences * passes[layout] / seconds,
                "seconds_a_draw": seconds / passes[layout],
                "compile_seconds": max(0.0, first[layout] - seconds),
            }
    peak = {} if planned_alone else {"peak_bytes": bench.peak_memory()}
    leaves = jax.tree.leaves(params)
    for layout, row in rows.items():
        drawn = tangent.drawn if layout == "gradient" else jax.tree.leaves(mask)
        row["num_drawn"] = sum(leaf.size for leaf, is_drawn in zip(leaves, drawn, strict=True) if is_drawn)
        batch_size = min(values.batch_size, values.num_sequences)
        row["bytes_beside_weights"] = _bytes(layout, loss_fn, draws_of[layout], examples, batch_size)
    result = {
        "device": common.device(),
        "model": values.model,
        "dtype": values.dtype,
        "num_parameters": sum(leaf.size for leaf in leaves),
        "tokens_a_sequence": float(examples["prompt_length"].mean()) + values.num_tokens,
        "weight_bytes": sum(leaf.size * leaf.dtype.itemsize for leaf in leaves),
        "layouts": rows,
        **peak,
    }
    print(json.dumps(result))


def _random(sizes: DecoderConfig) -> Decoder:
    return Decoder(sizes, dtype=flags.FLAGS.dtype, rngs=nnx.Rngs(0))


def _bytes(
    layout: str, loss_fn: SequenceLoss, draws: GaussianDraws | TangentDraws, examples: Batch, batch_size: int
) -> int:
    """What a draw of a batch takes beside weights and examples: of its largest stage, or of the whole program.

    Of a gradient, what a batch's takes.
    """
    if isinstance(draws, TangentDraws):
        layers = backward.layers(loss_fn, draws)
        if layers is not None:
            return _bytes_layer_by_layer(loss_fn, layers, draws, examples, batch_size)
    item = jnp.asarray(draws.any_item())
    batch = jax.tree.map(lambda leaf: leaf[:batch_size], examples)
    if isinstance(draws, TangentDraws):
        items = jnp.arange(draws.num_draws)
        return sum(_planned(jax.jit(lambda draws, batch: draws.losses(loss_fn, items, batch)), draws, batch))
    if layout == "host":
        return sum(_planned(jax.jit(lambda draws, batch: loss_fn(draws.params(item), batch)), draws, batch))
    most, state = {}, loss_fn.cut(examples, batch_size)[0][-1]  # the longest
    for part, run in layerwise.stages(loss_fn, draws) or []:
        make = jax.jit(lambda part: part.params(item))
        params = jax.eval_shape(make, part)
        if (run, part.drawn) not in most:  # layers are alike
            (making, made), (running, left) = _planned(make, part), _planned(jax.jit(run), params, state)
            most[run, part.drawn] = made + max(making, running + left)
        state = jax.eval_shape(run, params, state)
    return max(most.values())


def _bytes_layer_by_layer(
    loss_fn: SequenceLoss, layers: Sequence[backward.Layer], draws: TangentDraws, examples: Batch, batch_size: int
) -> int:
    """Random words, what all layers are given, and the most that one of them takes, forward or back."""
    words = dict(zip(np.flatnonzero(draws.drawn).tolist(), jax.eval_shape(draws.words), strict=True))
    batch = loss_fn.cut(examples, min(batch_size, backward.most_at_a_time(layers)))[0][-1]
    state, kept, most = jax.tree.map(lambda leaf: leaf[:, None], batch), 0, {}
    for run, params, drawn, numbers in layers:
        after = jax.eval_shape(partial(backward.run_forward, run), params, state)
        if (run, drawn) not in most:
            own_words, cotangents = [words[number] for number in numbers], backward.floats(after)
            back = (run, drawn, draws.draws_of_each, params, own_words, state, cotangents)
            most[run, drawn] = max(
                sum(_planned(backward.run_forward, run, params, state)),
                sum(_planned(backward.run_backward, *back)) if any(drawn) else 0,
            )
        kept += sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(after))
        state = after
    return kept + max(most.values()) + sum(4 * leaf.size for leaf in words.values())


def _planned(function: Any, *args: Any) -> tuple[int, int]:
    """Bytes that XLA plans for a compiled function's own use, and for what it returns."""
    plan = function.lower(*args).compile().memory_analysis()
    assert plan is not None
    return plan.temp_size_in_bytes, plan.output_size_in_bytes


if __name__ == "__main__":
    common.run(main)
