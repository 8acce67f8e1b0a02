r"""One sweep on 1, 2, 4 and 8 forced CPU devices: is the matrix the same, and what does each device do?

    python -m experiments.bench_devices --model=digits_cnn

Each count runs in a process of its own. Forced devices share the cores, so times tell the overhead of splitting, not a
speed-up. FLOPs are XLA's count of the compiled program, which is one device's part. Prints a table, and JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from absl import flags

from experiments import bench, common
from madjax import loss_matrix, sweep
from madjax.models import MODELS
from madjax.sharding import place, put_examples, put_model

_COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter")

flags.DEFINE_string("model", "digits_cnn", f"{', '.join(MODELS)} or wrn<d>_<k>; weights do not matter.")
flags.DEFINE_list("num_devices", ["1", "2", "4", "8"], "Numbers of devices.")
flags.DEFINE_integer("num_examples", 1024, "Examples.", lower_bound=8)
flags.DEFINE_integer("num_draws", 16, "Draws.", lower_bound=1)
flags.DEFINE_integer("model_shards", 1, "Devices that the parameters are split over, where there are so many.")
flags.DEFINE_string("child", None, "Used by the benchmark itself: where a child puts its matrix.")


def main() -> None:
    """Runs a child for each number of devices, or is one."""
    values = flags.FLAGS
    if values.child:
        _measure(Path(values.child))
        return
    rows, matrices = [], []
    with tempfile.TemporaryDirectory() as folder:
        for count in map(int, values.num_devices):
            path = Path(folder) / f"{count}.npy"
            names = ("model", "num_examples", "num_draws", "model_shards")
            command = [sys.executable, "-m", "experiments.bench_devices", f"--child={path}", f"--num_devices={count}"]
            command += [f"--{name}={values[name].value}" for name in names]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            matrices.append(np.load(path))
    for row, matrix in zip(rows, matrices, strict=True):
        row["largest_difference"] = float(np.abs(matrix - matrices[0]).max())
    print(f"{'devices':>7} {'MFLOP/device':>13} {'HLO lines':>10} {'compile s':>9} {'sweep s':>8} {'difference':>11}")
    for row in rows:
        print(
            f"{row['num_devices']:>7} {row['flops_per_device'] / 1e6:>13.1f} {row['hlo_lines']:>10} "
            f"{row['compile_seconds']:>9.2f} {row['sweep_seconds']:>8.2f} {row['largest_difference']:>11.1e}"
        )
    print(json.dumps({"device": common.device(), "model": values.model, "rows": rows}))


def _measure(path: Path) -> None:
    values = flags.FLAGS
    (count,) = map(int, values.num_devices)
    jax.config.update("jax_num_cpu_devices", count)
    shards = values.model_shards if count % values.model_shards == 0 else 1
    loss_fn, _, draws, examples = bench.random_problem(values.model, values.num_examples, values.num_draws)
    # the program of one draw, a batch a device so that no loop hides work from XLA's count
    placement = place(values.num_examples, model_shards=shards)
    batch_size = values.num_examples // placement.parts("examples")
    placed, there = put_model(draws, placement), put_examples(examples, placement)
    start = time.perf_counter()
    item = np.zeros(placement.parts("draws"), np.int32)
    program = sweep._block.lower(loss_fn, "host", batch_size, placement, placed, item, there).compile()
    compile_seconds = time.perf_counter() - start
    text = program.as_text() or ""
    settings = {"layout": "host", "batch_size": batch_size, "model_shards": shards}
    np.save(path, loss_matrix(loss_fn, draws, examples, **settings))
    start = time.perf_counter()
    loss_matrix(loss_fn, draws, examples, **settings)
    row = {
        "num_devices": count,
        "model_shards": shards,
        "flops_per_device": program.cost_analysis()["flops"],  # pyright: ignore
        "hlo_lines": len(text.splitlines()),
        "collectives": sum(text.count(f" {name}(") for name in _COLLECTIVES),
        "compile_seconds": compile_seconds,
        "sweep_seconds": time.perf_counter() - start,
    }
    print(json.dumps(row))


if __name__ == "__main__":
    common.run(main)
