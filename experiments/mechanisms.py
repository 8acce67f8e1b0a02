r"""Mechanisms: several backdoors in one model, and adversarial inputs; tells the anomalies' mechanisms apart.

    python -m experiments.mechanisms --dataset=digits --workdir=runs/mechanisms
    python -m experiments.mechanisms --backdoors=sig:2+lf:5 --seed=0,1,2 --workdir=runs/sig-lf
    python -m experiments.mechanisms --dataset=cifar10 --data_dir=DATA --epsilon=8 --step_size_attack=2

Each of `--backdoors` is one model, written as attack:target+attack:target. The test set holds benign images, triggered
ones of every backdoor, and targeted PGD examples towards a class that no backdoor asks for: an untargeted attack on a
backdoored model finds the backdoor, and its examples then truly share that mechanism. What the detector flags is
grouped by `madjax.mechanisms`, which is told neither how many groups there are nor what is in them. `ari` and `ami`
hold the groups against the truth on all that is flagged, false positives being a kind of their own; `ari_anomalies` is
that without them.

Writes config.json, metrics.jsonl (a line a cell), results.json and, under cells/, mechanisms.png (the couplings in a
plane), central.png (the most central examples of each group) and groups.csv. A second run with the same --workdir
resumes.
"""

from __future__ import annotations

import csv
import time
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from sklearn.metrics import adjusted_mutual_info_score, adjusted_rand_score

from experiments import cases, common, detection
from madjax import report
from madjax.attacks import ATTACKS
from madjax.attacks.adversarial import pgd
from madjax.data import split_by_class
from madjax.mechanisms import Mechanisms, group_by_mechanism

_DEFAULT = ["badnet:0+blended:1", "badnet:0+blended:0", "badnet:0+blended:1+sig:2+lf:3"]


def _parse(text: str) -> tuple[list[str], list[int]]:
    """Attacks and their targets."""
    names, targets = [], []
    for part in text.split("+"):
        name, _, target = part.partition(":")
        if name not in ATTACKS or not target.isdecimal():
            raise ValueError(f"wanted attack:target+attack:target of {', '.join(ATTACKS)}, got {text!r}")
        names.append(name)
        targets.append(int(target))
    if len(names) < 2 or len(set(names)) < len(names):
        raise ValueError(f"wanted two attacks or more, each once, got {text!r}")
    return names, targets


common.define_training_flags()
common.define_texts("backdoors", _DEFAULT, _parse, "Backdoors of one model, comma-separated.")
common.define_seeds()
detection.define_detectors(with_ours=True)
flags.DEFINE_float("epsilon", 64.0, "Of the adversarial examples, ∞-norm, in levels of 0..255.")
flags.DEFINE_float("step_size_attack", 8.0, "Of one of their 40 steps, in levels of 0..255.")
flags.DEFINE_string("workdir", "runs/mechanisms", "Folder for results.")
detection.define_flags()
# small draws and margins tell mechanisms apart better (docs/results-beyond.md)
flags.FLAGS.set_default("retained", 0.6)
flags.FLAGS.set_default("traces", "margins")


def main() -> None:
    """Runs all cells and prints the table."""
    values = flags.FLAGS
    names = [
        *common.TRAINING_FLAGS, "backdoors", "seed", "detector", "epsilon", "step_size_attack",
        *detection.flag_names(),
    ]  # fmt: skip
    workdir, config = common.open_workdir(values.workdir, names)
    done = common.finished(workdir)
    cells = [(backdoors, int(seed)) for backdoors in config["backdoors"] for seed in config["seed"]]
    for backdoors, seed in cells:
        name = f"{backdoors.replace(':', '-')}-{seed}"
        if name not in done:
            done[name] = _run_cell(backdoors, seed, workdir / "models" / name, workdir / "cells" / name)
            common.append_line(workdir, name, done[name])
    rows = [row for backdoors, seed in cells for row in done[f"{backdoors.replace(':', '-')}-{seed}"]]
    report.write_json(workdir / "results.json", {"config": config, "device": common.device(), "rows": rows})
    head = f"{'backdoors':<32} {'detector':<21} {'seed':>4} {'AUROC':>6} {'TPR':>5} {'seconds':>7} {'forwards':>8}"
    print(f"{head} {'mechanisms':>10} {'groups':>6} {'ARI':>6} {'AMI':>6}")
    for row in rows:
        line = f"{row['attack']:<32} {row['detector']:<21} {row['seed']:>4} {row['auroc']:>6.3f} {row['tpr']:>5.3f} "
        line += f"{row['seconds']:>7.1f} {row['forwards_per_example']:>8.1f}"
        if "ari" in row:
            line += f" {row['num_mechanisms']:>10} {row['num_groups']:>6} {row['ari']:>6.3f} {row['ami']:>6.3f}"
        print(line)
    print(f"\nresults in {workdir}")


