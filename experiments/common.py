"""What every driver shares: detection flags, the work directory, one-line errors."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import app, flags

from madjax.coupling import COUPLINGS
from madjax.report import write_json
from madjax.sampling.perturbation import Gaussian, Langevin, Perturbation
from madjax.sampling.scale import RETAINED
from madjax.sweep import Layout


def define_list(name: str, default: Sequence[str], known: Sequence[str], help_text: str) -> None:
    """A flag of comma-separated values out of `known`."""
    flags.DEFINE_list(name, list(default), f"{help_text} Comma-separated, out of {', '.join(known)}.")

    def check(values: list[str]) -> bool:
        unknown = [value for value in values if value not in known]
        if unknown or not values:
            got = ", ".join(map(repr, unknown)) or "nothing"
            raise flags.ValidationError(f"wanted some of {', '.join(known)}, got {got}")
        return True

    flags.register_validator(name, check)


def define_detection_flags() -> None:
    """The flags of sampling, sweep, coupling and calibration."""
    samplers = ["gaussian", "rmsprop_sgld", "sgld"]
    flags.DEFINE_enum("sampler", "gaussian", samplers, "Independent Gaussian draws, or Langevin chains.")
    flags.DEFINE_integer("num_draws", 128, "Draws of the parameters, over all chains.", lower_bound=2)
    flags.DEFINE_enum(
        "noise", "absolute", ["absolute", "relative", "curvature"], "What a scale of 1 means for Gaussian draws."
    )
    flags.DEFINE_float("scale", None, "Scale of Gaussian draws; chosen on the trusted examples where not given.")
    flags.DEFINE_float("retained", RETAINED, "Share of trusted outputs that a draw of the chosen scale keeps.")
    flags.DEFINE_string("parameters", None, "Regular expression of the parameters' paths to draw; all where not given.")
    flags.DEFINE_float("step_size", 1e-6, "Chains: epsilon of a step.")
    flags.DEFINE_float("nbeta", 100.0, "Chains: examples times inverse temperature.")
    flags.DEFINE_float("localization", 1e4, "Chains: gamma, an inverse squared distance from the trained parameters.")
    flags.DEFINE_integer("num_chains", 1, "Chains: how many.", lower_bound=1)
    flags.DEFINE_integer("num_burnin_steps", 250, "Chains: steps of each before its first draw.", lower_bound=0)
    flags.DEFINE_integer("num_steps_between_draws", 1, "Chains: steps a draw; 1 keeps all.", lower_bound=1)
    flags.DEFINE_bool("drift", False, "Chains: batch statistics move, as in the paper's code.")
    define_list(
        "coupling",
        ["topk_ccc", "class_ccc", "class_correlation"],
        list(COUPLINGS),
        "Couplings to report from one sweep; pictures and scores.csv show the first.",
    )
    flags.DEFINE_enum("traces", "whitened", ["whitened", "raw"], "Whether what all trusted share is taken out.")
    flags.DEFINE_float("fpr", 0.05, "Wanted false-positive rate.", lower_bound=0, upper_bound=1)
    flags.DEFINE_bool("per_class", False, "Calibrate every predicted class by itself.")
    flags.DEFINE_string("layout", "auto", "Layout of the sweep: auto, host, scanK or vmapK.")
    flags.register_validator("layout", _check_layout)
    flags.DEFINE_integer("batch_size", 256, "Examples of one forward pass of the sweep.", lower_bound=1)


def _check_layout(text: str) -> bool:
    try:
        return text == "auto" or bool(Layout.parse(text))
    except ValueError as error:
        raise flags.ValidationError(str(error)) from error


def perturbation_from_flags() -> Perturbation:
    """The perturbation that the flags describe."""
    values = flags.FLAGS
    if values.sampler == "gaussian":
        return Gaussian(values.noise, values.scale, values.retained, values.parameters)
    return Langevin(
        values.sampler,
        step_size=values.step_size,
        nbeta=values.nbeta,
        localization=values.localization,
        num_chains=values.num_chains,
        num_burnin_steps=values.num_burnin_steps,
        num_steps_between_draws=values.num_steps_between_draws,
        drift=values.drift,
        parameters=values.parameters,
    )


def open_workdir(path: str, names: Sequence[str]) -> tuple[Path, dict[str, Any]]:
    """Creates or reopens a work directory and returns it with the configuration, the values of the flags `names`.

    Raises:
      ValueError: where it cannot be written, or holds a run with other flags; the message shows the difference.
    """
    workdir = Path(path)
    config = {name: flags.FLAGS[name].value for name in names}
    try:
        (workdir / "cells").mkdir(parents=True, exist_ok=True)
        before = workdir / "config.json"
        if before.exists():
            old = json.loads(before.read_text())
            different = [f"{k} was {old.get(k)}, is {v}" for k, v in config.items() if old.get(k) != v]
            if different:
                raise ValueError(f"workdir: {workdir} holds a run with other flags: {'; '.join(different)}")
        write_json(before, config)
    except OSError as error:
        raise ValueError(f"workdir: cannot write to {workdir}: {error.strerror}") from error
    return workdir, config


def detection_flag_names() -> list[str]:
    """Names of the flags that `define_detection_flags` made."""
    return [
        "sampler", "num_draws", "noise", "scale", "retained", "parameters", "step_size", "nbeta", "localization",
        "num_chains", "num_burnin_steps", "num_steps_between_draws", "drift", "coupling", "traces", "fpr", "per_class",
        "layout", "batch_size",
    ]  # fmt: skip


def run(main: Callable[[], None]) -> None:
    """Runs a driver; an error that an argument caused ends it with one line instead of a traceback."""

    def call(argv: list[str]) -> None:
        if len(argv) > 1:
            raise app.UsageError(f"unknown argument {argv[1]!r}; flags begin with --")
        try:
            main()
        except (ValueError, FloatingPointError) as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(1)

    app.run(call)
