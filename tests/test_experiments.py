"""Every driver once, at small size, as a user runs it."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.own_model import score_flags

ROOT = Path(__file__).parents[1]
SMALL = ["--num_draws=8", "--num_epochs=8", "--layout=host"]


def run(module, *flags, expect=0, paper=None):
    """Runs a driver; `paper` shortens the paper's preset, which would take an hour."""
    command = [sys.executable, "-m", f"experiments.{module}", *flags]
    if paper is not None:
        code = f"import runpy; from experiments import common; common.PAPER.update({paper}); "
        code += f"runpy.run_module('experiments.{module}', run_name='__main__')"
        command = [sys.executable, "-c", code, *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "MPLBACKEND": "Agg"})
    assert done.returncode == expect, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    done = run("backdoor", f"--workdir={workdir}", "--attack=badnet,clean", *SMALL)
    return workdir, done


def test_backdoor_writes_what_it_says(finished):
    workdir, done = finished
    results = json.loads((workdir / "results.json").read_text())
    assert results["config"]["attack"] == ["badnet", "clean"]
    assert len(results["rows"]) == 6
    keys = {
        "attack", "sampler", "coupling", "seed", "acc", "asr", "auroc", "auroc_same_prediction", "ap", "recall_at_fpr",
        "threshold_fpr", "realized_fpr", "tpr", "der", "num_draws", "sample_forwards", "sweep_seconds",
    }  # fmt: skip
    row = results["rows"][0]
    assert keys <= row.keys()
    assert list(row["recall_at_fpr"]) == ["0.005", "0.01", "0.02", "0.05"]
    assert row["auroc"] > 0.8  # a chance detector, or one that points the wrong way, has .5 or less
    assert results["rows"][-1]["auroc"] is None  # the clean model
    with (workdir / "scores.csv").open() as file:
        scores = list(csv.DictReader(file))
    assert len(scores) == sum(r["num_benign"] + r["num_anomalous"] for r in results["rows"][::3])
    assert all(line["flagged"] == str(int(float(line["p_value"]) <= 0.05)) for line in scores)
    flagged = [line["flagged"] == "1" for line in scores if line["id"].startswith("badnet-0/triggered")]
    assert sum(flagged) / len(flagged) == pytest.approx(row["tpr"])
    for name in ("histogram", "roc", "couplings", "flagged", "gallery"):
        assert (workdir / "cells" / "badnet-0" / f"{name}.png").stat().st_size > 5000
    assert "badnet      gaussian     topk_ccc" in done.stdout
    assert "average" in done.stdout
    assert "5.00% wanted" in done.stdout


def test_backdoor_resumes_and_refuses_other_flags(finished):
    workdir, before = finished
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write('{"cell": "cut o')
    again = run("backdoor", f"--workdir={workdir}", "--attack=badnet,clean", *SMALL)
    assert again.stdout == before.stdout
    assert "epoch" not in again.stderr  # nothing was trained
    refused = run("backdoor", f"--workdir={workdir}", "--attack=badnet,clean", "--fpr=0.1", *SMALL, expect=1)
    assert refused.stderr.strip().splitlines()[-1].endswith("fpr was 0.05, is 0.1")


