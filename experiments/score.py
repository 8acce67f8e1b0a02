r"""Scores the inputs of your own model: which outputs do your trusted examples not explain?

    madjax-score --architecture=wrn16_1 --checkpoint=model.pth --normalization=cifar10 \
        --trusted=trusted.npz --test=test.npz --workdir=runs/score

or python -m experiments.score. trusted.npz and test.npz hold `image`, uint8 [n, height, width, channels], and may hold
`id`. test.npz may hold `is_anomalous`, where it is known: then results.json tells how well the detector did, and with
`label` how right the model is. A model of another architecture comes as --loss_fn=package.module:function, your own
code, which is called with --checkpoint and returns (loss_fn, params), for instance from `madjax.from_nnx`.

Writes config.json, pictures and scores.csv: id, prediction, anomaly_score, p_value, flagged, three nearest trusted ids.
The detector is kept in detector/, and a second run with the same flags and trusted examples does not fit again. The
losses lie in fit/ and test-<hash>/ (`madjax.open_traces`); a run that was interrupted goes on from there.
"""

from __future__ import annotations

import hashlib
import importlib
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from experiments import common
from madjax import Detector, from_nnx, hosts, report
from madjax.data import parse_normalization
from madjax.interop.weights import load_weights
from madjax.models import MODELS, from_torch

flags.DEFINE_string("architecture", None, f"{', '.join(MODELS)} or wrn<depth>_<width>.")
flags.DEFINE_string("loss_fn", None, "Instead of --architecture: package.module:function, called with --checkpoint.")
flags.DEFINE_string("checkpoint", None, "Weights: torch, safetensors or orbax. Nothing in the file is executed.")
flags.DEFINE_string("normalization", "none", "none (x / 255), a data set's name, or m1,m2,m3/s1,s2,s3.")
flags.DEFINE_string("trusted", None, "npz of examples that the usual mechanism explains.")
flags.DEFINE_string("sampling", None, "npz of examples with true labels, for chains alone.")
flags.DEFINE_string("test", None, "npz of examples to score.")
flags.DEFINE_integer("seed", 0, "Seed of the draws.", lower_bound=0)
flags.DEFINE_string("workdir", "runs/score", "Folder for results.")
common.define_detection_flags()

_OWN_FLAGS = ["architecture", "loss_fn", "checkpoint", "normalization", "trusted", "sampling", "seed"]


def main() -> None:
    """Fits, or reads what was fitted, and scores."""
    values = flags.FLAGS
    for name in ("checkpoint", "trusted", "test"):
        if not values[name].value:
            raise ValueError(f"{name}: wanted a path, got none")
    if bool(values.architecture) == bool(values.loss_fn):
        raise ValueError("architecture: wanted it or loss_fn, one of the two")
    trusted, test = (_read(name, values[name].value) for name in ("trusted", "test"))
    loss_fn, params = _model(trusted["image"].shape[1:])
    names = [*_OWN_FLAGS, *common.detection_flag_names()]
    digest = hashlib.sha256(trusted["image"].tobytes()).hexdigest()
    workdir, config = common.open_workdir(values.workdir, names, {"trusted_sha256": digest})
    start = time.perf_counter()
    detector = _detector(workdir / "detector", loss_fn, params, trusted)
    digest = hashlib.sha256(test["image"].tobytes()).hexdigest()[:12]
    losses, classes = detector.sweep({"image": test["image"]}, workdir=workdir / f"test-{digest}", progress=True)
    if not hosts.is_first():
        return
    seconds = time.perf_counter() - start
    scores = detector.score_losses(losses, classes)
    ids = list(map(str, test["id"])), list(map(str, trusted["id"]))
    report.write_scores(workdir / "scores.csv", ids[0], scores, test.get("is_anomalous"), ids[1])
    is_anomalous = test.get("is_anomalous", np.zeros(len(losses[0]), bool))
    report.plot_histogram(workdir / "histogram.png", scores, is_anomalous, -detector.threshold(), values.coupling[0])
    report.plot_flagged(workdir / "flagged.png", test["image"], scores, is_anomalous, "least explained")
    print(f"{scores.flagged.sum()} of {len(scores.flagged)} flagged at {detector.fpr:.1%}")
    if "is_anomalous" in test:
        row = _row(detector, scores, test, losses.size, seconds)
        report.write_json(workdir / "results.json", {"config": config, "rows": [row]})
        print(report.table([row]))
    print(f"results in {workdir}")


