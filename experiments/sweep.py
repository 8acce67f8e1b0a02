r"""Sweeps: a grid of any driver's flags, worked off by any number of workers that share a file system.

    python -m experiments.sweep --driver=backdoor --grid=attack=badnet,sig --grid=seed=0,1 --flag=num_draws=64
    python -m experiments.sweep --grid_file=experiments/jobs/grid.toml     # driver, [flags], [grid]
    python -m experiments.sweep --workdir=runs/sweep                # one more worker, on any machine
    python -m experiments.sweep --workdir=runs/sweep --cell=3       # cell 3 alone; or by the index of a job array
    python -m experiments.sweep --workdir=runs/sweep --list         # the cells and what became of them
    python -m experiments.sweep --workdir=runs/sweep --retry_failed
    python -m experiments.sweep --workdir=runs/sweep --collect      # table.md, results.json and a figure a flag

Add --dry_run to see the commands. A cell is one combination of the grid's values; the last flag varies fastest. Its
driver runs as a process of its own, with --workdir=WORKDIR/cells/NAME, thus resumes what an earlier one left there.
WORKDIR/grid.json keeps the grid, WORKDIR/claims/NAME says who works on the cell (see experiments.claims) and holds the
driver's log.txt. The cell of a worker that died is free again after --claim_timeout. A worker leaves once every cell is
done or failed: exit status 0, or 1 where some failed. SIGTERM is passed on to the driver; then the worker gives its
cell back at once and ends with 75, as drivers do that were preempted.

Example jobs for SLURM, GKE and TPU VMs are in experiments/jobs.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from experiments import claims, collect, common
from experiments.grid import Grid, open_grid, read_grid

flags.DEFINE_string("driver", None, "Driver: backdoor, or package.module of another program with absl flags.")
flags.DEFINE_multi_string("grid", [], "A flag of the driver and its values: name=a,b,c. Repeat it for more flags.")
flags.DEFINE_multi_string("flag", [], "A flag that all cells share: name=value. Repeat it for more flags.")
flags.DEFINE_string("grid_file", None, "Instead: TOML with driver, [flags] and [grid]. Values may hold commas.")
flags.DEFINE_string("workdir", "runs/sweep", "Folder of the sweep, on a file system that all workers share.")
flags.DEFINE_integer("cell", None, "The one cell to run; SLURM_ARRAY_TASK_ID or JOB_COMPLETION_INDEX if not given.")
flags.DEFINE_float("claim_timeout", 300, "Seconds after which the cell of a silent worker is free.", lower_bound=0.5)
flags.DEFINE_bool("retry_failed", False, "Run cells again that failed.")
flags.DEFINE_bool("list", False, "Print the cells, and run nothing.")
flags.DEFINE_bool("dry_run", False, "Print the commands, and run nothing.")
flags.DEFINE_bool("collect", False, "Join the results of the cells that are done, and run nothing.")

_ARRAY_INDICES = ("SLURM_ARRAY_TASK_ID", "JOB_COMPLETION_INDEX")

# Starts the driver so that Linux kills it when its worker is killed: an orphan would go on writing beside the next
# holder of its cell. Elsewhere an orphan does so, but no outcome is written for it.
_START = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != int(sys.argv[1]):
        sys.exit(1)
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


class Worker:
    """Takes cells, one after the other, and runs their drivers."""

    def __init__(self, grid: Grid, workdir: Path, timeout: float):
        self.grid, self.workdir, self.timeout = grid, workdir, timeout
        self.name = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
        self.stopping = False

    def stop(self, *_: object) -> None:
        """Asks the worker to end; for signals."""
        self.stopping = True

    def work(self, names: Sequence[str]) -> None:
        """Returns when all these cells have an outcome, or soon after `stop`."""
        while not self.stopping:
            remaining = [name for name in names if not claims.read(self.log(name)).has_outcome]
            if not remaining:
                return
            tried = [self._try(name) for name in remaining]
            if not any(tried):  # others hold what is left: theirs may yet be released or expire
                deadline = time.monotonic() + min(self.timeout / 4, 10)
                while not self.stopping and time.monotonic() < deadline:
                    time.sleep(0.1)

    def log(self, name: str) -> Path:
        """The folder of a cell's claims."""
        return self.workdir / "claims" / name

    def _try(self, name: str) -> bool:
        """Runs a cell if it can be had; returns whether it got an outcome."""
        if self.stopping or not (claim := claims.take(self.log(name), self.name, self.timeout)):
            return False
        start = time.monotonic()
        with claim:
            state, error = self._run(name, claim)
            if state == "lost" or not claim.finish(state, error):
                state, error = "lost", "another worker took the cell, or the file system did not answer"
        print(f"{name}: {state}{error and ': '}{error} ({time.monotonic() - start:.0f} s)", flush=True)
        return state in (claims.DONE, claims.FAILED)

    def _run(self, name: str, claim: claims.Claim) -> tuple[str, str]:
        arguments = ["-m", self.grid.driver, *self.grid.arguments(name, self.workdir)]
        with (claim.folder / "log.txt").open("a+", errors="replace") as log:
            log.write(f"\n{self.name}: {shlex.join(arguments)}\n")
            log.flush()
            start = log.tell()
            child = subprocess.Popen(
                [sys.executable, "-c", _START, str(os.getpid()), *arguments],
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # to kill its children with it, and so that Ctrl-C reaches it through here
                env={"TQDM_MININTERVAL": "30", **os.environ},
            )
            told = False
            while child.poll() is None:
                if claim.is_lost:
                    os.killpg(child.pid, signal.SIGKILL)
                    child.wait()
                    return "lost", ""
                if self.stopping and not told:
                    told = True
                    child.terminate()
                time.sleep(0.05)
            if child.returncode == 0:
                return claims.DONE, ""
            # where a machine is taken away, SIGTERM may reach the driver before it reaches this process
            if self.stopping or child.returncode in (common.PREEMPTED, -signal.SIGTERM):
                return claims.RELEASED, ""
            log.seek(start)
            lines = [line.strip() for line in re.split(r"[\r\n]", log.read()) if line.strip()]
        how = f"exit status {child.returncode}"
        if child.returncode < 0:
            how = f"killed by {signal.Signals(-child.returncode).name}"
        return claims.FAILED, f"{how}: {lines[-1][-300:]}" if lines else how


