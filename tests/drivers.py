"""Drivers as a user runs them, and in this process."""

import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

from absl import flags

ROOT = Path(__file__).parents[1]


def run(module, *flags, expect=0):
    """Runs a driver in a process of its own."""
    command = [sys.executable, "-m", f"experiments.{module}", *flags]
    variables = {**os.environ, "MPLBACKEND": "Agg"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=variables)
    assert done.returncode == expect, done.stderr[-3000:]
    return done


@contextmanager
def own_flags():
    """Drivers that are imported inside go again, and their flags, for other drivers define the same."""
    before, modules = set(flags.FLAGS), set(sys.modules)
    yield
    for name in set(flags.FLAGS) - before:
        delattr(flags.FLAGS, name)
    for name in set(sys.modules) - modules:
        if name.startswith("experiments.") and hasattr(sys.modules[name], "main"):
            del sys.modules[name]
