r"""Trains one model with a backdoor, and says what it does.

    python -m experiments.train_backdoor --dataset=cifar10 --data_dir=DATA --attack=wanet --model=preact_resnet18

BackdoorBench's recipe unless flags say otherwise. Resumes after the last whole epoch when started again with the same
--workdir. Writes config.json, results.json (accuracy, attack success rate, seconds in all), gallery.png (clean,
triggered, and their difference) and model/, which `experiments.backdoor --checkpoint=WORKDIR/model` reads.
"""

from __future__ import annotations

import time

import numpy as np
from absl import flags

from experiments import cases, common
from madjax import report
from madjax.attacks import ATTACKS

common.define_training_flags()
flags.DEFINE_enum("attack", "badnet", [*ATTACKS, "clean"], "Attack; clean trains without one.")
flags.DEFINE_integer("seed", 0, "Seed of the attack, the split and the training.", lower_bound=0)
flags.DEFINE_string("workdir", "runs/train_backdoor", "Folder for results.")


def main() -> None:
    """Trains, or reads what is trained, and measures."""
    values = flags.FLAGS
    workdir, config = common.open_workdir(values.workdir, [*common.TRAINING_FLAGS, "attack", "seed"])
    start = time.perf_counter()
    case = cases.train_case(values.attack, values.seed, common.recipe_from_flags(), workdir / "model")
    seconds = time.perf_counter() - start
    everything = np.arange(len(case.pool.labels))
    counted = cases.count_examples(case, everything[:0], everything)
    result = {
        "attack": values.attack,
        "seed": values.seed,
        "acc": counted.accuracy,
        "asr": counted.asr,
        "num_test": len(everything),
        "seconds": seconds,
    }
    report.write_json(workdir / "results.json", {"config": config, "device": common.device(), "rows": [result]})
    if case.triggered is not None:
        shown, sources = case.triggered(everything[:8])
        report.plot_gallery(workdir / "gallery.png", case.pool.images[sources], shown, values.attack)
    print(
        " ".join(
            f"{key} {value:.3f}" if isinstance(value, float) else f"{key} {value}" for key, value in result.items()
        )
    )
    print(f"results in {workdir}")


if __name__ == "__main__":
    common.run(main)
