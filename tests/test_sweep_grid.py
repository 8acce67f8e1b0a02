"""Sweeps: grids, claims that are contested, workers that die, and job files."""

import collections
import doctest
import itertools
import json
import os
import re
import shlex
import signal
import string
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml
from absl import flags

from experiments import claims, grid
from tests.drivers import ROOT, own_flags

JOBS = ROOT / "experiments" / "jobs"
TINY = "--driver=tests.tiny_driver"


@pytest.fixture(scope="module")
def sweep():
    with own_flags():
        import experiments.sweep

        yield experiments.sweep


@pytest.fixture
def call(sweep, monkeypatch, capsys, tmp_path):
    """Runs the command in this process; returns its exit status and what it printed."""
    for variable in ("SLURM_ARRAY_TASK_ID", "JOB_COMPLETION_INDEX"):
        monkeypatch.delenv(variable, raising=False)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def run(*arguments):
        flags.FLAGS.unparse_flags()
        flags.FLAGS(["sweep", f"--workdir={tmp_path}", *arguments])
        try:
            sweep.main()
            status = 0
        except SystemExit as error:
            status = error.code
        return status, capsys.readouterr().out

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


def entries(folder):
    """All entries of a cell's log, in their order."""
    numbers = sorted(int(path.stem) for path in folder.glob("[0-9]*.json"))
    assert numbers == list(range(1, len(numbers) + 1))
    return [json.loads((folder / f"{number}.json").read_text()) for number in numbers]


def states(folder):
    return [entry["state"] for entry in entries(folder)]


