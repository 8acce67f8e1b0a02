r"""Scores the inputs of your own model: which outputs do your trusted examples not explain?

    madjax-score --architecture=wrn16_1 --checkpoint=model.pth --normalization=cifar10 \
        --trusted=trusted.npz --test=test.npz --workdir=runs/score

or python -m experiments.score. trusted.npz and test.npz hold `image`, uint8 [n, height, width, channels], and may hold
`id`. test.npz may hold `is_anomalous`, where it is known: then results.json tells how well the detector did, and with
`label` how right the model is. A model of another architecture comes as --loss_fn=package.module:function, your own
code, which is called with --checkpoint and returns (loss_fn, params), for instance from `madjax.from_nnx`.

Draws, a tangent and features judge together (`madjax.Ensemble`; features only of a model of from_nnx or from_linen);
`--preset=default` asks the draws alone. With batch among the presets all test examples are held against each other as
well (`madjax.batch`), which finds more where there are several anomalies of a kind, and scores-batch.csv says what
comes of it. `--detector=functional,mahalanobis,strip` asks rivals as well, which need a model of from_nnx or
from_linen.

Writes config.json, pictures, scores.csv and, for further detectors, scores-<detector>.csv: id, prediction,
anomaly_score, p_value, flagged, three nearest trusted ids. The detector is kept in detector/, and a second run with the
same flags and trusted examples does not fit again. The losses lie in fit/ and test-<hash>/ (`madjax.open_traces`); a
run that was interrupted goes on from there. A tangent has folders of its own, detector-tangent/ and so on.
"""

from __future__ import annotations

import hashlib
import importlib
import math
import os
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import flags

from experiments import common, detection
from madjax import Detector, batch, from_nnx, hosts, report
from madjax.coupling import TOP_K
from madjax.data import parse_normalization
from madjax.data.npz import read_npz
from madjax.interop.guard import shown
from madjax.interop.weights import load_weights
from madjax.models import MODELS, from_torch
from madjax.scorer import Scores

flags.DEFINE_string("architecture", None, f"{', '.join(MODELS)} or wrn<depth>_<width>.")
flags.DEFINE_string("loss_fn", None, "Instead of --architecture: package.module:function, called with --checkpoint.")
flags.DEFINE_string("checkpoint", None, "Weights: torch, safetensors or orbax. Nothing in the file is executed.")
common.define_checked(
    "normalization", "none", parse_normalization, "none (x / 255), a data set's name, or m1,m2,m3/s1,s2,s3."
)
flags.DEFINE_string("trusted", None, "npz of examples that the usual mechanism explains.")
flags.DEFINE_string("sampling", None, "npz of examples with true labels, for chains alone.")
flags.DEFINE_string("test", None, "npz of examples to score.")
flags.DEFINE_integer("seed", 0, "Seed of the draws.", lower_bound=0)
flags.DEFINE_string("workdir", "runs/score", "Folder for results.")
detection.define_presets(["default", "tangent", "knn"], ["default", "tangent", "knn", "batch"])
detection.define_detectors()
detection.define_flags()

# how often a trigger works cannot be told from those that do
_UNKNOWN = {"accuracy": math.nan, "asr": math.nan}

_OWN_FLAGS = ["architecture", "loss_fn", "checkpoint", "normalization", "trusted", "sampling", "seed", "preset"]
_OWN_FLAGS += ["detector"]


class _Judged(NamedTuple):
    """What a file of scores is written from; the threshold is a coupling."""

    name: str
    row: dict[str, Any]
    scores: Scores
    threshold: float


