"""SIGKILL at random moments: compiling, computing, writing, resuming. And SIGTERM, which gives a moment to save."""

import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from experiments.common import PREEMPTED
from madjax import open_traces
from tests.drivers import ROOT
from tests.own_model import score_flags


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["chains", "gaussian"])
def test_killed_at_random_moments(kind, tmp_path):
    num_kills, num_draws = 25, 400
    rng = np.random.default_rng(num_kills)
    folder, whole = tmp_path / "killed", []
    for kill in range(num_kills):
        command = [sys.executable, "-m", "tests.kill_worker", str(folder), kind, str(num_draws)]
        before = set(folder.rglob("*"))
        process = subprocess.Popen(command, cwd=ROOT)
        if kill % 3 == 2:
            time.sleep(rng.uniform(0, 6))  # anywhere: importing, compiling, at work
        else:  # about when something is written
            while process.poll() is None and set(folder.rglob("*")) == before:
                time.sleep(0.001)
            time.sleep(rng.uniform(0, 0.3))
        process.kill()
        assert process.wait() != 0, "it came to its end before it was killed"
        if (folder / "traces.zarr" / "zarr.json").exists():
            whole.append(int(np.isfinite(open_traces(folder).loss.values).all(axis=1).sum()))
    assert whole == sorted(whole)  # no block is lost
    assert whole[-1] > 0
    for path in (folder, tmp_path / "straight"):
        subprocess.run(
            [sys.executable, "-m", "tests.kill_worker", str(path), kind, str(num_draws)], cwd=ROOT, check=True
        )
    losses = open_traces(folder).loss.values
    assert np.isfinite(losses).all()
    np.testing.assert_array_equal(losses, open_traces(tmp_path / "straight").loss)


def test_a_driver_told_to_stop_goes_on_later(own_model, tmp_path):
    command = [sys.executable, "-m", "experiments.score", *score_flags(own_model, tmp_path), "--num_draws=4000"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list(tmp_path.glob("fit/traces.zarr/loss/c/1/*")):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == PREEMPTED
    done = int(np.isfinite(open_traces(tmp_path / "fit").loss.values).all(axis=1).sum())
    assert 32 <= done < 4000
    again = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert again.stderr is not None
    # the bar begins where the first run ended
    while not (line := again.stderr.readline(4000)).startswith("sweep"):
        assert line, "no sweep"
    again.kill()
    again.communicate()
    assert f"{done}/4000" in line
