"""A grid of a driver's flags: read from flags or TOML, expanded to named cells, checked by the driver, kept."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments import claims

# Parses the flags of all cells with the driver's own definitions: in a process of its own, for two drivers may define
# one flag, and because the worker must not hold the accelerator.
_CHECK = """
import importlib, json, sys
from absl import flags
def refuse(*words):
    print(*words)
    sys.exit(1)
driver, cells = json.load(sys.stdin)
try:
    importlib.import_module(driver)
except Exception as error:
    refuse(f"driver: wanted a module that can be imported, got {driver} ({error})")
if "workdir" not in flags.FLAGS:
    refuse(f"driver: wanted one with a flag workdir, {driver} has none")
for name, arguments in cells:
    flags.FLAGS.unparse_flags()
    try:
        flags.FLAGS([driver, *arguments])
    except flags.Error as error:
        refuse(f"grid: cell {name}:", *str(error).split())
"""


@dataclasses.dataclass(frozen=True)
class Grid:
    """The driver's module, the flags that all cells share, and the values of those that vary.

    >>> list(Grid("experiments.backdoor", {}, {"attack": ["badnet", "sig"], "seed": ["0"]}).cells)
    ['attack=badnet,seed=0', 'attack=sig,seed=0']
    """

    driver: str
    flags: dict[str, str]
    grid: dict[str, list[str]]

    @functools.cached_property
    def cells(self) -> dict[str, dict[str, str]]:
        """The combinations by name, in their order: the last flag varies fastest."""
        cells = [dict(zip(self.grid, values, strict=True)) for values in itertools.product(*self.grid.values())]
        return {cell_name(cell): cell for cell in cells}

    def arguments(self, name: str, workdir: Path) -> list[str]:
        """What the driver of a cell is started with."""
        values = {**self.flags, **self.cells[name], "workdir": str(workdir / "cells" / name)}
        return [f"--{flag}={value}" for flag, value in values.items()]


def cell_name(cell: dict[str, str]) -> str:
    """A name that is safe for files and no other cell has: readable, with a hash where a value had to be altered.

    >>> cell_name({"dataset": "data/x.npz", "seed": "0"})
    'dataset=data_x.npz,seed=0-a5447fc7'
    """
    text = ",".join(f"{flag}={value}" for flag, value in cell.items())
    # without commas and equals signs in values a name can be read in one way only
    safe = ",".join(f"{flag}={re.sub(r'[^A-Za-z0-9_.+-]', '_', value)}" for flag, value in cell.items())[:100]
    return text if safe == text else f"{safe}-{hashlib.sha256(json.dumps(cell).encode()).hexdigest()[:8]}"


def read_grid(driver: str | None, grid: Sequence[str], shared: Sequence[str], grid_file: str | None) -> Grid | None:
    """The grid that the flags of those names describe; None where they are not given."""
    if not (driver or grid or shared or grid_file):
        return None
    if grid_file:
        if driver or grid or shared:
            raise ValueError("grid_file: wanted it or driver, grid and flag, got both")
        driver, axes, fixed = _read_toml(Path(grid_file))
    else:
        axes = {flag: text.split(",") for flag, text in _pairs("grid", grid, "name=a,b,c").items()}
        fixed = _pairs("flag", shared, "name=value")
    if not driver or not isinstance(driver, str):
        raise ValueError(f"driver: wanted the name of one, such as backdoor, got {driver or 'none'}")
    if not axes:
        raise ValueError("grid: wanted at least one flag and its values, got none")
    for flag, values in axes.items():
        if not values or len(set(values)) < len(values):
            raise ValueError(f"grid: {flag}: wanted different values, got {','.join(values) or 'none'}")
        if flag in fixed:
            raise ValueError(f"flag: wanted {flag} in the grid or fixed, got both")
    if "workdir" in axes | fixed:
        raise ValueError("flag: wanted any but workdir, which is made from the sweep's own, got workdir")
    return Grid(driver if "." in driver else f"experiments.{driver}", fixed, axes)


def _pairs(name: str, texts: Sequence[str], form: str) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for text in texts:
        flag, equals, value = text.partition("=")
        if not flag or not equals or flag in pairs:
            raise ValueError(f"{name}: wanted {form}, each name once, got {text!r}")
        pairs[flag] = value
    return pairs


def _read_toml(path: Path) -> tuple[str | None, dict[str, list[str]], dict[str, str]]:
    try:
        content = tomllib.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"grid_file: wanted TOML, cannot read {path} ({error})") from error
    unknown = content.keys() - {"driver", "flags", "grid"}
    grid, fixed = content.get("grid", {}), content.get("flags", {})
    if unknown or not isinstance(grid, dict) or not isinstance(fixed, dict):
        raise ValueError(f"grid_file: wanted driver, [flags] and [grid] in {path}, got {', '.join(content)}")
    for flag, values in grid.items():
        if not isinstance(values, list):
            raise ValueError(f"grid_file: wanted a list of values of {flag}, got {values!r}")
    axes = {flag: [_text(value) for value in values] for flag, values in grid.items()}
    return content.get("driver"), axes, {flag: _text(value) for flag, value in fixed.items()}


def _text(value: Any) -> str:
    """A TOML value as absl reads it; a list is one value of a flag that takes several."""
    if isinstance(value, list):
        return ",".join(map(_text, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def open_grid(given: Grid | None, workdir: Path, keep: bool) -> Grid:
    """The grid of a work directory: the one kept there, or the given one, checked and, if wanted, kept.

    Raises:
      ValueError: where there is none, the given one differs from the kept one, or the driver refuses a flag.
    """
    path = workdir / "grid.json"
    if given is None and not path.exists():
        raise ValueError(f"grid: wanted --driver and --grid, or a workdir that holds a grid, got {workdir}")
    if given is not None and not path.exists():
        _check(given, workdir)
        if not keep or claims.publish(path, dataclasses.asdict(given)):
            return given
    try:
        kept = Grid(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"workdir: wanted a grid in {path}, cannot read it ({error})") from error
    # as text: dictionaries compare without order, and order numbers the cells
    old, new = dataclasses.asdict(kept), dataclasses.asdict(given or kept)
    different = [f"{name} was {old[name]}, is {new[name]}" for name in old if str(old[name]) != str(new[name])]
    if different:
        raise ValueError(f"workdir: {workdir} holds another sweep: {'; '.join(different)}")
    return kept


def _check(grid: Grid, workdir: Path) -> None:
    cells = [(name, grid.arguments(name, workdir)) for name in grid.cells]
    text = json.dumps([grid.driver, cells])
    done = subprocess.run([sys.executable, "-c", _CHECK], input=text, capture_output=True, text=True)
    if done.returncode:
        lines = (done.stdout or done.stderr).strip().splitlines()
        raise ValueError(lines[-1] if lines else f"driver: {grid.driver} ended with {done.returncode} when imported")
