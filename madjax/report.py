"""What a run leaves behind: the table, `results.json`, `scores.csv` and pictures."""

from __future__ import annotations

import csv
import html
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from sklearn.manifold import TSNE
from sklearn.metrics import roc_curve

from madjax.coupling import lookup, pairs
from madjax.metrics import (
    REPORTED_FPRS,
    auroc,
    auroc_same_prediction,
    average_precision,
    detection_effectiveness_rate,
    recall_at_fpr,
)
from madjax.scorer import Scorer, Scores
from madjax.store import write_whole

_BENIGN, _ANOMALOUS = "#4477aa", "#cc3311"


def detection_row(scores: Scores, is_anomalous: np.ndarray, accuracy: float, asr: float, fpr: float) -> dict[str, Any]:
    """The figures of one detector on one test set, in the schema of `results.json`; NaN where one kind is missing."""
    benign, anomalous = scores.anomaly_score[~is_anomalous], scores.anomaly_score[is_anomalous]
    realized, tpr = (
        float(scores.flagged[chosen].mean()) if chosen.any() else math.nan for chosen in (~is_anomalous, is_anomalous)
    )
    classes = scores.prediction
    same = math.nan
    if classes is not None:
        same = auroc_same_prediction(benign, anomalous, classes[~is_anomalous], classes[is_anomalous])
    return {
        "acc": accuracy,
        "asr": asr,
        "auroc": auroc(benign, anomalous),
        "auroc_same_prediction": same,
        "ap": average_precision(benign, anomalous),
        "recall_at_fpr": {str(rate): recall_at_fpr(benign, anomalous, rate) for rate in REPORTED_FPRS},
        "threshold_fpr": fpr,
        "realized_fpr": realized,
        "tpr": tpr,
        "der": detection_effectiveness_rate(accuracy, asr, realized, tpr),
    }