def events(path):
    """Events of tiny drivers, as (event, cell, process)."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [(event, cell, int(pid)) for event, cell, pid in map(str.split, lines)]


def wait_for(condition, seconds=30.0):
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)
    return value


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def start(*arguments):
    """A real worker."""
    command = [sys.executable, "-m", "experiments.sweep", *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


# grids


def test_doctests():
    assert doctest.testmod(grid).attempted > 0
    assert doctest.testmod(grid).failed == 0


def test_cells_expand_in_order():
    made = grid.read_grid("backdoor", ["attack=badnet,sig", "seed=0,1,2"], ["num_draws=8"], None)
    assert made.driver == "experiments.backdoor"
    assert list(made.cells) == [f"attack={attack},seed={seed}" for attack in ("badnet", "sig") for seed in range(3)]
    assert made.arguments("attack=sig,seed=1", Path("w")) == [
        "--num_draws=8", "--attack=sig", "--seed=1", "--workdir=w/cells/attack=sig,seed=1",
    ]  # fmt: skip


def test_names_are_safe_short_and_different():
    values = ["a/b", "a_b", "a b", "..", "a,b=2", "x" * 300, "x" * 301, "ä", "", "A"]
    names = [grid.cell_name({"a": a, "b": b}) for a, b in itertools.product(values, values)]
    # these two read the same when written down plainly
    names += [grid.cell_name({"a": "1,b=2", "b": "3"}), grid.cell_name({"a": "1", "b": "2,b=3"})]
    assert len(set(names)) == len(names)
    assert all(len(name) < 120 and name.isascii() and not set(name) & set("/ \n") for name in names)


def test_toml_values_arrive_as_the_driver_reads_them(tmp_path):
    path = tmp_path / "grid.toml"
    path.write_text(
        'driver = "tests.tiny_driver"\n[flags]\nbare = true\n[grid]\n'
        'extra = ["a", "b"]\ncoupling = [["topk_ccc", "class_ccc"], "mean_ccc"]\nseconds = [1e-6, 2]\n'
        'fail_while = ["a,b"]\n'
    )
    made = grid.read_grid(None, [], [], str(path))
    first = next(iter(made.cells))
    assert made.arguments(first, tmp_path)[:5] == [
        "--bare=true", "--extra=a", "--coupling=topk_ccc,class_ccc", "--seconds=1e-06", "--fail_while=a,b",
    ]  # fmt: skip
    assert len(made.cells) == 8
    grid.open_grid(made, tmp_path, keep=True)  # the driver takes them


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([TINY, "--grid=sed=0,1"], "grid: cell sed=0: Unknown command line flag 'sed'. Did you mean:"),
        ([TINY, "--grid=seed=0,x"], "grid: cell seed=x: flag --seed=x: invalid literal"),
        ([TINY, "--grid=seed=0", "--flag=attack=badnets"], "grid: cell seed=0: flag --attack=badnets: value should be"),
        ([TINY, "--grid=seed=0,-1"], "grid: cell seed=-1: flag --seed=-1: -1 is not a non-negative integer"),
        (
            ["--driver=backdor", "--grid=seed=0"],
            "driver: wanted a module that can be imported, got experiments.backdor",
        ),
        (["--driver=tests.oracles", "--grid=seed=0"], "driver: wanted one with a flag workdir, tests.oracles has none"),
        (["--grid=seed=0"], "driver: wanted the name of one, such as backdoor, got none"),
        ([], "grid: wanted --driver and --grid, or a workdir that holds a grid, got"),
        ([TINY], "grid: wanted at least one flag and its values, got none"),
        ([TINY, "--grid=seed"], "grid: wanted name=a,b,c, each name once, got 'seed'"),
        ([TINY, "--grid=seed=0", "--grid=seed=1"], "grid: wanted name=a,b,c, each name once, got 'seed=1'"),
        ([TINY, "--grid=seed=0,0"], "grid: seed: wanted different values, got 0,0"),
        ([TINY, "--grid=seed=0", "--flag=seed=1"], "flag: wanted seed in the grid or fixed, got both"),
        ([TINY, "--grid=workdir=a,b"], "flag: wanted any but workdir"),
        ([TINY, "--grid=seed=0", "--cell=1"], "cell: wanted 0 to 0, got 1"),
        ([TINY, "--grid=seed=0", "--cell=-1"], "cell: wanted 0 to 0, got -1"),
        ([TINY, "--grid=seed=0", "--collect"], "collect: wanted cells with results in"),
        ([TINY, "--grid=seed=0", "--workdir=/proc/nowhere"], "workdir: wanted a place to write and link, got /proc/"),
        (["--grid_file=/nowhere.toml"], "grid_file: wanted TOML, cannot read /nowhere.toml"),
        (["--grid_file=/nowhere.toml", TINY], "grid_file: wanted it or driver, grid and flag, got both"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(call, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        call(*arguments)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("cells/*"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("driver = ", "wanted TOML, cannot read"),
        ('driver = "backdoor"\ngrids = 1', "wanted driver, [flags] and [grid] in"),
        ('driver = "backdoor"\n[grid]\nseed = 1', "wanted a list of values of seed, got 1"),
        ("driver = 5\n[grid]\nseed = [1]", "driver: wanted the name of one, such as backdoor, got 5"),
    ],
)
def test_bad_grid_file(tmp_path, text, message):
    (tmp_path / "grid.toml").write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)):
        grid.read_grid(None, [], [], str(tmp_path / "grid.toml"))


def test_another_grid_is_refused_with_the_difference(call, tmp_path):
    assert call(TINY, "--grid=seed=0,1", "--grid=attack=sig")[0] == 0
    before = (tmp_path / "grid.json").read_text()
    for arguments, message in (
        (["--grid=seed=1,0", "--grid=attack=sig"], "grid was {'seed': ['0', '1'], 'attack': ['sig']}, is {'seed': ["),
        (["--grid=attack=sig", "--grid=seed=0,1"], "is {'attack': ['sig'], 'seed': ['0', '1']}"),  # other numbers
        (["--grid=seed=0,1", "--flag=attack=sig"], "flags was {}, is {'attack': 'sig'}"),
    ):
        with pytest.raises(ValueError, match="holds another sweep: ") as error:
            call(TINY, *arguments)
        assert message in str(error.value)
    assert (tmp_path / "grid.json").read_text() == before
    assert call(TINY, "--grid=seed=0,1", "--grid=attack=sig")[0] == 0
    (tmp_path / "grid.json").write_text("{")
    with pytest.raises(ValueError, match=r"workdir: wanted a grid in .*grid.json, cannot read it"):
        call()


# claims


@pytest.mark.parametrize("before", ["free", "expired", "released", "retried"])
def test_one_taker_of_many_wins(tmp_path, before):
    """Fifty cells, four takers each, let loose together."""
    barrier, won = threading.Barrier(4), collections.Counter()

    def contend(worker):
        for number in range(50):
            barrier.wait()
            if claims.take(tmp_path / str(number), worker, 60):
                won[number, worker] += 1

    for number in range(50):
        folder = tmp_path / str(number)
        if before != "free":
            claims.append(folder, 1, state=claims.CLAIMED, worker="dead", timeout=5)
        if before == "expired":
            os.utime(folder / "1.json", (time.time() - 10,) * 2)
        elif before != "free":
            claims.append(folder, 2, state=before, worker="dead")
    threads = [threading.Thread(target=contend, args=(f"worker{index}",)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(won.values()) == 50
    assert {number for number, _ in won} == set(range(50))
    for number, worker in won:
        assert entries(tmp_path / str(number))[-1]["worker"] == worker


def test_what_is_held_done_or_failed_is_not_taken(tmp_path):
    claim = claims.take(tmp_path, "a", 5)
    assert claims.take(tmp_path, "b", 0.5) is None  # it is the holder's timeout that counts
    assert claim.finish(claims.FAILED, "why")
    assert claims.take(tmp_path, "b", 5) is None
    assert claims.retry(tmp_path, "b")
    assert not claims.retry(tmp_path, "b")
    assert claims.take(tmp_path, "b", 5).finish(claims.DONE)
    assert claims.take(tmp_path, "c", 5) is None
    assert claims.read(tmp_path).state == claims.DONE


def test_expiry_goes_by_the_clock_of_the_file_system(tmp_path, monkeypatch):
    claims.take(tmp_path, "a", 5)
    monkeypatch.setattr(time, "time", lambda: 1e12)
    assert claims.is_held(tmp_path, claims.read(tmp_path))
    os.utime(tmp_path / "1.json", (0, 0))
    assert not claims.is_held(tmp_path, claims.read(tmp_path))


def test_a_claim_is_renewed(tmp_path):
    with claims.take(tmp_path, "a", 0.8) as claim:
        for _ in range(10):
            time.sleep(0.2)
            assert claims.take(tmp_path, "b", 5) is None
        assert not claim.is_lost
    time.sleep(1)
    assert claims.take(tmp_path, "b", 5)
    assert not claim.finish(claims.DONE)  # too late
    assert states(tmp_path) == ["claimed", "claimed"]


def test_a_claim_that_cannot_be_renewed_is_given_up_before_others_take_it(tmp_path):
    with claims.take(tmp_path, "a", 1) as claim:
        (tmp_path / "1.json").rename(tmp_path / "away")
        started = time.monotonic()
        wait_for(lambda: claim.is_lost)
        assert time.monotonic() - started < 1


# workers


def test_forty_cells_and_two_workers_of_which_one_is_killed(tmp_path):
    workdir, count = tmp_path / "sweep", tmp_path / "count"
    seeds = ",".join(map(str, range(20)))
    arguments = [
        TINY, "--grid=attack=badnet,sig", f"--grid=seed={seeds}", f"--flag=count={count}", "--flag=seconds=0.05",
        f"--workdir={workdir}", "--claim_timeout=3",
    ]  # fmt: skip
    doomed, other = start(*arguments), start(*arguments)

    def held():
        """The running cell of the doomed worker, which stands still, with some cells done before."""
        doomed.send_signal(signal.SIGSTOP)
        for event, cell, _ in reversed(events(count)):
            last = claims.read(workdir / "claims" / cell)
            mine = f":{doomed.pid}:" in last.worker and last.state == claims.CLAIMED
            if mine and event == "start" and len(events(count)) > 20:
                return cell
        doomed.send_signal(signal.SIGCONT)
        return None

    cell = wait_for(held)
    doomed.kill()
    doomed.wait()
    output = other.communicate(timeout=60)[0]
    assert other.returncode == 0, output
    assert "40 of 40 cells done, 0 failed" in output
    logs = {path.name: entries(path) for path in (workdir / "claims").iterdir()}
    assert len(logs) == 40
    assert all(sum(entry["state"] == "done" for entry in log) == 1 for log in logs.values())
    assert [entry["state"] for entry in logs[cell]] == ["claimed", "claimed", "done"]
    assert f":{other.pid}:" in logs[cell][1]["worker"]
    # both worked, and nothing but what the dead one held was started twice
    workers = {log[-1]["worker"] for log in logs.values()}
    assert len(workers) == 2
    starts = collections.Counter(name for event, name, _ in events(count) if event == "start")
    assert starts == {name: 2 if name == cell else 1 for name in logs}
    assert all((workdir / "cells" / name / "results.json").exists() for name in logs)
    doomed.stdout.close()


def test_a_driver_dies_with_its_worker(sweep, tmp_path):
    code = "import os, subprocess, sys, time\n"
    code += "subprocess.Popen([sys.executable, '-c', sys.argv[1], str(os.getpid()), *sys.argv[2:]])\ntime.sleep(60)"
    driver = ["-m", "tests.tiny_driver", "--seconds=60", f"--count={tmp_path}/count", f"--workdir={tmp_path}"]
    parent = subprocess.Popen([sys.executable, "-c", code, sweep._START, *driver], cwd=ROOT)
    ((_, _, pid),) = wait_for(lambda: events(tmp_path / "count"))
    parent.kill()
    parent.wait()
    wait_for(lambda: not is_alive(pid), 10)


def test_sigterm_gives_the_cell_back_at_once(call, tmp_path):
    thread = while_running(tmp_path, lambda _: os.kill(os.getpid(), signal.SIGTERM))
    status, output = call(TINY, "--grid=seed=0", f"--flag=count={tmp_path}/count", "--flag=seconds=60")
    thread.join()
    assert status == 75
    assert output.splitlines()[-1] == "0 of 1 cells done, 0 failed"
    ((_, cell, driver),) = events(tmp_path / "count")
    assert not is_alive(driver)
    assert states(tmp_path / "claims" / cell) == ["claimed", "released"]
    assert claims.take(tmp_path / "claims" / cell, "next", 5)


@pytest.fixture
def worker(sweep, tmp_path):
    made = grid.Grid(
        "tests.tiny_driver", {"count": str(tmp_path / "count"), "seconds": "60"}, {"preemptible": ["true", "false"]}
    )
    return sweep.Worker(made, tmp_path, 1)


def while_running(tmp_path, act):
    """Acts, from another thread, once a driver has started."""

    def wait():
        act(wait_for(lambda: events(tmp_path / "count"))[-1])

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def test_a_lost_claim_kills_the_driver_and_drops_its_result(worker, tmp_path):
    folder = worker.log("preemptible=true")

    def take_over(_):
        # as a worker on another machine would that saw no renewal
        assert claims.append(folder, 2, state=claims.CLAIMED, worker="other", timeout=60)

    thread = while_running(tmp_path, take_over)
    started = time.monotonic()
    assert not worker._try("preemptible=true")
    assert time.monotonic() - started < 20
    thread.join()
    ((event, _, driver),) = events(tmp_path / "count")
    assert event == "start"
    assert not is_alive(driver)
    assert [entry["worker"] for entry in entries(folder)] == [worker.name, "other"]


def test_a_driver_that_ends_as_its_claim_is_lost_is_not_counted(worker, tmp_path, monkeypatch):
    folder = worker.log("preemptible=true")

    def late(name, claim):
        assert claims.append(folder, 2, state=claims.CLAIMED, worker="other", timeout=60)
        return claims.DONE, ""

    monkeypatch.setattr(worker, "_run", late)
    assert not worker._try("preemptible=true")
    assert states(folder) == ["claimed", "claimed"]


@pytest.mark.parametrize(
    ("preemptible", "number", "state"),
    [
        ("true", signal.SIGTERM, "released"),
        ("false", signal.SIGTERM, "released"),
        ("false", signal.SIGKILL, "failed"),  # as by the system when memory runs out
    ],
)
def test_a_preempted_driver_releases_its_cell(worker, tmp_path, preemptible, number, state):
    name = f"preemptible={preemptible}"
    thread = while_running(tmp_path, lambda event: os.kill(event[2], number))
    worker._try(name)
    thread.join()
    last = claims.read(worker.log(name))
    assert last.state == state
    assert last.error == ("killed by SIGKILL" if state == "failed" else "")
    assert bool(claims.take(worker.log(name), "next", 5)) == (state == "released")


def test_failed_cells_are_listed_and_retried(call, tmp_path):
    marker, count = tmp_path / "marker", tmp_path / "count"
    marker.touch()
    arguments = [TINY, "--grid=seed=0,1,2", f"--flag=fail_while={marker}", f"--flag=count={count}"]
    assert call(*arguments, "--cell=1")[0] == 1
    marker.unlink()
    for again in range(2):  # the second run finds nothing to do
        status, output = call()
        assert status == 1
        assert "2 of 3 cells done, 1 failed\n  seed=1: exit status 1: error: seed: wanted a better one" in output
        assert len(events(count)) == 5, again
    output = call("--list")[1]
    assert "   0 seed=0  done\n   1 seed=1  failed: exit status 1: error: seed: wanted a better one\n" in output
    status, output = call("--retry_failed")
    assert (status, output.splitlines()[-1]) == (0, "3 of 3 cells done, 0 failed")
    assert states(tmp_path / "claims" / "seed=1") == ["claimed", "failed", "retried", "claimed", "done"]
    assert sum(event == "end" for event, _, _ in events(count)) == 3


def test_the_index_of_a_job_array_chooses_the_cell(call, monkeypatch, tmp_path):
    arguments = [TINY, "--grid=seed=0,1,2", "--dry_run"]

    def seeds(*more):
        return [line.split("--seed=")[1][0] for line in call(*arguments, *more)[1].splitlines()]

    assert seeds() == ["0", "1", "2"]
    for variable in ("SLURM_ARRAY_TASK_ID", "JOB_COMPLETION_INDEX"):
        with monkeypatch.context() as context:
            context.setenv(variable, "2")
            assert seeds() == ["2"]
            assert seeds("--cell=0") == ["0"]
            for bad in ("3", "x", "-1"):
                context.setenv(variable, bad)
                with pytest.raises(ValueError, match=f"{variable}: wanted 0 to 2, got {bad}"):
                    call(*arguments)
    assert not list(tmp_path.iterdir())  # a dry run leaves nothing
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    assert call(*arguments[:2])[1].splitlines()[-1] == "1 of 1 cells done, 0 failed"
    assert [path.name for path in (tmp_path / "cells").iterdir()] == ["seed=1"]


def test_two_writers_on_one_cell(call, monkeypatch, tmp_path):
    arguments = [TINY, "--grid=seed=0,1"]
    folder = tmp_path / "claims" / "seed=1"
    held = claims.take(folder, "elsewhere:1:ab", 60)
    with pytest.raises(
        ValueError, match=r"cell: wanted a free one, got 1, claimed by elsewhere:1:ab, renewed \d s ago"
    ):
        call(*arguments, "--cell=1")
    assert "   1 seed=1  claimed by elsewhere:1:ab, renewed" in call("--list")[1]
    # a job that was requeued waits for the claim of its killed predecessor to end
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    threading.Timer(0.5, held.finish, (claims.RELEASED,)).start()
    assert call("--claim_timeout=1")[0] == 0
    assert states(folder) == ["claimed", "released", "claimed", "done"]


# results


def test_collect_makes_one_table_and_a_figure_a_flag(call, tmp_path):
    arguments = [TINY, "--grid=attack=badnet,sig", "--grid=seed=0,1", "--grid=seconds=0,0.01"]
    shared = ["--flag=coupling=topk_ccc,class_ccc"]
    for cell in range(7):
        call(*arguments, *shared, f"--cell={cell}")
    folder = tmp_path / "cells" / "attack=sig,seed=1,seconds=0.01"
    folder.mkdir()
    (folder / "results.json").write_text("half")  # of a driver that did not end
    output = call("--collect")[1]
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results["rows"]) == 14
    assert results["rows"][2]["cell"] == {"attack": "badnet", "seed": "0", "seconds": "0.01"}
    assert results["rows"][2]["auroc"] == 0.8
    assert results["rows"][-1]["asr"] is None
    assert results["missing"] == {"attack=sig,seed=1,seconds=0.01": "waiting"}
    lines = output.splitlines()
    assert lines[0].startswith("seconds  attack ")
    assert lines[4].startswith("0.01     badnet      gaussian     topk_ccc             0 0.900 1.000  0.800")
    (average,) = [line for line in lines if line.startswith("all      average     gaussian     topk_ccc ")]
    assert " 0.850 " in average  # of the cells whose attack does something: seeds 0 and 1
    assert lines[-2:] == ["1 of 8 cells are missing:", "  attack=sig,seed=1,seconds=0.01: waiting"]
    assert (tmp_path / "table.md").read_text() == f"```\n{output}```\n"
    assert all((tmp_path / f"{flag}.png").stat().st_size > 5000 for flag in ("attack", "seed", "seconds"))


def test_collect_takes_rows_of_any_driver(call, tmp_path):
    call(TINY, "--grid=attack=badnet,sig", "--flag=bare=true")
    output = call("--collect")[1].splitlines()
    assert output[0].split() == ["attack", "seed", "acc", "asr"]
    assert output[2].split() == ["badnet", "0", "0.9", "1"]
    assert (tmp_path / "attack.png").exists()


# job files


def stub(folder, name, text):
    """A command on PATH that notes its arguments and then does `text`."""
    path = folder / name
    path.write_text(f'#!/bin/bash\necho "$@" >> {folder}/{name}.calls\n{text}\n')
    path.chmod(0o755)
    return path


def run_job(path, tmp_path, **variables):
    known = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": sys.executable, **variables}
    return subprocess.run(
        ["bash", str(path)], cwd=ROOT, capture_output=True, text=True, env={**os.environ, **known}, timeout=60
    )


@pytest.fixture
def tiny_grid(tmp_path):
    path = tmp_path / "tiny.toml"
    path.write_text('driver = "tests.tiny_driver"\n[grid]\nseed = [0, 1]\n')
    return str(path)


@pytest.mark.parametrize("path", sorted(JOBS.glob("*.sh")), ids=lambda path: path.name)
def test_job_scripts_parse(path):
    subprocess.run(["bash", "-n", str(path)], check=True)
    text = path.read_text()
    assert not [line for line in text.splitlines() if line.startswith("#SBATCH") and "$" in line]


def test_slurm_job(call, monkeypatch, tmp_path, tiny_grid):
    workdir = str(tmp_path / "w")
    job = JOBS / "slurm.sh"
    python = str(stub(tmp_path, "python", ""))
    run_job(job, tmp_path, DRY_RUN="1", SLURM_ARRAY_TASK_ID="1", GRID_FILE=tiny_grid, WORKDIR=workdir, PYTHON=python)
    dash, module, *arguments = (tmp_path / "python.calls").read_text().split()
    assert (dash, module) == ("-m", "experiments.sweep")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    line = f"python -m tests.tiny_driver --seed=1 --workdir={workdir}/cells/seed=1\n"
    assert call(*arguments) == (0, line)
    # a worker that was preempted is queued again, one that failed is not
    stub(tmp_path, "scontrol", "")
    for status in (75, 1, 0):
        stub(tmp_path, "srun", f"exit {status}")
        done = run_job(job, tmp_path, SLURM_ARRAY_JOB_ID="7", SLURM_ARRAY_TASK_ID="1", GRID_FILE=tiny_grid)
        assert done.returncode == status
    assert (tmp_path / "scontrol.calls").read_text() == "requeue 7_1\n"
    expected = f"{sys.executable} -m experiments.sweep --grid_file={tiny_grid} --workdir=runs/sweep"
    assert (tmp_path / "srun.calls").read_text().splitlines() == [expected] * 3


def test_gke_jobset(call, monkeypatch, tmp_path):
    values = {"IMAGE": "image", "VOLUME_CLAIM": "claim", "NUM_CELLS": "4", "NUM_NODES": "2"}
    values["GRID_FILE"] = str(JOBS / "grid.toml")
    text = string.Template((JOBS / "gke-jobset.yaml").read_text()).substitute(values)  # as envsubst does
    jobset = yaml.safe_load(text)
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (job,) = jobset["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 4, 2)
    pod = spec["template"]["spec"]
    assert pod["restartPolicy"] == "Never"  # without which there is no podFailurePolicy
    (container,) = pod["containers"]
    rules = spec["podFailurePolicy"]["rules"]
    codes = {rule["onExitCodes"]["values"][0]: rule for rule in rules if "onExitCodes" in rule}
    assert codes.keys() == {75, 1}
    assert codes[75]["action"] == "Ignore"
    assert all(rule["onExitCodes"]["containerName"] == container["name"] for rule in codes.values())
    (mount,) = container["volumeMounts"]
    assert [volume["name"] for volume in pod["volumes"]] == [mount["name"]]
    *module, grid_file, workdir = container["command"]
    assert module == ["python", "-m", "experiments.sweep"]
    assert workdir.startswith(f"--workdir={mount['mountPath']}/")
    monkeypatch.setenv("JOB_COMPLETION_INDEX", str(spec["completions"] - 1))
    (line,) = call(grid_file, workdir, "--dry_run")[1].splitlines()
    driver = ["python", "-m", "experiments.backdoor", "--dataset=digits", "--num_draws=64", "--attack=sig", "--seed=1"]
    assert shlex.split(line) == [*driver, "--workdir=/shared/sweep/cells/attack=sig,seed=1"]
    assert not os.path.exists("/shared/sweep")


def test_tpu_queued_resource(tmp_path, tiny_grid):
    """Preempted once, when the worker has hardly begun."""
    state = tmp_path / "state"
    stub(
        tmp_path,
        "gcloud",
        f"""case "$*" in
          *" create "*) echo ACTIVE > {state} ;;
          *" describe "*) cat {state} ;;
          *" delete "*) rm {state} ;;
          *" ssh "*)
            if [[ ! -e {tmp_path}/preempted ]]; then touch {tmp_path}/preempted; echo SUSPENDED > {state}; exit 1; fi
            for last; do :; done
            bash -c "${{last#--command=}}" ;;
        esac""",
    )
    variables = {"ZONE": "zone", "SHARED": str(tmp_path), "GRID_FILE": tiny_grid, "POLL_SECONDS": "0"}
    job = JOBS / "tpu-queued-resource.sh"
    done = run_job(job, tmp_path, NAME="one", DRY_RUN="1", SETUP="cd .", **variables)
    assert done.returncode == 0, done.stderr
    commands = [f"python -m tests.tiny_driver --seed={k} --workdir={tmp_path}/sweep/cells/seed={k}" for k in (0, 1)]
    assert done.stdout.splitlines() == [*commands, "worker ended with 0"]
    calls = (tmp_path / "gcloud.calls").read_text().splitlines()
    what = [call.split()[3] for call in calls if " describe " not in call]
    assert what == ["create", "ssh", "delete", "create", "ssh", "delete"]
    assert all(" one --zone=zone" in call for call in calls)
    assert "--worker=all" in next(call for call in calls if " ssh " in call).split()
    # what another machine does not mend ends it
    done = run_job(job, tmp_path, SETUP="false", **variables)
    assert done.returncode == 1
    assert done.stdout == "worker ended with 1\n"
    for missing in ("ZONE", "SHARED"):
        done = run_job(job, tmp_path, **{**variables, missing: ""})
        assert done.returncode != 0
        assert f"{missing}: wanted" in done.stderr


def test_errors_take_one_line(tmp_path):
    done = start(TINY, "--grid=sed=0", f"--workdir={tmp_path}")
    output = done.communicate(timeout=30)[0]
    assert done.returncode == 1
    assert output.splitlines()[-1].startswith("error: grid: cell sed=0: Unknown command line flag 'sed'.")
    assert "Traceback" not in output