def test_backdoor_with_chains(tmp_path):
    run(
        "backdoor", f"--workdir={tmp_path}", "--attack=badnet", "--sampler=rmsprop_sgld", "--num_chains=2",
        "--num_burnin_steps=2", "--drift", "--coupling=class_correlation", "--traces=raw", *SMALL,
    )  # fmt: skip
    (row,) = json.loads((tmp_path / "results.json").read_text())["rows"]
    # 2 + 2 · 4 steps... burn-in of both chains and a step a draw, three passes over 190 images each
    assert row["sample_forwards"] > 3 * (2 * 2 + 8) * 150
    assert row["scale"] is None
    assert row["ess"] > 0
    assert row["rhat"] > 0.9


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--attack=badnets"], "bpp, clean, got 'badnets'"),
        (["--coupling=cosine"], "wanted some of mean_correlation, class_correlation"),
        (["--sampler=hmc"], "gaussian|rmsprop_sgld|sgld"),
        (["--dataset=nowhere.npz", "--model=resnet20"], "error: name: 'nowhere.npz' is not at"),
        (["--model=resnet21"], "error: name: no model 'resnet21'; known are"),
        (["--seed=a"], "wanted numbers from 0 on, comma-separated, got 'a'"),
        (["--preset=ours"], "wanted some of default, paper, got 'ours'"),
        (["--checkpoint=x.pth"], "error: attack: wanted the one that --checkpoint was trained with"),
        (["--backdoorbench=/nowhere"], "error: path: "),
        (["--workdir=/proc/nowhere"], "error: workdir: cannot write to /proc/nowhere"),
        (["--layout=pmap"], "layout: wanted auto, host, scanK or vmapK"),
        (["extra"], "unknown argument 'extra'"),
    ],
)
def test_bad_flags_get_one_line(flags, message, tmp_path):
    command = [sys.executable, "-m", "experiments.backdoor", f"--workdir={tmp_path}", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert message in done.stderr + done.stdout
    assert "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("trained")
    done = run("train_backdoor", f"--workdir={workdir}", "--attack=bpp", "--num_epochs=3")
    return workdir, done


def test_train_backdoor(trained):
    workdir = trained[0]
    (row,) = json.loads((workdir / "results.json").read_text())["rows"]
    assert row["acc"] > 0.5
    assert 0 <= row["asr"] <= 1
    assert (workdir / "gallery.png").stat().st_size > 5000
    again = run("train_backdoor", f"--workdir={workdir}", "--attack=bpp", "--num_epochs=3")
    assert "epoch" not in again.stderr  # nothing was trained
    assert f"acc {row['acc']:.3f}" in again.stdout


def test_backdoor_reads_a_trained_model_and_the_paper_stands_beside(trained, tmp_path):
    presets = ["--preset=default,paper", "--num_draws=8", "--layout=host", "--num_pool=60"]
    workdir = trained[0]
    paper = json.dumps({"num_draws": 8, "num_burnin_steps": 2})
    run("backdoor", f"--checkpoint={workdir}/model", "--attack=bpp", f"--workdir={tmp_path}", *presets, paper=paper)
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [(row["sampler"], row["coupling"]) for row in rows] == [
        ("gaussian", "topk_ccc"), ("gaussian", "class_ccc"), ("gaussian", "class_correlation"),
        ("rmsprop_sgld", "class_correlation"), ("rmsprop_sgld", "class_ccc"),
    ]  # fmt: skip
    assert not (tmp_path / "models").exists()


def test_score(own_model, tmp_path):
    done = run("score", *score_flags(own_model, tmp_path))
    with (tmp_path / "scores.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 40
    assert lines[0]["id"] == "test-0"
    assert lines[0]["nearest_1"].startswith("good")
    (row,) = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert 0 <= row["auroc"] <= 1
    assert "flagged at 5.0%" in done.stdout
    before = (tmp_path / "scores.csv").read_text()
    # later, on examples of which nothing is known, by the kept detector
    run("score", *score_flags(own_model, tmp_path, "unknown.npz"))
    with (tmp_path / "scores.csv").open() as file:
        again = list(csv.DictReader(file))
    assert "is_anomalous" not in again[0]
    assert [line["anomaly_score"] for line in again] == [line["anomaly_score"] for line in lines]
    assert before


def test_score_with_ones_own_loss(own_model, tmp_path):
    flags = [flag for flag in score_flags(own_model, tmp_path) if not flag.startswith("--architecture")]
    run("score", "--loss_fn=tests.own_model:load", *flags)
    assert (tmp_path / "scores.csv").exists()


def test_score_bad_input(own_model, tmp_path):
    flags = score_flags(own_model, tmp_path)
    floats = np.zeros((3, 28, 28, 1), np.float32)
    np.savez(tmp_path / "floats.npz", image=floats)
    np.savez(tmp_path / "colour.npz", image=np.zeros((3, 28, 28, 3), np.uint8))
    (tmp_path / "text.npz").write_text("no zip")
    for bad, message in (
        ([f"--test={tmp_path}/floats.npz"], "error: test: wanted image, uint8 [n, height, width, channels]"),
        ([f"--test={tmp_path}/text.npz"], "error: test: cannot read"),
        ([f"--trusted={tmp_path}/colour.npz"], "error: "),
        (["--architecture=resnet20"], "error: weights: "),
        (["--architecture="], "error: architecture: wanted it or loss_fn"),
        (["--normalization=red"], "error: normalization: got 'red'"),
        ([f"--checkpoint={tmp_path}/text.npz"], "error: path: "),
    ):
        done = run("score", *flags, *bad, expect=1)
        assert message in done.stderr, (bad, done.stderr[-300:])
        assert "Traceback" not in done.stderr


def test_bench_sweep():
    out = run("bench_sweep", "--num_examples=40", "--num_draws=8", "--repeats=1", "--layouts=host,scan8").stdout
    result = json.loads(out.splitlines()[-1])
    assert set(result["layouts"]) == {"host", "scan8", "auto"}
    assert result["auto_over_best"] > 0


def test_bench_scale(tmp_path):
    run(
        "bench_scale",
        f"--workdir={tmp_path}",
        "--attack=badnet",
        "--num_draws=4",
        "--num_examples=40",
        "--retained=0.3",
    )
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert len(rows) == 10
    assert (tmp_path / "scale.png").exists()


def test_bench_train():
    flags = ["--models=badnets_cnn", "--num_images=64", "--batch_size=32", "--num_epochs=2", "--repeats=1"]
    result = json.loads(run("bench_train", *flags).stdout.splitlines()[-1])
    assert result["models"].keys() == {"badnets_cnn"}


@pytest.mark.slow
def test_ablations(tmp_path):
    done = run(
        "ablations", "--attack=badnet", "--num_epochs=8", "--num_draws=8", "--layout=host", f"--workdir={tmp_path}"
    )
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert {row["ablation"] for row in rows} == {"num_draws", "num_trusted", "poison_ratio", "parameters", "statistics"}
    assert all((tmp_path / f"{row['ablation']}.png").exists() for row in rows)
    # a hundred trusted examples do better than two dozen, which cannot flag much
    tprs = {row["value"]: row["tpr"] for row in rows if row["ablation"] == "num_trusted"}
    assert tprs[100] > tprs[25]
    assert "statistics   drifting" in done.stdout
