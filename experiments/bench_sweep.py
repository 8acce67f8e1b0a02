r"""Speed of the sweep: draws and example-losses a second for every layout of the draws on this device.

    python -m experiments.bench_sweep

Under two minutes on 2 CPU cores. The layouts take turns, so that a machine whose speed drifts slows all alike; the
medians are of --repeats turns, compile time apart. Prints a table, and JSON as the last line.
"""

from __future__ import annotations

import json
import statistics
import time

from absl import flags

from experiments import common
from madjax.models import MODELS
from madjax.sweep import loss_matrix

flags.DEFINE_string("model", "digits_cnn", f"{', '.join(MODELS)} or wrn<d>_<k>; weights do not matter to the time.")
flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of the model's computation.")
flags.DEFINE_integer("num_examples", 1024, "Examples.", lower_bound=1)
flags.DEFINE_integer("num_draws", 32, "Draws of one turn.", lower_bound=1)
flags.DEFINE_integer("batch_size", 256, "Examples of one forward pass.", lower_bound=1)
flags.DEFINE_integer("repeats", 5, "Turns of each layout.", lower_bound=1)
flags.DEFINE_list("layouts", ["host", "scan8", "vmap2", "vmap4", "vmap8"], "Layouts beside auto.")


def main() -> None:
    """Times all layouts."""
    values = flags.FLAGS
    loss_fn, _, draws, examples = common.random_problem(
        values.model, values.num_examples, values.num_draws, values.dtype
    )

    def sweep(layout: str) -> float:
        start = time.perf_counter()
        loss_matrix(loss_fn, draws, examples, layout=layout, batch_size=values.batch_size)
        return time.perf_counter() - start

    layouts = [*values.layouts, "auto"]
    first = {layout: sweep(layout) for layout in layouts}
    seconds: dict[str, list[float]] = {layout: [] for layout in layouts}
    for _ in range(values.repeats):
        for layout in layouts:
            seconds[layout].append(sweep(layout))
    medians = {layout: statistics.median(times) for layout, times in seconds.items()}
    print(f"{'layout':<8} {'compile s':>9} {'draws/s':>9} {'losses/s':>10}")
    results = {}
    for layout, median in medians.items():
        results[layout] = {
            # of auto: also the timing of its candidates, all but compiled by then
            "compile_seconds": first[layout] - median,
            "draws_per_second": values.num_draws / median,
            "losses_per_second": values.num_draws * values.num_examples / median,
        }
        compile_s, draws_s, losses_s = results[layout].values()
        print(f"{layout:<8} {compile_s:>9.2f} {draws_s:>9.1f} {losses_s:>10.0f}")
    best = min(medians[layout] for layout in values.layouts)
    print(
        json.dumps(
            {
                "device": common.device(),
                "model": values.model,
                "dtype": values.dtype,
                "num_draws": values.num_draws,
                "num_examples": values.num_examples,
                "layouts": results,
                "auto_over_best": medians["auto"] / best,
                "peak_memory_mib": common.peak_memory() / 2**20,
            }
        )
    )


if __name__ == "__main__":
    common.run(main)
