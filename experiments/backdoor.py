r"""Backdoors: tells triggered inputs from benign ones, on models trained on the spot or brought along.

    python -m experiments.backdoor --dataset=digits --workdir=runs/demo            # a minute on 2 CPU cores
    python -m experiments.backdoor --dataset=cifar10 --data_dir=DATA --attack=badnet,wanet --seed=0,1,2
    python -m experiments.backdoor --checkpoint=runs/wanet/model                   # of experiments.train_backdoor
    python -m experiments.backdoor --checkpoint=weights.pth --model=resnet20 --dataset=cifar10 --attack=badnet
    python -m experiments.backdoor --backdoorbench=record/badnet_0_1
    python -m experiments.backdoor --detector=functional,mahalanobis,strip         # with rivals in the same table

Unless it is given a checkpoint, it trains a model for every attack and seed, with a tenth of the training images
poisoned. A checkpoint of train_backdoor tells its attack, seed and data itself; weights must have been trained with
badnet, sig or bpp, whose triggers are always the same. Images that no model was trained on are split into trusted,
sampling and test ones. By the protocol of the paper's code only clean images that the model gets right and triggered
images that fire are counted. The first row of each model is of draws, a tangent and features together
(`madjax.Ensemble`), the others of each alone; "batch" holds all test images of a model against each other as well,
where there are eleven (`madjax.batch`). --preset=default has the draws alone, and with paper among the presets the
table has the paper's chain and couplings.

Writes config.json, metrics.jsonl (a line a cell), results.json, scores.csv (a row an example) and, under cells/,
pictures, scores and losses (`madjax.open_traces`) of each attack and seed, under models/ what it trained. A second run
with the same --workdir resumes: a training after its last whole epoch, a sweep after its last block of draws.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags
from tqdm import tqdm

from experiments import cases, common, detection
from experiments.cases import Case, TestSet
from madjax import Detector, Scores, batch, hosts, report
from madjax.attacks import ATTACKS
from madjax.coupling import TOP_K
from madjax.store import changed

common.define_training_flags()
common.define_list(
    "attack", ["badnet", "blended", "sig", "clean"], [*ATTACKS, "clean"], "Attacks; clean trains without one."
)
common.define_seeds()
detection.define_presets(["default", "tangent", "knn", "batch"], ["default", "tangent", "knn", "batch", "paper"])
detection.define_detectors()
common.define_weights("A folder of train_backdoor, or weights: torch, safetensors or orbax.")
flags.DEFINE_string("backdoorbench", None, "Folder of a BackdoorBench result, with attack_result.pt.")
flags.DEFINE_string("workdir", "runs/backdoor", "Folder for results.")
detection.define_flags()
flags.DEFINE_multi_integer(
    "num_anomalous", [], "Also score batches of all benign and so few triggered images; results.json tells of them.",
    lower_bound=1,
)  # fmt: skip

# batches with few triggered images, of each number
_NUM_PICKS = 4
_OWN_FLAGS = [*common.TRAINING_FLAGS, "attack", "seed", "preset", "detector"]
_OWN_FLAGS += ["checkpoint", "normalization", "backdoorbench", "num_anomalous"]


def main() -> None:
    """Runs all cells and prints the table."""
    values = flags.FLAGS
    names = [*_OWN_FLAGS, *detection.flag_names()]
    workdir, config = common.open_workdir(values.workdir, names, _told())
    done = common.finished(workdir)
    cells = [(attack, int(seed)) for seed in config["seed"] for attack in config["attack"]]
    for attack, seed in tqdm(cells, desc="cells", unit="cell"):
        if f"{attack}-{seed}" not in done:
            rows = _run_cell(attack, seed, workdir)
            if hosts.is_first():
                common.append_line(workdir, f"{attack}-{seed}", rows)
            done[f"{attack}-{seed}"] = rows
    if not hosts.is_first():
        return
    rows = [row for attack, seed in cells for row in done[f"{attack}-{seed}"]]
    report.write_json(workdir / "results.json", {"config": config, "device": common.device(), "rows": rows})
    _join_scores(workdir, [f"{attack}-{seed}" for attack, seed in cells])
    print(report.table([*rows, *report.average_rows(rows)]))
    print(report.false_positives([row for row in rows if report.kind(row) == report.kind(rows[0])]))
    print(f"\nresults in {workdir}")


def _told() -> dict[str, Any]:
    """What a model that is brought along tells instead of the flags, by their names.

    Raises:
      ValueError: where flags that were given say otherwise, or weights do not hold the attack's trigger.
    """
    values = flags.FLAGS
    if values.backdoorbench:
        if values.checkpoint:
            raise ValueError("checkpoint: wanted it or backdoorbench, got both")
        told = {"attack": [Path(values.backdoorbench).resolve().name]}
        _check_told("backdoorbench", f"{values.backdoorbench} has", told)
        return told
    if values.checkpoint is None:
        return {}
    path = Path(values.checkpoint)
    if not cases.is_kept(path):
        if len(values.attack) != 1:
            got = ",".join(values.attack)
            raise ValueError(f"attack: wanted the one that --checkpoint was trained with, got {got}")
        cases.check_fixed(*values.attack)
        return {}
    kept = cases.read_kept(path)
    told = {"attack": [kept.name], "seed": [str(kept.seed)], "normalization": None, **kept.recipe._asdict()}
    # where the data lie, and how many are taken, may change after the training
    told = {name: value for name, value in told.items() if name not in ("data_dir", "num_pool")}
    _check_told("checkpoint", f"{path} was trained with", told)
    return told


def _check_told(flag: str, text: str, told: dict[str, Any]) -> None:
    given = {name: flags.FLAGS[name].value for name in told if flags.FLAGS[name].present}
    if different := changed({name: told[name] for name in given}, given):
        raise ValueError(f"{flag}: {text} other flags: {different}")


def _case(name: str, seed: int, workdir: Path) -> Case:
    values, recipe = flags.FLAGS, common.recipe_from_flags()
    if values.backdoorbench:
        folder = Path(values.backdoorbench)
        return cases.backdoorbench_case(folder, values.data_dir, values.target, values.num_pool)
    if values.checkpoint is None:
        folder = workdir / "models" / f"{name}-{seed}"
        if hosts.is_first():
            cases.train_case(name, seed, recipe, folder)
        hosts.barrier("trained")
        return cases.load_case(folder)
    path = Path(values.checkpoint)
    if cases.is_kept(path):
        return cases.load_case(path, values.data_dir, values.num_pool)
    return cases.read_case(path, recipe, name, values.normalization, seed)


def _run_cell(name: str, seed: int, workdir: Path) -> list[dict[str, Any]]:
    values = flags.FLAGS
    case = _case(name, seed, workdir)
    test = cases.make_test_set(case, name, seed)
    counted = test.counted
    rows, folder = [], workdir / "cells" / f"{name}-{seed}"
    if detection.FUNCTIONAL in values.detector:
        rows = _ours(name, seed, case, test, folder)
    known = {row["detector"] for row in rows}
    names = [rival for rival in values.detector if rival not in known]
    for rival in detection.fit_rivals(case.loss_fn, case.params, test.trusted, names):
        row, scores = detection.rival_row(
            name, seed, rival, {"image": test.images}, test.is_anomalous, accuracy=counted.accuracy, asr=counted.asr
        )
        if not rows and hosts.is_first():
            _show(folder, name, seed, test, {rival.name: scores}, -rival.baseline.threshold())
        rows.append(row)
    return rows


class _Fitted(NamedTuple):
    """A preset's detector, and what each of its couplings says of the test examples."""

    preset: str
    detector: Detector
    named_scores: dict[str, Scores]
    rows: list[dict[str, Any]]


