r"""How near the sweep comes to the device's matrix rate.

    python -m experiments.bench_roofline --model=preact_resnet18 --dtype=bfloat16

The achieved FLOP/s of a sweep, by XLA's count of one forward pass, over those of a large bfloat16 matrix product
(float32 on a CPU, which has no bfloat16 units), timed in turns in the same run; medians of --repeats, compile time
apart. Writes a profiler trace to <workdir>/trace and names its five largest costs. Prints JSON as the last line.
"""

from __future__ import annotations

import collections
import json
import statistics
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags

from experiments import bench, common
from madjax.sweep import loss_matrix

flags.DEFINE_string("workdir", "runs/roofline", "Folder for the trace.")
flags.DEFINE_integer("matrix_size", None, "Rows of the matrices; 8192, on a CPU 2048, where not given.", lower_bound=8)
bench.define_problem_size("preact_resnet18", "bfloat16", num_examples=12_000, num_draws=16, batch_size=1024)
common.define_layout()

# in a row, so that the device need not wait for the host
_PRODUCTS = 8


def main() -> None:
    """Times sweep and matrix product in turns, then records one sweep."""
    values = flags.FLAGS
    is_cpu = jax.devices()[0].platform == "cpu"
    size = values.matrix_size or (2048 if is_cpu else 8192)
    # of chance, since a chip may multiply ones faster
    matrix = jax.random.normal(jax.random.key(0), (size, size), jnp.float32 if is_cpu else jnp.bfloat16)
    multiply = jax.jit(jnp.matmul)
    loss_fn, params, draws, examples = bench.random_problem(
        values.model, values.num_examples, values.num_draws, values.dtype
    )
    examples = jax.device_put(examples)

    def sweep() -> None:
        loss_matrix(loss_fn, draws, examples, layout=values.layout, batch_size=values.batch_size)

    def product() -> None:
        jax.block_until_ready([multiply(matrix, matrix) for _ in range(_PRODUCTS)])

    # of the program as it was written, since libraries that a compiled one calls count as nothing; by the CPU's
    # backend, since a GPU's does not count
    batch = jax.tree.map(lambda leaf: leaf[: values.batch_size], examples)
    num_rows = min(values.batch_size, values.num_examples)
    at_host = jax.device_put((params, batch), jax.devices("cpu")[0])
    pass_flops = jax.jit(loss_fn).lower(*at_host).cost_analysis()["flops"] / num_rows  # pyright: ignore
    flops = {"sweep": pass_flops * values.num_examples * values.num_draws, "matrix_product": _PRODUCTS * 2.0 * size**3}
    runs = {"sweep": sweep, "matrix_product": product}
    bench.time_in_turns(runs, 1)  # compiles
    seconds = bench.time_in_turns(runs, values.repeats)
    rates = {name: flops[name] / statistics.median(times) for name, times in seconds.items()}
    print(
        json.dumps(
            {
                "device": common.device(),
                **{name: values[name].value for name in ("model", "dtype", "num_examples", "num_draws", "batch_size")},
                "layout": values.layout,
                "matrix": [str(matrix.dtype), size],
                "seconds": {name: statistics.median(times) for name, times in seconds.items()},
                "flops_per_second": rates,
                "share_of_matrix_product": rates["sweep"] / rates["matrix_product"],
                "peak_memory_mib": bench.peak_memory() / 2**20,
                "largest_costs_seconds": _largest_costs(sweep, Path(values.workdir) / "trace"),
            }
        )
    )


def _largest_costs(run: Any, folder: Path, count: int = 5) -> dict[str, float]:
    """Seconds by operation of one run, from the trace that it leaves in `folder`."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # it would fill the trace
    with jax.profiler.trace(folder, profiler_options=options):
        run()
    newest = max(folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    planes = list(jax.profiler.ProfileData.from_file(str(newest)).planes)
    planes = [plane for plane in planes if plane.name.startswith("/device:")] or planes
    costs: collections.Counter[str] = collections.Counter()
    for plane in planes:
        lines = [line for line in plane.lines if line.name != "python"]  # what the host does
        # a GPU's kernels; its other lines tell the same by module or operation
        for line in [line for line in lines if line.name.startswith("Stream")] or lines:
            for event in line.events:
                if not event.name.startswith(("ThunkExecutor", "end: ", "while")):  # sums of others
                    costs[event.name] += event.duration_ns / 1e9
    return dict(costs.most_common(count))


if __name__ == "__main__":
    common.run(main)
