"""Several hosts: real processes that talk over loopback."""

import csv
import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest

from madjax import open_traces
from tests.drivers import ROOT
from tests.host_worker import sweeps
from tests.own_model import score_flags


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start(*command):
    return subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "MPLBACKEND": "Agg", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def finish(processes, expect):
    for process in processes:
        _, errors = process.communicate(timeout=600)
        assert process.returncode == expect, errors[-2000:]
        yield errors


@pytest.mark.slow
def test_four_hosts_get_the_matrix_of_one(tmp_path):
    together, alone = tmp_path / "together", tmp_path / "alone"
    together.mkdir()
    port = free_port()
    list(finish([start("-m", "tests.host_worker", str(port), "4", str(i), str(together)) for i in range(4)], 0))
    expected = sweeps(alone)
    for host in range(4):
        with np.load(together / f"host-{host}.npz") as found:
            for name, matrix in expected.items():
                np.testing.assert_allclose(found[name], matrix, rtol=2e-6, atol=2e-6)
            # of 8 trusted and 40 test examples, 12 a host, and 10 for the fingerprint of the test examples
            seen = set(range(max(0, 12 * host - 8), 12 * host + 4)) | set(range(10 * host, 10 * host + 10))
            assert set(found["looked_at"]) == seen
    # each wrote its own columns
    assert len(list((together / "traces.zarr" / "loss" / "c" / "0").iterdir())) == 4
    np.testing.assert_allclose(open_traces(together).loss, expected["chains"], rtol=2e-6, atol=2e-6)


def score(own_model, workdir, num_hosts, more):
    flags = [*score_flags(own_model, workdir), "--distributed", f"--coordinator=127.0.0.1:{free_port()}"]
    flags += [f"--num_hosts={num_hosts}"]
    return [start("-m", "experiments.score", *flags, f"--host={host}", *more(host)) for host in range(num_hosts)]


def test_a_driver_on_two_hosts(own_model, scored, tmp_path):
    list(finish(score(own_model, tmp_path, 2, lambda host: []), 0))
    scores = {}
    for name, workdir in (("one", scored[0]), ("two", tmp_path)):
        with (workdir / "scores.csv").open() as file:
            scores[name] = list(csv.DictReader(file))
        assert json.loads((workdir / "results.json").read_text())["rows"][0]["auroc"] is not None
    for one, two in zip(scores["one"], scores["two"], strict=True):
        assert (one["id"], one["prediction"]) == (two["id"], two["prediction"])
        assert float(one["anomaly_score"]) == pytest.approx(float(two["anomaly_score"]), abs=1e-3)


@pytest.mark.slow
def test_hosts_that_disagree_all_stop(own_model, tmp_path):
    for errors in finish(score(own_model, tmp_path / "run", 2, lambda host: [f"--seed={host}"]), 1):
        assert "error: flags: hosts disagree: seed is 0 on host 0, 1 on host 1" in errors
    assert not (tmp_path / "run").exists()


def test_a_coordinator_that_never_answers(own_model, tmp_path):
    (alone,) = score(own_model, tmp_path, 1, lambda host: ["--num_hosts=2", "--host=1", "--coordinator_timeout=3"])
    (errors,) = finish([alone], 1)
    assert "error: coordinator: 127.0.0.1:" in errors
    assert "did not come within 3 s (host 1 of 2)" in errors
    assert "Traceback" not in errors