def _ours(name: str, seed: int, case: Case, test: TestSet, folder: Path) -> list[dict[str, Any]]:
    """A row of each preset and coupling, after that of an ensemble where there is one; the first is shown."""
    presets = flags.FLAGS.preset
    fitted = [_fit(name, seed, case, test, folder, preset) for preset in detection.with_draws(presets)]
    rows = [row for each in fitted for row in each.rows]
    shown, threshold = fitted[0].named_scores, fitted[0].detector.threshold()
    images, counted = {"image": test.images}, test.counted
    features = detection.judge_features(
        name, seed, case.loss_fn, case.params, test.trusted, images, test.is_anomalous, accuracy=counted.accuracy,
        asr=counted.asr,
    )  # fmt: skip
    rows += [each.row for each in features.values()]
    first = {
        each.preset: detection.Judged(each.detector, next(iter(each.named_scores.values())), each.rows[0])
        for each in fitted
    }
    judged = detection.together(first | features, test.is_anomalous)
    if judged:
        rows.insert(0, judged.row)
        shown, threshold = {judged.row["coupling"]: judged.scores, **shown}, judged.detector.threshold()
    if "batch" in presets and len(test.images) > TOP_K:
        rows.append(_as_batch(fitted[0].detector, judged or first[fitted[0].preset], test.is_anomalous, seed))
    if hosts.is_first():
        _show(folder, name, seed, test, shown, -threshold)
        _, detector, named_scores, _ = fitted[0]
        assert detector.test is not None
        coupling, scores = next(iter(named_scores.items()))
        title = f"{name}, seed {seed}, {coupling}"
        report.plot_couplings(
            folder / "couplings.png", detector.scorer, detector.test[0], scores, test.is_anomalous, title
        )
        if len(test.counted.anomalous):
            clean = case.pool.images[test.counted.anomalous[:8]]
            report.plot_gallery(folder / "gallery.png", clean, test.counted.triggered[:8], name)
    return rows


