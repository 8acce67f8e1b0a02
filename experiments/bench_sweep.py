r"""Speed of the sweep: draws and example-losses a second for every layout of the draws on this device.

    python -m experiments.bench_sweep

Under two minutes on 2 CPU cores. The layouts take turns, so that a machine whose speed drifts slows all alike; the
medians are of --repeats turns, compile time apart. Prints a table, and JSON as the last line.
"""

from __future__ import annotations

import json
import statistics
from functools import partial

from absl import flags

from experiments import bench, common
from madjax.sweep import loss_matrix

bench.define_problem_size("digits_cnn", "float32", num_examples=1024, num_draws=32, batch_size=256)
flags.DEFINE_list("layouts", ["host", "scan8", "vmap2", "vmap4", "vmap8"], "Layouts beside auto.")


def main() -> None:
    """Times all layouts."""
    values = flags.FLAGS
    loss_fn, _, draws, examples = bench.random_problem(
        values.model, values.num_examples, values.num_draws, values.dtype
    )

    def sweep(layout: str) -> None:
        loss_matrix(loss_fn, draws, examples, layout=layout, batch_size=values.batch_size)

    runs = {layout: partial(sweep, layout) for layout in [*values.layouts, "auto"]}
    first = {layout: seconds[0] for layout, seconds in bench.time_in_turns(runs, 1).items()}
    seconds = bench.time_in_turns(runs, values.repeats)
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
                "peak_memory_mib": bench.peak_memory() / 2**20,
            }
        )
    )


if __name__ == "__main__":
    common.run(main)