def main() -> None:
    """Fits, or reads what was fitted, and scores."""
    values = flags.FLAGS
    for name in ("checkpoint", "trusted", "test"):
        if not values[name].value:
            raise ValueError(f"{name}: wanted a path, got none")
    if bool(values.architecture) == bool(values.loss_fn):
        raise ValueError("architecture: wanted it or loss_fn, one of the two")
    trusted, test = (_read(name, values[name].value) for name in ("trusted", "test"))
    if "batch" in values.preset and len(test["image"]) <= TOP_K:
        raise ValueError(f"test: wanted {TOP_K + 1} images at least to score as a batch, got {len(test['image'])}")
    sampling = _sampling()
    loss_fn, params = _model(trusted["image"].shape[1:])
    names = [*_OWN_FLAGS, *detection.flag_names()]
    digest = hashlib.sha256(np.ascontiguousarray(trusted["image"]).data).hexdigest()
    workdir, config = common.open_workdir(values.workdir, names, {"trusted_sha256": digest})
    is_anomalous = test.get("is_anomalous", np.zeros(len(test["image"]), bool))
    rows, judged = [], []
    if detection.FUNCTIONAL in values.detector:
        rows, judged = _ours(workdir, loss_fn, params, trusted["image"], sampling, test["image"], is_anomalous)
        for row in rows:
            row["acc"] = _accuracy(judged[0].scores, test)
    if not hosts.is_first():
        return
    known = {row["detector"] for row in rows}
    names = [name for name in values.detector if name not in known]
    for rival in detection.fit_rivals(loss_fn, params, {"image": trusted["image"]}, names):
        row, scores = detection.rival_row(
            "unknown", values.seed, rival, {"image": test["image"]}, is_anomalous, **_UNKNOWN
        )
        row["acc"] = _accuracy(scores, test)
        rows.append(row)
        judged.append(_Judged(rival.name, row, scores, rival.baseline.threshold()))
    ids = list(map(str, test["id"])), list(map(str, trusted["id"]))
    for name, row, scores, threshold in judged:
        first = row is rows[0]
        path = workdir / ("scores.csv" if first else f"scores-{name}.csv")
        report.write_scores(path, ids[0], scores, test.get("is_anomalous"), ids[1])
        if first:
            title = name if name != detection.FUNCTIONAL else row["coupling"]
            report.plot_histogram(workdir / "histogram.png", scores, is_anomalous, -threshold, title)
            report.plot_flagged(workdir / "flagged.png", test["image"], scores, is_anomalous, "least explained")
        print(f"{name}: {scores.flagged.sum()} of {len(scores.flagged)} flagged at {values.fpr:.1%}")
    if "is_anomalous" in test:
        report.write_json(workdir / "results.json", {"config": config, "device": common.device(), "rows": rows})
        print(report.table(rows))
    print(f"results in {workdir}")


def _ours(
    workdir: Path,
    loss_fn: Any,
    params: Any,
    trusted: np.ndarray,
    sampling: dict[str, np.ndarray] | None,
    images: np.ndarray,
    is_anomalous: np.ndarray,
) -> tuple[list[dict[str, Any]], list[_Judged]]:
    """Rows, and what is written; detectors are fitted, or read from `workdir`, and all hosts take part."""
    values = flags.FLAGS
    # one host reads all of them for this, and the others only those that they sweep
    digest = hosts.first(hashlib.sha256(np.ascontiguousarray(images).data).hexdigest()[:12] if hosts.is_first() else "")
    ours, swept = {}, []
    for settings in map(detection.settings_from_flags, detection.with_draws(values.preset)):
        start, suffix = time.perf_counter(), "" if settings.preset == "default" else f"-{settings.preset}"
        detector = _detector(workdir, suffix, settings, loss_fn, params, {"image": trusted}, sampling)
        swept.append(detector.sweep({"image": images}, workdir=workdir / f"test-{digest}{suffix}", progress=True))
        seconds, scores = time.perf_counter() - start, detector.score_losses(*swept[-1])
        row = detection.result_row(
            "unknown", values.seed, settings, detector.scorer.coupling, detector, scores, is_anomalous,
            **_UNKNOWN, sweep_seconds=seconds,
        )  # fmt: skip
        ours[settings.preset] = detection.Judged(detector, scores, row)
    first = next(iter(ours.values()))
    features = {}
    if hosts.is_first():  # no other host has to look at all images
        given = {"image": trusted}, {"image": images}
        features = detection.judge_features("unknown", values.seed, loss_fn, params, *given, is_anomalous, **_UNKNOWN)
    rows = [each.row for each in (*ours.values(), *features.values())]
    shown = detection.together(ours | features, is_anomalous)
    if shown:
        rows.insert(0, shown.row)
    else:
        shown = first
    judged = [_Judged(detection.FUNCTIONAL, shown.row, shown.scores, shown.detector.threshold())]
    judged += [
        _Judged(name, each.row, each.scores, each.detector.threshold())
        for name, each in features.items()
        if name in values.detector
    ]
    if "batch" in values.preset:
        known = shown.detector.trusted_couplings
        scores = batch.as_batch(first.detector.scorer, swept[0][0], shown.scores, known, fpr=values.fpr)
        rows.append(detection.derived_row([shown.row], scores, is_anomalous, "+batch"))
        judged.append(_Judged("batch", rows[-1], scores, math.nan))
    return rows, judged


