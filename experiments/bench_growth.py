r"""How time and memory of a sweep and of a fit grow with draws, examples, trusted examples and parameters.

    python -m experiments.bench_growth

Every point runs in a process of its own, so that its peak memory is its own: seconds are the median of --repeats sweeps
(or fits from given losses, for trusted examples) after a first that compiles, bytes what the peak rose by from before
the first. Prints a table and, as the last line, JSON with the points and the slopes of log time and log memory over the
log of the count (1: proportional; 0: no growth).
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from typing import Any

import jax
import numpy as np
from absl import flags

from experiments import bench, common
from madjax.scorer import Scorer
from madjax.sweep import loss_matrix

# what else is held fixed
_BASE = {"draws": 32, "examples": 1024, "parameters": "digits_cnn"}
_POINTS = {
    "draws": [16, 64, 256, 1024],
    "examples": [256, 1024, 4096, 16384],
    "trusted": [100, 200, 400, 800, 1600],
    "parameters": ["wrn10_1", "wrn10_2", "wrn10_4"],
}

common.define_list("grows", list(_POINTS), list(_POINTS), "What grows.")
flags.DEFINE_integer("repeats", 5, "Timed runs of a point.", lower_bound=1)
flags.DEFINE_string("point", None, f"what=value of one point, measured in this process; what: {', '.join(_POINTS)}.")
common.define_layout()


def main() -> None:
    """Measures every point, or the one that is asked for."""
    values = flags.FLAGS
    if values.point:
        what, _, value = values.point.partition("=")
        if what not in _POINTS:
            raise ValueError(f"point: wanted what=value, what one of {', '.join(_POINTS)}, got {values.point!r}")
        print(json.dumps(_measure(what, int(value) if value.isdecimal() else value)))
        return
    result: dict[str, Any] = {"device": common.device(), "layout": values.layout, "growth": {}}
    for what in values.grows:
        points = [_in_a_process(what, value) for value in _POINTS[what]]
        slopes = {name: _slope(points, name) for name in ("seconds", "bytes")}
        result["growth"][what] = {"points": points, "slopes": slopes}
        for point in points:
            print(f"{what:<11} {point['count']:>9} {point['seconds']:>8.3f} s {point['bytes'] / 2**20:>8.1f} MiB")
        print(f"{what:<11} slopes: time {slopes['seconds']:.2f}, memory {slopes['bytes']:.2f}", flush=True)
    print(json.dumps(result))


def _in_a_process(what: str, value: int | str) -> dict[str, float]:
    command = [sys.executable, "-m", "experiments.bench_growth", f"--point={what}={value}"]
    command += [f"--repeats={flags.FLAGS.repeats}", f"--layout={flags.FLAGS.layout}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"point: {what}={value} failed: {(done.stderr or done.stdout).strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def _measure(what: str, value: int | str) -> dict[str, Any]:
    problem: dict[str, Any] = {**_BASE, what: value}
    if isinstance(value, int) and what == "trusted":
        losses = np.random.default_rng(0).gamma(2.0, size=(128, value)).astype(np.float32)
        classes = np.arange(value) % 10
        count, run = value, lambda: Scorer.fit(losses, classes)
    else:
        loss_fn, params, draws, examples = bench.random_problem(
            problem["parameters"], problem["examples"], problem["draws"]
        )
        count = value if isinstance(value, int) else sum(leaf.size for leaf in jax.tree.leaves(params))
        run = lambda: loss_matrix(loss_fn, draws, examples, layout=flags.FLAGS.layout)  # noqa: E731
    before = bench.peak_memory()
    run()
    grown = bench.peak_memory() - before
    seconds = bench.time_in_turns({what: run}, flags.FLAGS.repeats)[what]
    return {"count": count, "seconds": statistics.median(seconds), "bytes": grown}


def _slope(points: list[dict[str, float]], name: str) -> float:
    count, value = (np.log([max(point[key], 1e-9) for point in points]) for key in ("count", name))
    return float(np.polyfit(count, value, 1)[0])


if __name__ == "__main__":
    common.run(main)
