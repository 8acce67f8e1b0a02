r"""How the perturbation, the traces and the coupling decide detection: AUROC over noise × retained share × coupling.

    python -m experiments.bench_scale --workdir=runs/scale                        # digits alone
    python -m experiments.bench_scale --data=DATA --workdir=runs/scale            # and public checkpoints

Trains digits backdoors on the spot and reads the checkpoints under --data, if given. Writes results.json and scale.png.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import matplotlib.pyplot as plt
from absl import flags
from tqdm import tqdm

from experiments import cases, common
from madjax import Detector, Gaussian, report
from madjax.scorer import Traces

flags.DEFINE_string("data", None, "Folder with checkpoints and data sets; digits alone where not given.")
flags.DEFINE_string("workdir", "runs/scale", "Folder for results.")
flags.DEFINE_integer("num_draws", 48, "Draws a setting.", lower_bound=2)
flags.DEFINE_integer("num_examples", 300, "Trusted, benign and anomalous examples, so many of each.", lower_bound=20)
flags.DEFINE_integer("seed", 0, "Seed of training, splits and draws.")
common.define_list(
    "attack", ["badnet", "blended", "sig"], ["badnet", "blended", "sig"], "Attacks of the digits models."
)
common.define_list("noise", ["absolute", "relative"], ["absolute", "relative", "curvature"], "Kinds of noise.")
flags.DEFINE_list("retained", ["0.15", "0.3", "0.5", "0.8", "0.95"], "Shares of trusted outputs that survive a draw.")

_SCORES: tuple[tuple[str, Traces], ...] = (
    ("class_correlation", "raw"),
    ("class_ccc", "raw"),
    ("topk_class_ccc", "raw"),
    ("class_ccc", "whitened"),
    ("topk_ccc", "whitened"),
    ("topk_class_ccc", "whitened"),
    ("standardized_ccc", "whitened"),
)


def main() -> None:
    """Sweeps every model at every setting."""
    values = flags.FLAGS
    workdir, config = common.open_workdir(
        values.workdir, ["data", "num_draws", "num_examples", "seed", "attack", "noise", "retained"]
    )
    models = cases.benchmark_models(values.attack, values.seed, values.data, list(cases.PUBLISHED))
    rows = [row for name, make in tqdm(models.items(), unit="model") for row in _rows(name, make())]
    report.write_json(workdir / "results.json", {"config": config, "device": common.device(), "rows": rows})
    _plot(workdir / "scale.png", rows, list(models))
    for row in rows:
        print(" ".join(f"{value:.3f}" if isinstance(value, float) else f"{value!s:<18}" for value in row.values()))


def _rows(model: str, case: cases.Case) -> list[dict[str, Any]]:
    values, rows = flags.FLAGS, []
    test_set = cases.make_small_test_set(case, values.seed, (0.4, 0.6), values.num_examples)
    counted, images, is_anomalous = test_set.counted, test_set.images, test_set.is_anomalous
    for noise in flags.FLAGS.noise:
        for retained in map(float, values.retained):
            detector = Detector.fit(
                jax.random.key(values.seed),
                case.loss_fn,
                case.params,
                test_set.trusted,
                perturbation=Gaussian(noise, retained=retained),
                num_draws=values.num_draws,
            )
            losses, classes = detector.sweep({"image": images})
            for coupling, traces in _SCORES:
                scores = detector.with_coupling(coupling, traces).score_losses(losses, classes)
                row = report.detection_row(scores, is_anomalous, counted.accuracy, counted.asr, detector.fpr)
                names = {"model": model, "noise": noise, "traces": traces, "coupling": coupling, "retained": retained}
                rows.append({**names, "scale": detector.scale, **{k: row[k] for k in ("auroc", "realized_fpr", "tpr")}})
    return rows


def _plot(path: Path, rows: list[dict[str, Any]], models: list[str]) -> None:
    noises = flags.FLAGS.noise
    size = (2.6 * len(models), 0.6 + 2.3 * len(noises))
    figure, grid = plt.subplots(
        len(noises), len(models), figsize=size, sharex=True, sharey=True, layout="constrained", squeeze=False
    )
    for axes_of_noise, noise in zip(grid, noises, strict=True):
        for axes, model in zip(axes_of_noise, models, strict=True):
            for coupling, traces in _SCORES:
                points = [
                    (row["retained"], row["auroc"])
                    for row in rows
                    if (row["model"], row["noise"], row["coupling"], row["traces"]) == (model, noise, coupling, traces)
                ]
                style = "-o" if traces == "whitened" else ":x"
                axes.plot(*zip(*points, strict=True), style, markersize=4, label=f"{coupling}, {traces}")
            axes.set_title(f"{model}, {noise}", fontsize=9)
            axes.grid(alpha=0.3)
        axes_of_noise[0].set_ylabel("AUROC")
    report.save_grid(path, figure, grid, "trusted outputs kept by a draw")


if __name__ == "__main__":
    common.run(main)