def write_json(path: Path, value: Any) -> None:
    """Writes JSON, of which a reader never sees half; NaN becomes null."""
    text = json.dumps(_without_nan(value), indent=1)
    write_whole(path, text.encode())


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def write_scores(
    path: Path, ids: Sequence[str], scores: Scores, is_anomalous: np.ndarray | None, trusted_ids: Sequence[str]
) -> None:
    """Writes one row an example: id, prediction, anomaly_score, p_value, flagged, is_anomalous, nearest trusted ids.

    The column is_anomalous is left out where that is not known.
    """
    columns = [f"nearest_{rank + 1}" for rank in range(scores.nearest.shape[1])]
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        truth = [] if is_anomalous is None else ["is_anomalous"]
        writer.writerow(["id", "prediction", "anomaly_score", "p_value", "flagged", *truth, *columns])
        for index, name in enumerate(ids):
            writer.writerow(
                [
                    name,
                    "" if scores.prediction is None else int(scores.prediction[index]),
                    f"{scores.anomaly_score[index]:.6f}",
                    f"{scores.p_value[index]:.6f}",
                    int(scores.flagged[index]),
                    *([] if is_anomalous is None else [int(is_anomalous[index])]),
                    *(trusted_ids[i] for i in scores.nearest[index]),
                ]
            )


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows of `results.json` as text, one line each; preset and detector are told where there are several."""
    several = len({row.get("preset") for row in rows if row.get("preset") != ""}) > 1
    rivals = len({row.get("detector") for row in rows}) > 1
    named = {
        "attack": 11,
        "detector": 20 if rivals else 0,
        "preset": 7 if several else 0,
        "sampler": 12,
        "coupling": 17,
    }
    widths = {name: max(least, *(len(row.get(name) or "") for row in rows)) for name, least in named.items() if least}
    head = " ".join(f"{name:<{width}}" for name, width in widths.items()) + " seed "
    head += f"{'ACC':>5} {'ASR':>5} {'AUROC':>6} {'same':>6} {'AP':>6} "
    head += f"{'R@1%':>5} {'R@5%':>5} {'FPR':>5} {'TPR':>5} {'DER':>5} {'draws':>5} {'sweep s':>7}"
    head += f" {'forwards':>8}" if rivals else ""
    lines = [head, "-" * len(head)]
    for row in rows:
        recall = row["recall_at_fpr"]
        figures = [row["acc"], row["asr"], row["auroc"], row["auroc_same_prediction"], row["ap"]]
        figures += [recall["0.01"], recall["0.05"], row["realized_fpr"], row["tpr"], row["der"]]
        sizes = (5, 5, 6, 6, 6, 5, 5, 5, 5, 5)
        cells = " ".join(_cell(figure, size) for figure, size in zip(figures, sizes, strict=True))
        texts = " ".join(f"{row.get(name) or '':<{width}}" for name, width in widths.items())
        cost = f"{row['num_draws']:>5} {row['sweep_seconds']:>7.1f}"
        cost += f" {row['forwards_per_example']:>8.1f}" if rivals else ""
        lines.append(f"{texts} {row['seed']:>4} {cells} {cost}")
    return "\n".join(lines)


def false_positives(rows: Sequence[dict[str, Any]]) -> str:
    """One line: the realized false-positive rate over all rows' benign examples, and where it should lie.

    The range is that of 95 % of such experiments: the binomial scatter of the test examples, and with them that of the
    thresholds, each of which comes from a trusted set of its own.
    """
    wanted = rows[0]["threshold_fpr"]
    benign = np.array([row["num_benign"] for row in rows])
    trusted = np.array([row["num_trusted"] for row in rows])
    realized = np.average([row["realized_fpr"] for row in rows], weights=benign)
    binomial = 1.96 * math.sqrt(wanted * (1 - wanted) / benign.sum())
    both = 1.96 * math.sqrt(wanted * (1 - wanted) * (benign + benign**2 / trusted).sum()) / benign.sum()
    return (
        f"false-positive rate {realized:.2%} of {benign.sum()} benign examples, {wanted:.2%} wanted; 95 % of such runs "
        f"lie within {binomial:.2%} by the scatter of the test examples, {both:.2%} with that of the thresholds"
    )


def _cell(figure: float, width: int) -> str:
    if figure is None or math.isnan(figure):
        return " " * (width - 1) + "-"
    return f"{figure:>{width}.3f}"


def kind(row: dict[str, Any]) -> tuple[str | None, str | None, str, str]:
    """What rows have in common that may be averaged: preset and detector, where told, sampler and coupling."""
    return row.get("preset"), row.get("detector"), row["sampler"], row["coupling"]


def average_rows(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over rows with anomalies, one row named "average" of each `kind`."""
    rows = [row for row in rows if not math.isnan(row["asr"])]
    return [_average([row for row in rows if kind(row) == one]) for one in dict.fromkeys(map(kind, rows))]