def cli() -> None:
    """The console script, which knows neither this module's flags and text, nor that --help is to show them."""
    for flag in flags.FLAGS.get_key_flags_for_module(__name__):
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)
    sys.modules["__main__"].__doc__ = __doc__
    common.run(main)


def _model(image_shape: tuple[int, ...]) -> tuple[Any, Any]:
    values = flags.FLAGS
    if values.architecture:
        model = from_torch(values.architecture, load_weights(values.checkpoint), image_shape)
        return from_nnx(model, preprocess=parse_normalization(values.normalization))
    return _own_model(values.loss_fn, values.checkpoint)


def _own_model(name: str, checkpoint: str) -> tuple[Any, Any]:
    module, _, function = name.partition(":")
    # a console script, unlike python -m, does not look for modules in the folder where it is called
    sys.path.insert(0, os.getcwd())
    try:
        make = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"loss_fn: wanted package.module:function, got {name!r} ({error})") from error
    if not callable(make):
        raise ValueError(f"loss_fn: wanted package.module:function, got {name!r}, of {type(make).__name__}")
    made = make(checkpoint)
    if not (isinstance(made, tuple) and len(made) == 2 and callable(made[0])):
        raise ValueError(f"loss_fn: wanted {name} to return (loss_fn, params), got {type(made).__name__}")
    return made


def _sampling() -> dict[str, np.ndarray] | None:
    values = flags.FLAGS
    if not values.sampling:
        if values.sampler in detection.CHAINS:
            raise ValueError(f"sampling: {values.sampler} needs examples with true labels to train on, got none")
        return None
    sampling = _read("sampling", values.sampling)
    if "label" not in sampling:
        raise ValueError(f"sampling: wanted labels, {values.sampling} holds none")
    return {name: sampling[name] for name in ("image", "label")}


def _detector(
    workdir: Path,
    suffix: str,
    settings: detection.Settings,
    loss_fn: Any,
    params: Any,
    trusted: dict[str, np.ndarray],
    sampling: dict[str, np.ndarray] | None,
) -> Detector:
    folder = workdir / f"detector{suffix}"
    if folder.exists():
        return Detector.load(folder, loss_fn, params)
    fit = workdir / f"fit{suffix}"
    detector = detection.fit(settings, flags.FLAGS.seed, loss_fn, params, trusted, sampling, None, fit)
    if hosts.is_first():
        detector.save(folder)
    hosts.barrier("saved")
    return detector


def _accuracy(scores: Scores, test: dict[str, np.ndarray]) -> float:
    """Of the model on benign examples, where it is known which these are, and their labels."""
    benign = ~test.get("is_anomalous", np.ones(len(scores.flagged), bool))
    if "label" not in test or not benign.any() or scores.prediction is None:
        return float("nan")
    return float((scores.prediction == test["label"])[benign].mean())


def _read(name: str, path: Any) -> dict[str, np.ndarray]:
    """The arrays of an npz, checked; `id` is made up where it is missing."""
    arrays = read_npz(name, path, mapped=hosts.count() > 1)
    image = arrays.get("image")
    if image is None or image.dtype != np.uint8 or image.ndim != 4 or not len(image):
        got = shown(", ".join(arrays)) or "nothing" if image is None else f"{image.dtype} {image.shape}"
        raise ValueError(f"{name}: wanted image, uint8 [n, height, width, channels], in {path}, got {got}")
    arrays.setdefault("id", np.array([f"{name}-{index}" for index in range(len(image))]))
    for key in arrays.keys() & {"id", "label", "is_anomalous"}:
        if arrays[key].shape != (len(image),):
            raise ValueError(f"{name}: wanted {key} [{len(image)}], one an image, in {path}, got {arrays[key].shape}")
    if arrays.get("label", image).dtype.kind not in "iu":
        raise ValueError(f"{name}: wanted label, int [{len(image)}], in {path}, got {arrays['label'].dtype}")
    if "is_anomalous" in arrays:
        known = arrays["is_anomalous"]
        # text would count as true whatever it says
        if known.dtype.kind not in "biuf" or not np.isin(known, (0, 1)).all():
            raise ValueError(f"{name}: wanted is_anomalous, bool or 0 and 1, in {path}, got {known.dtype} of others")
        arrays["is_anomalous"] = known.astype(bool)
    return arrays


if __name__ == "__main__":
    cli()
