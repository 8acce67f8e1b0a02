r"""All detectors under one protocol: AUROC and recall against forward passes per example.

    python -m experiments.bench_detectors                      # digits alone
    python -m experiments.bench_detectors --data=DATA          # and public checkpoints

Per model every detector is fitted on the same trusted examples and scores the same benign and triggered ones. Ours is
scored with the leading 8, 32 and all of its draws, too. Baselines have their published settings. A gradient counts as
three forward passes; what the choice of the scale takes counts as well. Writes metrics.jsonl (a line a detector and
model), results.json and detectors.png; a second run with the same --workdir goes on after the last line. The last lines
of output are a table of means over the models.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import matplotlib.pyplot as plt
import numpy as np
from absl import flags

from experiments import cases, common, detection
from madjax import Detector, Scores, baselines, report
from madjax.coupling import DEFAULT
from madjax.scorer import Scorer

flags.DEFINE_string("data", None, "Folder with checkpoints and data sets; digits alone where not given.")
flags.DEFINE_string("workdir", "runs/detectors", "Folder for results.")
flags.DEFINE_integer("num_draws", 128, "Draws of ours.", lower_bound=2)
flags.DEFINE_integer("num_examples", 300, "Trusted, benign and anomalous examples, so many of each.", lower_bound=20)
flags.DEFINE_integer("seed", 0, "Seed of training, splits and draws.")
common.define_list("attack", ["badnet", "blended", "sig"], list(cases.ATTACKS), "Attacks of the digits models.")
common.define_list("published", list(cases.PUBLISHED), list(cases.PUBLISHED), "Public checkpoints under --data.")
DETECTORS = [detection.FUNCTIONAL, *baselines.BASELINES]
common.define_list("detector", DETECTORS, DETECTORS, "Detectors.")
common.define_layout()

_FIGURES = ("auroc", "recall_at_1%", "realized_fpr", "tpr", "forwards_per_example", "seconds")


def main() -> None:
    """Fits and scores every detector on every model."""
    values = flags.FLAGS
    names = ["data", "num_draws", "num_examples", "seed", "attack", "published", "detector", "layout"]
    workdir, config = common.open_workdir(values.workdir, names)
    path = workdir / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {(row["model"], row["detector"]) for row in rows}
    for model, make in cases.benchmark_models(values.attack, values.seed, values.data, values.published).items():
        wanted = [name for name in values.detector if (model, name) not in done]
        for row in _rows(model, make(), wanted) if wanted else ():
            rows.append(row)
            with path.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(f"{model:<16} {_line(row)}", flush=True)
    means = _means(rows)
    report.write_json(
        workdir / "results.json", {"config": config, "device": common.device(), "rows": rows, "means": means}
    )
    _plot(workdir / "detectors.png", means)
    print(f"{'detector':<21} draws " + " ".join(f"{name:>20}" for name in _FIGURES))
    print("\n".join(map(_line, means)))


def _rows(model: str, case: cases.Case, wanted: list[str]) -> Iterator[dict[str, Any]]:
    values = flags.FLAGS
    test = cases.make_small_test_set(case, values.seed, (0.4, 0.6), values.num_examples)
    if detection.FUNCTIONAL in wanted:
        yield from _ours(model, case, test)
    for name in wanted:
        if name == detection.FUNCTIONAL:
            continue
        start = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of few examples, which is the point
            baseline = baselines.Baseline.fit(baselines.lookup(name), case.loss_fn, case.params, test.trusted)
        scores = baseline.score({"image": test.images})
        seconds = time.perf_counter() - start
        yield _row(model, name, 0, scores, test, float(baseline.statistic.forwards), seconds)


def _ours(model: str, case: cases.Case, test: cases.TestSet) -> Iterator[dict[str, Any]]:
    values = flags.FLAGS
    start = time.perf_counter()
    detector = Detector.fit(
        jax.random.key(values.seed), case.loss_fn, case.params, test.trusted, test={"image": test.images},
        num_draws=values.num_draws, layout=values.layout,
    )  # fmt: skip
    assert detector.test is not None
    losses, classes = detector.test
    seconds = time.perf_counter() - start
    trusted, count = detector.scorer.trusted, detector.scorer.trusted.shape[1] + len(test.images)
    extra = (detector.sample_forwards - trusted.size) / count
    for draws in sorted({min(n, values.num_draws) for n in (8, 32, values.num_draws)}, reverse=True):
        scorer = Scorer.fit(trusted[:draws], detector.scorer.trusted_classes, coupling=DEFAULT)
        # seconds are those of all draws; of fewer, nothing was timed
        took = seconds if draws == values.num_draws else float("nan")
        yield _row(model, detection.FUNCTIONAL, draws, scorer.score(losses[:draws], classes), test, draws + extra, took)


def _row(
    model: str, name: str, draws: int, scores: Scores, test: cases.TestSet, forwards: float, seconds: float
) -> dict[str, Any]:
    found = report.detection_row(scores, test.is_anomalous, test.counted.accuracy, test.counted.asr, 0.05)
    return {
        "model": model,
        "detector": name,
        "num_draws": draws,
        **{key: found[key] for key in ("auroc", "auroc_same_prediction", "realized_fpr", "tpr")},
        "recall_at_1%": found["recall_at_fpr"]["0.01"],
        "forwards_per_example": forwards,
        "seconds": seconds,
    }


def _line(row: dict[str, Any]) -> str:
    return f"{row['detector']:<21} {row['num_draws']:>5} " + " ".join(f"{row[name]:>20.3f}" for name in _FIGURES)


def _means(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Over the models, by detector and number of draws, the best first."""
    means = []
    for name, draws in dict.fromkeys((row["detector"], row["num_draws"]) for row in rows):
        own = [row for row in rows if (row["detector"], row["num_draws"]) == (name, draws)]
        figures = {key: float(np.mean([row[key] for row in own])) for key in _FIGURES}
        lowest = min(row["auroc"] for row in own)
        means.append({"detector": name, "num_draws": draws, **figures, "lowest_auroc": lowest, "num_models": len(own)})
    return sorted(means, key=lambda row: -row["auroc"])


