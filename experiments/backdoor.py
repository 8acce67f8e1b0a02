r"""Backdoors: trains poisoned models on the spot, and tells triggered inputs from benign ones.

    python -m experiments.backdoor --dataset=digits --workdir=runs/demo

About a minute on 2 CPU cores. For every attack and seed a small CNN is trained on scikit-learn's digits with a tenth of
them poisoned, and one on clean digits; the rest is held out, and split into trusted, sampling and test. By the
reference's protocol only clean images that the model gets right and triggered images that fire are counted.

Writes config.json, metrics.jsonl (a line a cell), results.json, scores.csv (a row an example) and, under cells/,
pictures and scores of each attack and seed. A second run with the same --workdir resumes after the last whole cell.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from tqdm import tqdm

from experiments import common
from experiments.cases import cell_rng, train_digits
from madjax import Detector, report
from madjax.attacks import ATTACKS
from madjax.data import count_examples, split_by_class

flags.DEFINE_enum("dataset", "digits", ["digits"], "Data set.")
common.define_list(
    "attack", ["badnet", "blended", "sig", "clean"], [*ATTACKS, "clean"], "Attacks; clean trains without one."
)
common.define_list("seed", ["0"], [str(seed) for seed in range(1000)], "Seeds of training, splits and draws.")
flags.DEFINE_float("poison_ratio", 0.1, "Share of the training images that carry the trigger.")
flags.DEFINE_integer("target", 0, "The class that the trigger asks for.", lower_bound=0)
flags.DEFINE_integer("num_epochs", 40, "Training epochs.", lower_bound=1)
flags.DEFINE_string("workdir", "runs/backdoor", "Folder for results.")
common.define_detection_flags()

# of every class of the held-out images
_SHARES = {"trusted": 0.4, "sampling": 0.2, "test": 0.4}
_OWN_FLAGS = ["dataset", "attack", "seed", "poison_ratio", "target", "num_epochs"]


def main() -> None:
    """Runs all cells and prints the table."""
    values = flags.FLAGS
    workdir, config = common.open_workdir(values.workdir, [*_OWN_FLAGS, *common.detection_flag_names()])
    done = _finished(workdir)
    cells = [(attack, int(seed)) for seed in values.seed for attack in values.attack]
    for attack, seed in tqdm(cells, desc="cells", unit="cell"):
        if f"{attack}-{seed}" not in done:
            rows = _run_cell(attack, seed, workdir / "cells" / f"{attack}-{seed}")
            with (workdir / "metrics.jsonl").open("a") as file:
                file.write(json.dumps({"cell": f"{attack}-{seed}", "rows": rows}) + "\n")
            done[f"{attack}-{seed}"] = rows
    rows = [row for attack, seed in cells for row in done[f"{attack}-{seed}"]]
    report.write_json(workdir / "results.json", {"config": config, "rows": rows})
    _join_scores(workdir, [f"{attack}-{seed}" for attack, seed in cells])
    print(report.table([*rows, *_averages(rows)]))
    print(report.false_positives([row for row in rows if row["coupling"] == values.coupling[0]]))
    print(f"\nresults in {workdir}")


def _averages(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    by_coupling = [[row for row in rows if row["coupling"] == name] for name in flags.FLAGS.coupling]
    return [report.average_row(group) for group in by_coupling if any(row["attack"] != "clean" for row in group)]


def _run_cell(name: str, seed: int, folder: Path) -> list[dict[str, Any]]:
    values = flags.FLAGS
    case = train_digits(
        name, seed, poison_ratio=values.poison_ratio, target=values.target, num_epochs=values.num_epochs
    )
    parts = split_by_class(cell_rng(name, seed), case.labels, tuple(_SHARES.values()))
    trusted, sampling, test = parts
    counted = count_examples(case.predict, case.images, case.labels, trusted, test, case.attack, case.target)
    test_images, is_anomalous = case.images[counted.benign], np.zeros(len(counted.benign), bool)
    if case.attack is not None:
        test_images = np.concatenate([test_images, case.attack.trigger(case.images[counted.anomalous])])
        is_anomalous = np.r_[is_anomalous, np.ones(len(counted.anomalous), bool)]

    start = time.perf_counter()
    detector = Detector.fit(
        jax.random.key(seed),
        case.loss_fn,
        case.params,
        {"image": case.images[counted.trusted]},
        sampling={"image": case.images[sampling], "label": case.labels[sampling]},
        perturbation=common.perturbation_from_flags(),
        num_draws=values.num_draws,
        coupling=values.coupling[0],
        traces=values.traces,
        fpr=values.fpr,
        per_class=values.per_class,
        layout=values.layout,
        batch_size=values.batch_size,
        progress=True,
    )
    losses, classes = detector.sweep({"image": test_images}, progress=True)
    seconds = time.perf_counter() - start
    rows, named_scores = [], {}
    for coupling in values.coupling:
        scores = detector.with_coupling(coupling, values.traces).score_losses(losses, classes)
        named_scores[coupling] = scores
        rows.append(
            {
                "attack": name,
                "sampler": values.sampler,
                "coupling": coupling,
                "seed": seed,
                **report.detection_row(scores, is_anomalous, counted.accuracy, counted.asr, values.fpr),
                "num_draws": values.num_draws,
                "sample_forwards": detector.sample_forwards + losses.size,
                "sweep_seconds": seconds,
                "scale": detector.scale,
                "num_trusted": len(counted.trusted),
                "num_benign": int((~is_anomalous).sum()),
                "num_anomalous": int(is_anomalous.sum()),
            }
        )

    folder.mkdir(parents=True, exist_ok=True)
    first = named_scores[values.coupling[0]]
    title = f"{name}, seed {seed}, {values.coupling[0]}"
    kinds = np.where(is_anomalous, "triggered", "benign")
    sources = np.r_[counted.benign, counted.anomalous]
    ids = [f"{name}-{seed}/{kind}-{index}" for kind, index in zip(kinds, sources, strict=True)]
    report.write_scores(
        folder / "scores.csv", ids, first, is_anomalous, [f"digits-{index}" for index in counted.trusted]
    )
    threshold = -float(detector.threshold())
    report.plot_histogram(folder / "histogram.png", first, is_anomalous, threshold, title)
    report.plot_couplings(folder / "couplings.png", detector.scorer, losses, first, is_anomalous, title)
    report.plot_flagged(folder / "flagged.png", test_images, first, is_anomalous, title)
    if case.attack is not None:
        report.plot_roc(folder / "roc.png", named_scores, is_anomalous, f"{name}, seed {seed}")
    return rows


def _finished(workdir: Path) -> dict[str, list[dict[str, Any]]]:
    """Rows of the cells that an earlier run finished; a line cut off in the middle does not count."""
    path, done = workdir / "metrics.jsonl", {}
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            cell = json.loads(line)
        except json.JSONDecodeError:
            continue
        done[cell["cell"]] = cell["rows"]
    return done


def _join_scores(workdir: Path, names: list[str]) -> None:
    texts = [(workdir / "cells" / name / "scores.csv").read_text() for name in names]
    heads = [text.splitlines(keepends=True) for text in texts]
    (workdir / "scores.csv").write_text("".join([heads[0][0], *(line for head in heads for line in head[1:])]))


if __name__ == "__main__":
    common.run(main)