def _chosen(names: list[str]) -> tuple[list[str], bool]:
    """The cells to run, and whether a person named one."""
    source, index = "cell", flags.FLAGS.cell
    for variable in _ARRAY_INDICES:
        if index is None and variable in os.environ:
            source, index = variable, os.environ[variable]
    if index is None:
        return names, False
    if not str(index).isdecimal() or int(index) >= len(names):
        raise ValueError(f"{source}: wanted 0 to {len(names) - 1}, got {index}")
    return [names[int(index)]], source == "cell"


def _describe(folder: Path) -> str:
    entry = claims.read(folder)
    if entry.state == claims.CLAIMED:
        seconds = claims.age(folder, entry)
        expired = " expired," if seconds > entry.timeout else ""
        return f"claimed by {entry.worker},{expired} renewed {seconds:.0f} s ago"
    return f"{entry.state}: {entry.error}" if entry.error else entry.state


def main() -> None:
    """Runs cells, or says what there is."""
    values = flags.FLAGS
    given = read_grid(values.driver, values.grid, values.flag, values.grid_file)
    workdir = common.local_folder(values.workdir)
    runs_nothing = values.dry_run or values.list or values.collect
    grid = open_grid(given, workdir, keep=not runs_nothing)
    names = list(grid.cells)
    worker = Worker(grid, workdir, values.claim_timeout)
    states = {name: _describe(worker.log(name)) for name in names} if values.list or values.collect else {}
    if values.list:
        print("\n".join(f"{index:>4} {name}  {states[name]}" for index, name in enumerate(names)))
        return
    if values.collect:
        print(collect.collect(workdir, grid, states))
        return
    names, by_hand = _chosen(names)
    if values.dry_run:
        for name in names:
            print(shlex.join(["python", "-m", grid.driver, *grid.arguments(name, workdir)]))
        return
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, worker.stop)
    for name in names if values.retry_failed else []:
        claims.retry(worker.log(name), worker.name)
    # a job array waits where a person is refused: a job that was requeued may find its own claim, not yet expired
    if by_hand and claims.is_held(worker.log(names[0]), claims.read(worker.log(names[0]))):
        raise ValueError(f"cell: wanted a free one, got {values.cell}, {_describe(worker.log(names[0]))}")
    worker.work(names)
    ended = [claims.read(worker.log(name)) for name in names]
    num_done = sum(entry.state == claims.DONE for entry in ended)
    pairs = zip(names, ended, strict=True)
    failed = [f"  {name}: {entry.error}" for name, entry in pairs if entry.state == claims.FAILED]
    print("\n".join([f"{num_done} of {len(names)} cells done, {len(failed)} failed", *failed]))
    if worker.stopping and num_done + len(failed) < len(names):
        sys.exit(common.PREEMPTED)
    sys.exit(int(bool(failed)))


if __name__ == "__main__":
    common.run(main)