def cli() -> None:
    """The console script."""
    common.run(main)


def _model(image_shape: tuple[int, ...]) -> tuple[Any, Any]:
    values = flags.FLAGS
    if values.architecture:
        model = from_torch(values.architecture, load_weights(values.checkpoint), image_shape)
        return from_nnx(model, preprocess=parse_normalization(values.normalization))
    module, _, function = values.loss_fn.partition(":")
    try:
        make = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"loss_fn: wanted package.module:function, got {values.loss_fn!r} ({error})") from error
    return make(values.checkpoint)


def _detector(folder: Path, loss_fn: Any, params: Any, trusted: dict[str, np.ndarray]) -> Detector:
    values, settings = flags.FLAGS, common.settings_from_flags("default")
    if folder.exists():
        return Detector.load(folder, loss_fn, params)
    sampling = None
    if values.sampling:
        sampling = {
            name: array for name, array in _read("sampling", values.sampling).items() if name in ("image", "label")
        }
        if "label" not in sampling:
            raise ValueError(f"sampling: wanted labels, {values.sampling} holds none")
    trusted = {"image": trusted["image"]}
    fit = folder.parent / "fit"
    detector = common.fit_detector(settings, values.seed, loss_fn, params, trusted, sampling, None, fit)
    if hosts.is_first():
        detector.save(folder)
    hosts.barrier("saved")
    return detector


def _row(
    detector: Detector, scores: Any, test: dict[str, np.ndarray], num_forwards: int, seconds: float
) -> dict[str, Any]:
    values, is_anomalous = flags.FLAGS, test["is_anomalous"]
    accuracy = float("nan")
    if "label" in test and (~is_anomalous).any():
        accuracy = float((scores.prediction == test["label"])[~is_anomalous].mean())
    return {
        "attack": "unknown",
        "sampler": values.sampler,
        "coupling": values.coupling[0],
        "seed": values.seed,
        # how often a trigger works cannot be told from those that do
        **report.detection_row(scores, is_anomalous, accuracy, float("nan"), values.fpr),
        "num_draws": values.num_draws,
        "sample_forwards": detector.sample_forwards + num_forwards,
        "sweep_seconds": seconds,
    }


def _read(name: str, path: Any) -> dict[str, np.ndarray]:
    """The arrays of an npz, checked; `id` is made up where it is missing."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, AttributeError) as error:
        raise ValueError(f"{name}: cannot read {path} as npz ({error})") from error
    image = arrays.get("image")
    if image is None or image.dtype != np.uint8 or image.ndim != 4 or not len(image):
        got = f"{', '.join(arrays) or 'nothing'}" if image is None else f"{image.dtype} {image.shape}"
        raise ValueError(f"{name}: wanted image, uint8 [n, height, width, channels], in {path}, got {got}")
    arrays.setdefault("id", np.array([f"{name}-{index}" for index in range(len(image))]))
    for key in arrays.keys() & {"id", "label", "is_anomalous"}:
        if arrays[key].shape != (len(image),):
            raise ValueError(f"{name}: wanted {key} [{len(image)}], one an image, in {path}, got {arrays[key].shape}")
    if "is_anomalous" in arrays:
        arrays["is_anomalous"] = arrays["is_anomalous"].astype(bool)
    return arrays


if __name__ == "__main__":
    cli()
