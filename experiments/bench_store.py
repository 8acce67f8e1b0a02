r"""What keeping a sweep's losses on disk costs: sweeps with and without a store, in turns.

    python -m experiments.bench_store --model=wrn16_1 --num_examples=512

Of the same draws and examples, the program compiled before; the medians of --repeats turns. "--chains" also keeps where
the chain stands. Prints JSON: seconds of each, the overhead as a share of the sweep's time, and the seconds that the
sweep waited in the store's methods, which do not drown in the scatter of a busy machine.
"""

from __future__ import annotations

import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from absl import flags

from experiments import bench, common
from madjax import Langevin, loss_matrix
from madjax.models import MODELS
from madjax.store import TraceStore

flags.DEFINE_string("model", "digits_cnn", f"{', '.join(MODELS)} or wrn<d>_<k>; weights do not matter to the time.")
flags.DEFINE_integer("num_examples", 1024, "Examples.", lower_bound=1)
flags.DEFINE_integer("num_draws", 64, "Draws of one turn.", lower_bound=1)
flags.DEFINE_integer("repeats", 5, "Turns of each.", lower_bound=1)
flags.DEFINE_bool("chains", False, "A chain of the paper's kernel instead of independent draws.")
flags.DEFINE_string("layout", "host", "Layout of the sweep.")
flags.DEFINE_string("folder", None, "Folder for the store; a temporary one where not given.")


def main() -> None:
    """Times both in turns."""
    values = flags.FLAGS
    loss_fn, params, draws, examples = bench.random_problem(values.model, values.num_examples, values.num_draws)
    if values.chains:
        chain = Langevin(num_burnin_steps=0)
        draws = chain.perturb(jax.random.key(0), loss_fn, params, examples, examples, values.num_draws).draws
    folder = Path(values.folder or tempfile.mkdtemp())

    waited: list[float] = []

    def timed(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            start = time.perf_counter()
            result = method(*args)
            waited[-1] += time.perf_counter() - start
            return result

        return call

    def sweep(kept: bool) -> float:
        # a finished store would only be read
        shutil.rmtree(folder, ignore_errors=True)
        start, store = time.perf_counter(), None
        if kept:
            store = TraceStore(folder, {}, {"test": values.num_examples})
            waited.append(time.perf_counter() - start)
            for name in ("create", "whole", "state", "write"):
                setattr(store, name, timed(getattr(store, name)))
        loss_matrix(loss_fn, draws, examples, layout=values.layout, store=store)
        return time.perf_counter() - start

    seconds: dict[bool, list[float]] = {False: [], True: []}
    for kept in (True, False):
        sweep(kept)  # compiles
    waited.clear()
    for turn in range(values.repeats):
        for kept in (turn % 2 == 0, turn % 2 == 1):
            seconds[kept].append(sweep(kept))
    shutil.rmtree(folder, ignore_errors=True)
    without, kept = (statistics.median(seconds[kept]) for kept in (False, True))
    result = {
        "device": common.device(),
        **{name: values[name].value for name in ("model", "num_examples", "num_draws", "chains", "layout", "repeats")},
        "seconds_without": seconds[False],
        "seconds_with": seconds[True],
        "seconds_waited": waited,
        "overhead": kept / without - 1,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    common.run(main)
