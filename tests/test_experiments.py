"""Every driver once, at small size, as a user runs it."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SMALL = ["--num_draws=8", "--num_epochs=8", "--layout=host"]


def run(module, *flags, expect=0):
    command = [sys.executable, "-m", f"experiments.{module}", *flags]
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
    for name in ("histogram", "roc", "couplings", "flagged"):
        assert (workdir / "cells" / "badnet-0" / f"{name}.png").stat().st_size > 5000
    assert "badnet    topk_ccc" in done.stdout
    assert "average" in done.stdout


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


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--attack=badnets"], "wanted some of badnet, blended, sig, clean, got 'badnets'"),
        (["--coupling=cosine"], "wanted some of mean_correlation, class_correlation"),
        (["--sampler=hmc"], "gaussian|rmsprop_sgld|sgld"),
        (["--dataset=imagenet"], "digits"),
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
