r"""Adversarial inputs: how robust a model is, whether its detector sees what fools it, and an attack on both.

    python -m experiments.adversarial --dataset=digits --workdir=runs/adversarial
    python -m experiments.adversarial --dataset=cifar10 --data_dir=DATA --checkpoint=clean_resnet56_cifar10.th \
        --model=resnet56 --normalization=imagenet --num_pool=1000 --num_attacked=100

Attacks clean test images that the model gets right: FGSM, PGD in both norms, PGD on Carlini and Wagner's margin,
auto-PGD with restarts, and the adaptive PGD of `madjax.attacks.evasion`, which knows the detector and its draws,
once for every `--weight`. Epsilons and steps are in levels of 0..255, 8 being the literature's 8/255; digits have 17
levels of grey and 64 pixels, and there the default is 32. Images are rounded to uint8 before the model or the detector
sees them. Adversarial are those that fool the model after that; `robust` is the share of all test images that are
classified rightly before and after, `evades` that of attacked images that fool the model and are not flagged.

Writes config.json, metrics.jsonl (a line a cell), results.json and, under cells/, trade-off.png (success and score over
the weight), histogram.png and gallery.png. A second run with the same --workdir resumes.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import jax
import matplotlib.pyplot as plt
import numpy as np
from absl import flags

from experiments import cases, common, detection
from madjax import Detector, report
from madjax.attacks.adversarial import Attacked, auto_pgd, check_epsilon, fgsm, pgd
from madjax.attacks.evasion import adaptive_pgd
from madjax.data import split_by_class

_ATTACKS = ("fgsm", "pgd", "pgd_2", "margin", "auto_pgd", "adaptive")


def _weight(text: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not 0 <= weight <= 1:
        raise ValueError(f"wanted 0 to 1, got {text!r}")
    return weight


common.define_training_flags()
common.define_list("attack", _ATTACKS, _ATTACKS, "Attacks; margin is PGD on the margin loss.")
common.define_seeds()
detection.define_detectors(with_ours=True)
common.define_weights("Weights: torch, safetensors or orbax; a model is trained if not given.")
flags.DEFINE_bool("targeted", False, "Lead every image to the class after its own, instead of to any other.")
flags.DEFINE_float("epsilon", None, "∞-norm, in levels of 0..255; 8, and 32 for digits, if not given.")
flags.DEFINE_float("epsilon_2", None, "2-norm, in levels of 0..255; 128 (0.5 of 0..1), 256 for digits, if not given.")
flags.DEFINE_integer("num_steps", 40, "Of PGD, each of a quarter of epsilon.", lower_bound=1)
flags.DEFINE_integer("num_restarts", 2, "Of auto-PGD.", lower_bound=1)
flags.DEFINE_integer("num_attacked", None, "Test images to attack; all that are right if not given.", lower_bound=1)
common.define_texts("weight", ["0", "0.5", "0.9", "1"], _weight, "Of the detector in the adaptive attack, 0 to 1.")
flags.DEFINE_integer("num_attack_draws", 8, "Draws that a step of the adaptive attack differentiates.", lower_bound=1)
flags.DEFINE_string("workdir", "runs/adversarial", "Folder for results.")
detection.define_flags()
# what is no backdoor shows in how sure the model is as well: small perturbations keep that, and these traces show it
flags.FLAGS.set_default("retained", 0.95)
flags.FLAGS.set_default("traces", "plain_margins")

_OWN_FLAGS = [
    "attack", "seed", "detector", "checkpoint", "normalization", "targeted", "epsilon", "epsilon_2", "num_steps",
    "num_restarts", "num_attacked", "weight", "num_attack_draws",
]  # fmt: skip


def main() -> None:
    """Runs all cells and prints the table."""
    values = flags.FLAGS
    for name, largest in (("epsilon", 255.0), ("epsilon_2", math.inf)):
        epsilon: Any = values[name].value
        if epsilon is not None:
            check_epsilon(epsilon, largest)
    names = [*common.TRAINING_FLAGS, *_OWN_FLAGS, *detection.flag_names()]
    workdir, config = common.open_workdir(values.workdir, names)
    done = common.finished(workdir)
    for seed in map(int, config["seed"]):
        if f"clean-{seed}" not in done:
            done[f"clean-{seed}"] = _run_cell(seed, workdir)
            common.append_line(workdir, f"clean-{seed}", done[f"clean-{seed}"])
    rows = [row for seed in config["seed"] for row in done[f"clean-{seed}"]]
    report.write_json(workdir / "results.json", {"config": config, "device": common.device(), "rows": rows})
    print(f"{'attack':<14} {'detector':<21} {'seed':>4} {'ACC':>6} {'robust':>6} {'AUROC':>6} {'same':>6} {'FPR':>6} "
          f"{'TPR':>6} {'evades':>6} {'attack s':>8} {'seconds':>7} {'forwards':>8}")  # fmt: skip
    for row in rows:
        figures = [
            row[key] for key in ("acc", "robust", "auroc", "auroc_same_prediction", "realized_fpr", "tpr", "evades")
        ]
        cells = " ".join(f"{'-' if figure is None or np.isnan(figure) else f'{figure:.3f}':>6}" for figure in figures)
        print(f"{row['attack']:<14} {row['detector']:<21} {row['seed']:>4} {cells} {row['attack_seconds']:>8.0f} "
              f"{row['seconds']:>7.1f} {row['forwards_per_example']:>8.1f}")  # fmt: skip
    print(f"\nresults in {workdir}")


def _run_cell(seed: int, workdir: Path) -> list[dict[str, Any]]:
    values, recipe = flags.FLAGS, common.recipe_from_flags()
    if values.checkpoint is None:
        case = cases.train_case("clean", seed, recipe, workdir / "models" / f"clean-{seed}")
    else:
        case = cases.read_case(Path(values.checkpoint), recipe, "clean", values.normalization, seed)
    pool, folder = case.pool, workdir / "cells" / f"clean-{seed}"
    trusted, test = split_by_class(cases.cell_rng("adversarial", seed), pool.labels, (0.5, 0.5), pool.groups)
    right = case.predict(pool.images) == pool.labels
    accuracy = float(right[test].mean())
    trusted, benign = trusted[right[trusted]], test[right[test]]
    sources = benign[: values.num_attacked]
    settings = detection.settings_from_flags("default")
    start = time.perf_counter()
    detector = detection.fit(
        settings, seed, case.loss_fn, case.params, {"image": pool.images[trusted]}, None, None, folder / "trusted"
    )
    benign_losses, benign_classes = detector.sweep({"image": pool.images[benign]}, workdir=folder / "benign")
    sweep_seconds = time.perf_counter() - start
    assert benign_classes is not None
    rivals = list(detection.fit_rivals(case.loss_fn, case.params, {"image": pool.images[trusted]}))
    rows = []
    for name, weight in _attacks():
        start = time.perf_counter()
        label = name if weight is None else f"{name} {weight:g}"
        attacked = _attack(
            name, weight, seed, detector, pool.images[sources], pool.labels[sources], folder / f"{label}.npz"
        )
        seconds, fooled = time.perf_counter() - start, attacked.fooled
        losses, classes = benign_losses, benign_classes
        if fooled.any():
            more, their = detector.sweep({"image": attacked.images[fooled]}, workdir=folder / label)
            losses, classes = np.c_[losses, more], np.r_[classes, their]
        is_anomalous = np.arange(len(classes)) >= len(benign)
        scores = detector.score_losses(losses, classes)
        known: dict[str, Any] = {"accuracy": accuracy, "asr": float(fooled.mean())}
        row = detection.result_row(
            label, seed, settings, detector.scorer.coupling, detector, scores, is_anomalous,
            sweep_seconds=sweep_seconds, **known,
        )  # fmt: skip
        images = np.concatenate([pool.images[benign], attacked.images[fooled]])
        judged = [(row, scores)]
        judged += [
            detection.rival_row(label, seed, rival, {"image": images}, is_anomalous, **known) for rival in rivals
        ]
        rows += [
            row
            | {
                "robust": accuracy * float(1 - fooled.mean()),
                "evades": float((~said.flagged[is_anomalous]).sum() / len(sources)),
                "mean_anomaly_score": float(said.anomaly_score[is_anomalous].mean()) if fooled.any() else math.nan,
                "weight": weight,
                "num_attacked": len(sources),
                "attack_seconds": seconds,
            }
            for row, said in judged
        ]
        if label == "pgd" and fooled.any():
            title = f"{label}, seed {seed}, {detector.scorer.coupling}"
            report.plot_histogram(folder / "histogram.png", scores, is_anomalous, -detector.threshold(), title)
            shown = np.flatnonzero(fooled)[:8]
            report.plot_gallery(folder / "gallery.png", pool.images[sources[shown]], attacked.images[shown], title)
    curve = [row for row in rows if row["weight"] is not None and row["detector"] == detection.FUNCTIONAL]
    if curve:
        _plot_trade_off(folder / "trade-off.png", curve, f"adaptive PGD, seed {seed}")
    return rows


def _attacks() -> list[tuple[str, float | None]]:
    """The attacks, and the weights of the adaptive one."""
    values = flags.FLAGS
    plain: list[tuple[str, float | None]] = [(name, None) for name in values.attack if name != "adaptive"]
    return plain + [("adaptive", float(weight)) for weight in values.weight if "adaptive" in values.attack]


def _attack(
    name: str,
    weight: float | None,
    seed: int,
    detector: Detector,
    images: np.ndarray,
    labels: np.ndarray,
    path: Path,
) -> Attacked:
    """What an attack makes of images; read from `path` where it is there already."""
    if path.exists():
        with np.load(path) as file:
            return Attacked(file["images"], file["prediction"], file["fooled"])
    values = flags.FLAGS
    is_digits = values.dataset == "digits"
    epsilon = values.epsilon or (32.0 if is_digits else 8.0)
    epsilon_2 = values.epsilon_2 or (256.0 if is_digits else 128.0)
    loss_fn: Any = detector.loss_fn
    num_classes = loss_fn.num_classes(detector.params, {"image": images})
    common_settings: dict[str, Any] = {
        "targets": (labels + 1) % num_classes if values.targeted else None, "batch_size": values.batch_size,
    }  # fmt: skip
    model = (loss_fn, detector.params, images, labels)
    key = jax.random.key(seed)
    steps = {"num_steps": values.num_steps, **common_settings}
    if name == "fgsm":
        attacked = fgsm(*model, epsilon=epsilon, **common_settings)
    elif name == "pgd_2":
        attacked = pgd(key, *model, norm="2", epsilon=epsilon_2, step_size=epsilon_2 / 4, **steps)
    elif name == "auto_pgd":
        attacked = auto_pgd(key, *model, epsilon=epsilon, num_restarts=values.num_restarts, **steps)
    elif name == "adaptive":
        assert weight is not None
        attacked = adaptive_pgd(
            key, detector, images, labels, weight=weight, num_draws=min(values.num_attack_draws, values.num_draws),
            epsilon=epsilon, step_size=epsilon / 4, **steps,
        )  # fmt: skip
    else:
        objective = "margin" if name == "margin" else "cross_entropy"
        attacked = pgd(key, *model, epsilon=epsilon, step_size=epsilon / 4, objective=objective, **steps)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **attacked._asdict())
    return attacked


def _plot_trade_off(path: Path, rows: list[dict[str, Any]], title: str) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    weights = [row["weight"] for row in rows]
    for key, name in (("robust", "robust accuracy"), ("auroc", "AUROC of the detector"), ("evades", "evades both")):
        left.plot(weights, [row[key] for row in rows], marker="o", label=name)
    left.set(xlabel="weight of the detector", ylim=(-0.02, 1.02))
    left.legend(fontsize=8)
    right.plot([row["robust"] for row in rows], [row["mean_anomaly_score"] for row in rows], marker="o")
    for row in rows:
        right.annotate(f"{row['weight']:g}", (row["robust"], row["mean_anomaly_score"]), fontsize=8)
    right.set(xlabel="robust accuracy", ylabel="mean anomaly score of what fools")
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    common.run(main)