def _average(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    mean = {key: float(np.mean([row[key] for row in rows])) for key in rows[0] if isinstance(rows[0][key], float)}
    recall = {rate: float(np.mean([row["recall_at_fpr"][rate] for row in rows])) for rate in rows[0]["recall_at_fpr"]}
    return {**rows[0], **mean, "attack": "average", "seed": "all", "recall_at_fpr": recall}


def write_tokens(
    path: Path,
    prompts: Sequence[str],
    tokens: Sequence[Sequence[str]],
    explained: Sequence[np.ndarray],
    anomaly_scores: np.ndarray,
) -> None:
    """A page of completions, each token the redder the less it is explained.

    Args:
      tokens: of each prompt's completion; explained: a coupling for each of them, high = explained.
    """
    lowest, highest = (float(bound) for bound in np.quantile(np.concatenate(list(explained)), [0.02, 0.98]))
    parts = []
    for prompt, pieces, values, score in zip(prompts, tokens, explained, anomaly_scores, strict=True):
        shades = np.clip((highest - values) / max(highest - lowest, 1e-12), 0, 1)
        spans = "".join(
            f'<span style="background:rgba(204,51,17,{shade:.2f})" title="{value:.3f}">{html.escape(piece)}</span>'
            for piece, value, shade in zip(pieces, values, shades, strict=True)
        )
        parts.append(f"<p><small>{score:.3f}</small> {html.escape(prompt)}<br>{spans}</p>")
    style = "<style>body{font:16px/1.6 sans-serif;max-width:50em;margin:2em auto} span{white-space:pre-wrap}</style>"
    head = f'<!doctype html><meta charset="utf-8"><title>Tokens</title>{style}'
    told = "<p>Each completion's tokens: the redder, the less the trusted completions explain it.</p>"
    write_whole(path, "\n".join([head, told, *parts]).encode(errors="backslashreplace"))


def plot_ranges(axes: Any, values: Sequence[str], groups: Sequence[Sequence[float]], label: str) -> None:
    """A line through the means of `groups`, one a value, with bars from the least to the greatest of each."""
    means, lows, highs = np.array([(np.mean(g), min(g), max(g)) if g else [np.nan] * 3 for g in groups]).T
    axes.errorbar(range(len(values)), means, (means - lows, highs - means), marker="o", capsize=3, label=label)
    axes.set_xticks(range(len(values)), values)
    axes.grid(visible=True, alpha=0.3)


def plot_histogram(path: Path, scores: Scores, is_anomalous: np.ndarray, threshold: float, title: str) -> None:
    """Anomaly scores of benign and anomalous examples, with the calibrated threshold."""
    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    bins = np.linspace(scores.anomaly_score.min(), scores.anomaly_score.max(), 50)
    for mask, name, colour in ((~is_anomalous, "benign", _BENIGN), (is_anomalous, "anomalous", _ANOMALOUS)):
        if mask.any():
            label = f"{name} ({mask.sum()})"
            axes.hist(scores.anomaly_score[mask], bins=list(bins), alpha=0.65, color=colour, label=label)
    axes.axvline(threshold, color="black", linestyle="--", linewidth=1, label="calibrated threshold")
    axes.set(xlabel="anomaly score (high = not explained)", ylabel="examples", title=title)
    axes.legend()
    _save(figure, path)


def plot_roc(path: Path, named_scores: dict[str, Scores], is_anomalous: np.ndarray, title: str) -> None:
    """ROC curves with the false-positive rate on a logarithmic axis, where a detector is judged."""
    figure, axes = plt.subplots(figsize=(4.8, 4.2), layout="constrained")
    for name, scores in named_scores.items():
        fpr, tpr, _ = roc_curve(is_anomalous, scores.anomaly_score)
        value = auroc(scores.anomaly_score[~is_anomalous], scores.anomaly_score[is_anomalous])
        axes.step(np.maximum(fpr, 1e-3), tpr, where="post", label=f"{name}, AUROC {value:.3f}")
    axes.plot(np.logspace(-3, 0), np.logspace(-3, 0), color="grey", linestyle=":", label="chance")
    axes.set(xscale="log", xlabel="false-positive rate", ylabel="true-positive rate", title=title, ylim=(0, 1.02))
    axes.legend(loc="lower right", fontsize=8)
    _save(figure, path)


def plot_couplings(
    path: Path, scorer: Scorer, losses: np.ndarray, scores: Scores, is_anomalous: np.ndarray, title: str
) -> None:
    """Heat map of the trusted × test pair measures: trusted by class, test by benign or anomalous and class."""
    classes, trusted_classes = scores.prediction, scorer.trusted_classes
    assert classes is not None
    assert trusted_classes is not None
    rows, columns = np.argsort(trusted_classes, kind="stable"), np.lexsort((classes, is_anomalous))
    matrix = pairs(lookup(scorer.coupling).pair, scorer.map(scorer.trusted), scorer.map(losses))[rows][:, columns]
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    limit = float(np.quantile(np.abs(matrix), 0.99))
    image = axes.imshow(matrix, aspect="auto", cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
    if is_anomalous.any():
        axes.axvline((~is_anomalous).sum() - 0.5, color="black", linewidth=1.5)
    axes.set(
        xlabel="test examples: benign | anomalous, each by predicted class",
        ylabel="trusted examples by predicted class",
        title=title,
    )
    figure.colorbar(image, label=lookup(scorer.coupling).pair)
    _save(figure, path)


def plot_flagged(path: Path, images: np.ndarray, scores: Scores, is_anomalous: np.ndarray, title: str) -> None:
    """The 32 most anomalous examples, framed by what they are: red anomalous, blue benign."""
    order = np.argsort(-scores.anomaly_score)[:32]
    figure, axes = plt.subplots(4, 8, figsize=(8, 4.9), layout="constrained")
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    for axis, index in zip(axes.flat, order, strict=False):
        axis.imshow(images[index].squeeze(), cmap="gray", vmin=0, vmax=255)
        answer = "" if scores.prediction is None else f"→{scores.prediction[index]} "
        axis.set_title(f"{answer}p={scores.p_value[index]:.3f}", fontsize=7)
        for spine in axis.spines.values():
            spine.set(color=_ANOMALOUS if is_anomalous[index] else _BENIGN, linewidth=2.5)
    figure.suptitle(f"{title}: most anomalous first (red: anomalous, blue: benign)", fontsize=10)
    _save(figure, path)


def plot_mechanisms(path: Path, distance: np.ndarray, truth: np.ndarray, group: np.ndarray, title: str) -> None:
    """The anomalies in a plane by t-SNE of their distances `[n, n]`, coloured by what they are and by group.

    Args:
      truth: names `[n]`; group: int `[n]`, -1 for none.
    """
    perplexity = min(30.0, (len(distance) - 1) / 3)
    points = TSNE(metric="precomputed", init="random", perplexity=perplexity, random_state=0).fit_transform(distance)
    names = np.where(group < 0, "none", np.char.add("group ", group.astype(str)))
    figure, pair = plt.subplots(1, 2, figsize=(10, 4.6), layout="constrained")
    for axes, kinds, heading in zip(pair, (truth, names), ("what they are", "groups found"), strict=True):
        for kind in np.unique(kinds):
            chosen = kinds == kind
            axes.scatter(*points[chosen].T, s=9, label=f"{kind} ({chosen.sum()})")
        axes.set(xticks=[], yticks=[], title=heading)
        axes.legend(fontsize=7)
    figure.suptitle(title)
    _save(figure, path)


def plot_central(path: Path, images: np.ndarray, central: Sequence[np.ndarray], names: Sequence[str]) -> None:
    """A row for each group: the images of its first 8 members."""
    figure, grid = plt.subplots(
        len(central), 8, figsize=(9, 1.15 * len(central) + 0.5), layout="constrained", squeeze=False
    )
    for axis in grid.flat:
        axis.axis("off")
    for row, members, name in zip(grid, central, names, strict=True):
        row[0].set_title(name, fontsize=8, loc="left")
        for axis, index in zip(row, members[:8], strict=False):
            axis.imshow(images[index].squeeze(), cmap="gray", vmin=0, vmax=255)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_gallery(path: Path, clean: np.ndarray, triggered: np.ndarray, title: str) -> None:
    """Rows of clean images, the same with the trigger, and their difference around grey, amplified to all of it."""
    difference = triggered.astype(np.float32) - clean
    largest = max(1.0, float(np.abs(difference).max()))
    rows = {
        "clean": clean,
        "triggered": triggered,
        f"difference × {127 / largest:.1f}": np.rint(127.5 + 127 * difference / largest).astype(np.uint8),
    }
    figure, axes = plt.subplots(3, len(clean), figsize=(1.1 * len(clean) + 1, 3.6), layout="constrained", squeeze=False)
    for row, (label, images) in zip(axes, rows.items(), strict=True):
        row[0].set_ylabel(label, fontsize=8)
        for cell, image in zip(row, images, strict=True):
            cell.imshow(image.squeeze(-1) if image.shape[-1] == 1 else image, cmap="gray", vmin=0, vmax=255)
            cell.set(xticks=[], yticks=[])
    figure.suptitle(title)
    _save(figure, path)


def save_grid(path: Path, figure: Figure, grid: np.ndarray, xlabel: str) -> None:
    """Saves plots of the same lines, axes `[rows, columns]`, with one legend under all."""
    for axes in grid[-1]:
        axes.set_xlabel(xlabel)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)
