"""The results of a sweep's cells as one table, one file and one figure a flag."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from experiments import claims
from experiments.grid import Grid
from madjax import report

# what the table of `report` needs; its first columns need no repetition
_SHOWN = ("attack", "sampler", "coupling", "seed")
_NEEDED = {*_SHOWN, "acc", "asr", "auroc", "auroc_same_prediction", "ap", "recall_at_fpr", "realized_fpr", "tpr", "der"}


def collect(workdir: Path, grid: Grid, states: dict[str, str]) -> str:
    """Writes results.json, table.md and <flag>.png, and returns the table with what is missing beneath.

    Args:
      states: what became of each cell; only those that are done count.

    Raises:
      ValueError: where no cell has results.
    """
    rows: list[dict[str, Any]] = []
    missing: dict[str, str] = {}
    for name, cell in grid.cells.items():
        path = workdir / "cells" / name / "results.json"
        if states[name] != claims.DONE:
            missing[name] = states[name]
        elif not path.exists():
            missing[name] = "done, but its driver wrote no results.json"
        else:
            rows += [{"cell": cell, **_with_nan(row)} for row in json.loads(path.read_text())["rows"]]
    if not rows:
        raise ValueError(f"collect: wanted cells with results in {workdir}, got none of {len(grid.cells)}")
    text = _table(rows, list(grid.grid))
    if missing:
        text += f"\n\n{len(missing)} of {len(grid.cells)} cells are missing:"
        text += "".join(f"\n  {name}: {state}" for name, state in missing.items())
    report.write_json(workdir / "results.json", {"config": dataclasses.asdict(grid), "rows": rows, "missing": missing})
    (workdir / "table.md").write_text(f"```\n{text}\n```\n")
    for flag, values in grid.grid.items():
        if len(values) > 1:
            _plot(workdir / f"{flag}.png", flag, values, rows)
    return text


def _with_nan(row: dict[str, Any]) -> dict[str, Any]:
    """A row with NaN again where JSON has null, but for settings that were not given."""
    return {key: math.nan if value is None and key in _NEEDED else value for key, value in row.items()}


def _table(rows: list[dict[str, Any]], names: list[str]) -> str:
    if not all(row.keys() >= _NEEDED for row in rows):
        columns = [key for key in rows[0] if not isinstance(rows[0][key], dict | list) and key not in names]
        cells = [[row["cell"][name] for name in names] + [row.get(key, "") for key in columns] for row in rows]
        return "\n".join(_align([[*names, *columns], *cells]))
    kept = set.intersection(*map(set, rows))  # chains alone have some figures, which nothing averages then
    averages = report.average_rows([{key: value for key, value in row.items() if key in kept} for row in rows])
    averages = [{**row, "cell": dict.fromkeys(names, "all")} for row in averages]
    right = report.table([*rows, *averages]).splitlines()
    names = [name for name in names if name not in (*_SHOWN, "preset")]
    if not names:
        return "\n".join(right)
    left = _align([names, *([row["cell"][name] for name in names] for row in [*rows, *averages])])
    return "\n".join(f"{a}  {b}" for a, b in zip(left, right, strict=True))


def _align(cells: Sequence[Sequence[Any]]) -> list[str]:
    """Lines of columns of equal width; a rule under the first."""
    texts = [[f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row] for row in cells]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) for row in texts]
    return [lines[0], "-" * len(lines[0]), *lines[1:]]


def _plot(path: Path, flag: str, values: list[str], rows: list[dict[str, Any]]) -> None:
    """Mean and range of two figures by the values of one flag, over all that the other flags take."""
    keys = [key for key in ("auroc", "der", "acc", "asr") if all(key in row for row in rows)][:2]
    if not keys:
        return
    figure, axes = plt.subplots(1, len(keys), figsize=(4.5 * len(keys), 3.4), layout="constrained", squeeze=False)
    for axis, key in zip(axes[0], keys, strict=True):
        for kind in dict.fromkeys(map(_kind, rows)):
            shown = [
                [row[key] for row in rows if (_kind(row), row["cell"][flag]) == (kind, value) and not _is_nan(row[key])]
                for value in values
            ]
            report.plot_ranges(axis, values, shown, kind)
        axis.set(xlabel=flag, ylabel=key)
    if any(map(_kind, rows)):
        axes[0, 0].legend(fontsize=8)
    figure.suptitle("mean and range over all other flags", fontsize=9)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _kind(row: dict[str, Any]) -> str:
    if row.get("detector", "functional") != "functional":
        return row["detector"]
    return " ".join(row[key] for key in ("preset", "sampler", "coupling") if row.get(key))


def _is_nan(value: Any) -> bool:
    return value is None or math.isnan(value)
