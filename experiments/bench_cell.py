r"""Seconds of one whole cell: a detector is fitted on trusted examples, and scores the others.

    python -m experiments.bench_cell --model=preact_resnet18 --dtype=bfloat16
    python -m experiments.bench_cell --model=preact_resnet18 --dtype=bfloat16 --preset=paper

Random weights and images, to which the time does not matter. All counts but compilation: the choice of the scale,
the steps of a chain, the sweep, couplings and calibration. Prints one JSON object as its last line.
"""

from __future__ import annotations

import json
import time
from typing import Any

import jax
import numpy as np
from absl import flags

from experiments import bench, common, detection
from madjax.types import num_examples

flags.DEFINE_string("model", "preact_resnet18", "Classifier of 32×32 colour images.")
flags.DEFINE_enum("dtype", "bfloat16", ["float32", "bfloat16"], "Of the model's computation.")
flags.DEFINE_enum("preset", "default", ["default", "paper"], "Settings: of the flags, or of the paper.")
flags.DEFINE_integer("num_examples", 12_000, "Examples: a third trusted, the others scored.", lower_bound=6)
detection.define_flags()


def main() -> None:
    """Runs the cell once to compile, a chain for few draws, and once for the clock."""
    values = flags.FLAGS
    settings = detection.settings_from_flags(values.preset)
    loss_fn, params, _, examples = bench.random_problem(values.model, values.num_examples, 1, values.dtype)
    params = _balanced(loss_fn, params, examples["image"][:256])
    third = values.num_examples // 3
    trusted, test = ({"image": examples["image"][part]} for part in (slice(third), slice(third, None)))
    sampling = jax.tree.map(lambda leaf: leaf[:third], examples)

    def run(num_draws: int) -> tuple[float, float]:
        start = time.perf_counter()
        detector = detection.fit(
            settings._replace(num_draws=num_draws), 0, loss_fn, params, trusted, sampling, test, None
        )
        assert detector.test is not None
        swept = time.perf_counter()
        detector.score_losses(*detector.test)
        return swept - start, time.perf_counter() - start

    # the programs of a chain do not depend on how many draws it makes
    _, first = run(32 if settings.sampler in detection.CHAINS else settings.num_draws)
    fit, total = run(settings.num_draws)
    row = {
        "device": common.device(),
        **{name: values[name].value for name in ("model", "dtype", "preset", "num_examples", "batch_size", "layout")},
        "num_draws": settings.num_draws,
        "num_trusted": num_examples(trusted),
        "first_seconds": first,
        "fit_seconds": fit,
        "seconds": total,
        "peak_memory_mib": bench.peak_memory() / 2**20,
    }
    print(json.dumps(row))


def _balanced(loss_fn: Any, params: Any, images: np.ndarray) -> Any:
    """With another bias of the last layer; with random weights all images would be of one class."""
    mean = loss_fn.module.apply(params, images).mean(0)
    return jax.tree.map(lambda leaf: leaf - mean if leaf.shape == mean.shape else leaf, params)


if __name__ == "__main__":
    common.run(main)
