r"""Time to score new inputs with a fitted detector: one of them, and a thousand.

    python -m experiments.bench_detector --model=wrn16_1 --num_draws=64

Random weights and images, to which the time does not matter. The first call of each size, which compiles, is told
apart. Prints JSON: seconds of every later call, their medians, and how the time of one new input is spent.
"""

from __future__ import annotations

import json
import statistics
import time

import jax
from absl import flags

from experiments import bench, common
from madjax import Detector, Gaussian
from madjax.models import MODELS

flags.DEFINE_string("model", "wrn16_1", f"{', '.join(MODELS)} or wrn<d>_<k>; weights do not matter to the time.")
flags.DEFINE_integer("num_trusted", 300, "Trusted examples.", lower_bound=2)
flags.DEFINE_integer("num_draws", 64, "Draws of the detector.", lower_bound=2)
flags.DEFINE_list("num_inputs", ["1", "1000"], "Sizes of what is scored.")
flags.DEFINE_integer("repeats", 5, "Calls of each size after the first.", lower_bound=1)
common.define_layout()


def main() -> None:
    """Fits once and scores."""
    values = flags.FLAGS
    sizes = [int(size) for size in values.num_inputs]
    count = values.num_trusted + max(sizes)
    loss_fn, params, _, examples = bench.random_problem(values.model, count, values.num_draws)
    image = examples["image"]
    start = time.perf_counter()
    detector = Detector.fit(
        jax.random.key(0),
        loss_fn,
        params,
        {"image": image[: values.num_trusted]},
        perturbation=Gaussian(scale=0.05),
        num_draws=values.num_draws,
        layout=values.layout,
    )
    result = {
        "device": common.device(),
        **{name: values[name].value for name in ("model", "num_trusted", "num_draws", "layout")},
        "fit_seconds": time.perf_counter() - start,
        "inputs": {},
    }
    for size in sizes:
        new = {"image": image[values.num_trusted : values.num_trusted + size]}
        seconds, sweeps = [], []
        for _ in range(values.repeats + 1):
            start = time.perf_counter()
            losses, classes = detector.sweep(new)
            swept = time.perf_counter()
            detector.score_losses(losses, classes)
            seconds.append(time.perf_counter() - start)
            sweeps.append(swept - start)
        result["inputs"][size] = {
            "first_seconds": seconds[0],
            "seconds": seconds[1:],
            "median_seconds": statistics.median(seconds[1:]),
            "median_sweep_seconds": statistics.median(sweeps[1:]),
        }
        print(f"{size:>6} inputs: first {seconds[0]:.2f} s, then {statistics.median(seconds[1:]):.3f} s", flush=True)
    print(json.dumps(result))


if __name__ == "__main__":
    common.run(main)