def _run_cell(backdoors: str, seed: int, model_folder: Path, folder: Path) -> list[dict[str, Any]]:
    """The row of ours, with what its groups are worth, and those of its rivals, which tell no groups."""
    values, start = flags.FLAGS, time.perf_counter()
    names, targets = _parse(backdoors)
    case, attacks = cases.train_several(names, targets, seed, common.recipe_from_flags(), model_folder)
    pool = case.pool
    parts = split_by_class(cases.cell_rng(backdoors, seed), pool.labels, (0.4, 0.6), pool.groups)
    right = case.predict(pool.images) == pool.labels
    trusted, test = (part[right[part]] for part in parts)
    images, truth, asrs = [pool.images[test]], [np.full(len(test), "benign", object)], []
    for name, target, attack in zip(names, targets, attacks, strict=True):
        shown = attack.trigger(pool.images[test[pool.labels[test] != target]])
        fires = case.predict(shown) == target
        asrs.append(float(fires.mean()))
        images.append(shown[fires])
        truth.append(np.full(fires.sum(), f"{name} to {target}", object))
    free = next(label for label in np.unique(pool.labels) if label not in targets)
    sources = test[pool.labels[test] != free]
    attacked = pgd(
        jax.random.key(seed), case.loss_fn, case.params, pool.images[sources], pool.labels[sources],
        epsilon=values.epsilon, step_size=values.step_size_attack, targets=np.full(len(sources), free),
    )  # fmt: skip
    images.append(attacked.images[attacked.fooled])
    truth.append(np.full(attacked.fooled.sum(), f"adversarial to {free}", object))
    images, truth = np.concatenate(images), np.concatenate(truth).astype(str)

    begun = time.perf_counter()
    settings = detection.settings_from_flags("default")
    detector = detection.fit(
        settings, seed, case.loss_fn, case.params, {"image": pool.images[trusted]}, None, {"image": images},
        folder / "losses",
    )  # fmt: skip
    assert detector.test is not None
    losses, _ = detector.test
    sweep_seconds = time.perf_counter() - begun
    scores, is_anomalous = detector.score_losses(*detector.test), truth != "benign"
    chosen = np.flatnonzero(scores.flagged)
    found = group_by_mechanism(detector.scorer.map(losses[:, chosen]))
    kinds = truth[chosen]
    _show(folder, f"{backdoors}, seed {seed}", images[chosen], chosen, kinds, found)
    anomalous = kinds != "benign"
    known = {"accuracy": float(right[parts[1]].mean()), "asr": float(np.mean(asrs))}
    row = detection.result_row(
        backdoors, seed, settings, detector.scorer.coupling, detector, scores, is_anomalous,
        sweep_seconds=sweep_seconds, **known,
    )  # fmt: skip
    row |= {
        "ari": float(adjusted_rand_score(kinds, found.group)),
        "ami": float(adjusted_mutual_info_score(kinds, found.group)),
        "ari_anomalies": float(adjusted_rand_score(kinds[anomalous], found.group[anomalous])),
        "num_groups": found.num_groups,
        "num_mechanisms": len(np.unique(kinds[anomalous])),
        "asrs": dict(zip(names, asrs, strict=True)),
        "fooled": float(attacked.fooled.mean()),
        "groups": [
            {
                "size": len(members),
                "kinds": dict(Counter(kinds[members].tolist())),
                "central": chosen[members[:8]].tolist(),
            }
            for members in found.central
        ],
        "cell_seconds": time.perf_counter() - start,
    }
    rivals = detection.fit_rivals(case.loss_fn, case.params, {"image": pool.images[trusted]})
    judged = [detection.rival_row(backdoors, seed, rival, {"image": images}, is_anomalous, **known) for rival in rivals]
    return [row, *(row for row, _ in judged)]


def _show(
    folder: Path, title: str, images: np.ndarray, numbers: np.ndarray, kinds: np.ndarray, found: Mechanisms
) -> None:
    """Pictures of one cell, and a row for each flagged example: number in the test set, kind, group and rank in it."""
    report.plot_mechanisms(folder / "mechanisms.png", np.clip(1 - found.correlation, 0, 2), kinds, found.group, title)
    if found.central:
        names = [
            f"group {label}, {len(members)}: "
            + ", ".join(f"{count} {kind}" for kind, count in Counter(kinds[members].tolist()).most_common())
            for label, members in enumerate(found.central)
        ]
        report.plot_central(folder / "central.png", images, found.central, names)
    rank = {int(index): place for members in found.central for place, index in enumerate(members)}
    with (folder / "groups.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["number", "kind", "group", "rank"])
        writer.writerows(
            [number, kind, group, rank.get(index, "")]
            for index, (number, kind, group) in enumerate(zip(numbers, kinds, found.group, strict=True))
        )


if __name__ == "__main__":
    common.run(main)