def _as_batch(drawn: Detector, judged: detection.Judged, is_anomalous: np.ndarray, seed: int) -> dict[str, Any]:
    """The row of a batch scored as a whole, with figures of batches that hold few triggered images."""
    assert drawn.test is not None
    losses, trusted_couplings = drawn.test[0], judged.detector.trusted_couplings

    def row(chosen: np.ndarray) -> dict[str, Any]:
        alone = jax.tree.map(lambda array: array[chosen], judged.scores)
        scores = batch.as_batch(drawn.scorer, losses[:, chosen], alone, trusted_couplings, fpr=drawn.fpr)
        return detection.derived_row([judged.row], scores, is_anomalous[chosen], "+batch")

    benign, anomalous = np.flatnonzero(~is_anomalous), np.flatnonzero(is_anomalous)
    few, rng = {}, np.random.default_rng(seed)
    for count in flags.FLAGS.num_anomalous:
        if len(benign) + count > TOP_K and count <= len(anomalous):
            picks = [row(np.r_[benign, rng.choice(anomalous, count, replace=False)]) for _ in range(_NUM_PICKS)]
            few[count] = {
                key: float(np.mean([pick[key] for pick in picks])) for key in ("auroc", "tpr", "realized_fpr")
            }
    return row(np.arange(len(is_anomalous))) | ({"few_anomalous": few} if few else {})


def _fit(name: str, seed: int, case: Case, test: TestSet, folder: Path, preset: str) -> _Fitted:
    settings, start = detection.settings_from_flags(preset), time.perf_counter()
    detector = detection.fit(
        settings, seed, case.loss_fn, case.params, test.trusted, test.sampling, {"image": test.images}, folder / preset
    )
    assert detector.test is not None
    seconds = time.perf_counter() - start
    named_scores = {
        coupling: detector.with_coupling(coupling, settings.traces).score_losses(*detector.test)
        for coupling in settings.coupling
    }
    rows = [
        detection.result_row(
            name, seed, settings, coupling, detector, scores, test.is_anomalous,
            accuracy=test.counted.accuracy, asr=test.counted.asr, sweep_seconds=seconds,
        )
        for coupling, scores in named_scores.items()
    ]  # fmt: skip
    return _Fitted(preset, detector, named_scores, rows)


def _show(folder: Path, name: str, seed: int, test: TestSet, named_scores: dict[str, Scores], threshold: float) -> None:
    """Pictures and scores of one cell, of the first of the scores that are named."""
    folder.mkdir(parents=True, exist_ok=True)
    coupling, first = next(iter(named_scores.items()))
    title = f"{name}, seed {seed}, {coupling}"
    counted, images, is_anomalous = test.counted, test.images, test.is_anomalous
    kinds = np.where(is_anomalous, "triggered", "benign")
    sources = np.r_[counted.benign, counted.anomalous]
    ids = [f"{name}-{seed}/{kind}-{index}" for kind, index in zip(kinds, sources, strict=True)]
    trusted_ids = [f"test-{index}" for index in counted.trusted]
    report.write_scores(folder / "scores.csv", ids, first, is_anomalous, trusted_ids)
    report.plot_histogram(folder / "histogram.png", first, is_anomalous, threshold, title)
    report.plot_flagged(folder / "flagged.png", images, first, is_anomalous, title)
    if is_anomalous.any():
        report.plot_roc(folder / "roc.png", named_scores, is_anomalous, f"{name}, seed {seed}")


def _join_scores(workdir: Path, names: list[str]) -> None:
    texts = [(workdir / "cells" / name / "scores.csv").read_text() for name in names]
    heads = [text.splitlines(keepends=True) for text in texts]
    (workdir / "scores.csv").write_text("".join([heads[0][0], *(line for head in heads for line in head[1:])]))


if __name__ == "__main__":
    common.run(main)