def _plot(path: Path, means: list[dict[str, Any]]) -> None:
    figure, grid = plt.subplots(1, 2, figsize=(13, 6), sharex=True, layout="constrained")
    for axes, name in zip(grid, ("auroc", "recall_at_1%"), strict=True):
        ours = sorted((r for r in means if r["detector"] == detection.FUNCTIONAL), key=lambda r: r["num_draws"])
        x = [row["forwards_per_example"] for row in ours]
        axes.plot(x, [row[name] for row in ours], "-o", color="#cc3311", label="functional: 8, 32, all draws", zorder=3)
        # names of one cost stand in a column, in the order of their figures, apart from each other
        by_cost: dict[float, list[dict[str, Any]]] = {}
        for row in means:
            if row["detector"] != detection.FUNCTIONAL:
                by_cost.setdefault(row["forwards_per_example"], []).append(row)
        low, high = min(row[name] for row in means), max(row[name] for row in means)
        least, lowest = (high - low) / 38, low
        for cost, column in by_cost.items():
            height = np.inf
            for row in sorted(column, key=lambda r: -r[name]):
                height = min(height - least, row[name])
                lowest = min(lowest, height)
                axes.plot(cost, row[name], "o", color="#4477aa", markersize=5)
                axes.annotate(
                    row["detector"], (cost, row[name]), (cost * 1.12, height), fontsize=6, va="center",
                    arrowprops={"arrowstyle": "-", "linewidth": 0.3},
                )  # fmt: skip
        axes.set(xscale="log", xlabel="forward passes an example", ylim=(lowest - 2 * least, high + 2 * least))
        axes.set_ylabel({"auroc": "AUROC"}.get(name, "recall at 1 % false positives"))
        axes.grid(alpha=0.3)
    grid[0].legend(loc="center right", fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    common.run(main)
