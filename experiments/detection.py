"""How drivers detect: the flags, the detectors fitted by them, and the rows of results.json."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast, get_args

import jax
import numpy as np
from absl import flags

from experiments import common
from madjax import Detector, Ensemble, baselines
from madjax.baselines import BASELINES, Baseline
from madjax.baselines.features import can_read
from madjax.calibration import check_fpr
from madjax.coupling import COUPLINGS, DEFAULT
from madjax.ensemble import DRAWS, FEATURES, TANGENT
from madjax.report import detection_row
from madjax.sampling import split_chains, trace_diagnostics
from madjax.sampling.perturbation import Gaussian, Langevin, Perturbation, Tangent
from madjax.sampling.scale import MOVED, RETAINED
from madjax.scorer import Scores, Traces
from madjax.sweep import forward_passes

# what is defined here counts as the driver's own flags, which its --help shows
flags.disclaim_key_flags()


def define_presets(default: Sequence[str], presets: Sequence[str]) -> None:
    """The flag `preset`, a list of some of these."""
    common.define_list(
        "preset", default, presets, "Settings: of the flags, of a tangent, features, a batch, of the paper."
    )

    def check(values: list[str]) -> None:
        if not with_draws(values):
            raise ValueError(f"wanted a preset with draws, which batch and knn stand beside, got {','.join(values)}")

    common.register_check("preset", check)


# samplers that train on examples with true labels
CHAINS = ("rmsprop_sgld", "sgld")


def define_flags() -> None:
    """The flags of sampling, sweep, coupling and calibration."""
    samplers = ["gaussian", "tangent", *CHAINS]
    help_text = "Independent Gaussian draws, small ones along the tangent, or Langevin chains."
    flags.DEFINE_enum("sampler", "gaussian", samplers, help_text)
    flags.DEFINE_integer(
        "num_draws", 128, "Draws of the parameters, over all chains; of a tangent, of each tensor.", lower_bound=2
    )
    flags.DEFINE_enum(
        "noise", "absolute", ["absolute", "relative", "curvature"], "What a scale of 1 means for Gaussian draws."
    )
    flags.DEFINE_float("scale", None, "Scale of Gaussian draws; chosen on the trusted examples where not given.")
    flags.DEFINE_float("retained", RETAINED, "Share of trusted outputs that a draw of the chosen scale keeps.")
    common.register_check("retained", common.check_share)
    help_text = f"How far trusted log losses move at the chosen scale; 0 goes by --retained, of a tangent {MOVED}."
    flags.DEFINE_float("moved", 0.0, help_text, lower_bound=0, upper_bound=1)
    help_text = (
        "Regular expression of the parameters' paths to draw; where not given all, of a tangent those that tell most."
    )
    common.define_checked("parameters", None, _check_pattern, help_text)
    flags.DEFINE_float("step_size", 1e-6, "Chains: epsilon of a step.")
    flags.DEFINE_float("nbeta", 100.0, "Chains: examples times inverse temperature.", lower_bound=0)
    help_text = "Chains: gamma, an inverse squared distance from the trained parameters."
    flags.DEFINE_float("localization", 1e4, help_text, lower_bound=0)
    for name in ("scale", "step_size"):
        common.register_check(name, common.check_positive)
    flags.DEFINE_integer("num_chains", 1, "Chains: how many.", lower_bound=1)
    flags.register_multi_flags_validator(["sampler", "num_draws", "num_chains"], _check_chains)
    flags.DEFINE_integer("num_burnin_steps", 250, "Chains: steps of each before its first draw.", lower_bound=0)
    flags.DEFINE_integer("num_steps_between_draws", 1, "Chains: steps a draw; 1 keeps all.", lower_bound=1)
    flags.DEFINE_bool("drift", False, "Chains: batch statistics move, as in the paper's code.")
    common.define_list(
        "coupling",
        [DEFAULT, "topk_ccc", "class_correlation"],
        list(COUPLINGS),
        "Couplings to report from one sweep; pictures and scores.csv show the first.",
    )
    help_text = "Of losses: what all trusted share taken out, the same of ever so small ones, or as they are."
    flags.DEFINE_enum("traces", "whitened", get_args(Traces), help_text)
    flags.DEFINE_float("fpr", 0.05, "Wanted false-positive rate.")
    common.register_check("fpr", check_fpr)
    flags.DEFINE_bool("per_class", False, "Calibrate every predicted class by itself.")
    common.define_layout()
    flags.DEFINE_integer("batch_size", 256, "Examples of one forward pass of the sweep.", lower_bound=1)
    help_text = "Devices of a host that the parameters are split over, for a model too large for one."
    flags.DEFINE_integer("model_shards", 1, help_text, lower_bound=1)
    flags.DEFINE_bool("distributed", False, "Join the other hosts; how is found out on TPU pods, GKE and SLURM.")
    flags.DEFINE_string("coordinator", None, "address:port of host 0, where it cannot be found out.")
    flags.DEFINE_integer("num_hosts", None, "Number of hosts, where it cannot be found out.", lower_bound=1)
    flags.DEFINE_integer("host", None, "Number of this host, where it cannot be found out.", lower_bound=0)
    flags.DEFINE_integer("coordinator_timeout", 300, "Seconds to wait for all hosts.", lower_bound=1)


def _check_pattern(text: str) -> None:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"wanted a regular expression, got {text!r} ({error})") from error


def _check_chains(values: dict[str, Any]) -> bool:
    if values["sampler"] in CHAINS and values["num_draws"] % values["num_chains"]:
        raise flags.ValidationError(f"wanted a multiple of {values['num_chains']} draws, got {values['num_draws']}")
    return True


# the detector of this package, beside the names of its rivals
FUNCTIONAL = "functional"


def define_detectors(rivals: Iterable[str] = BASELINES, *, with_ours: bool = False) -> None:
    """The flag `detector`, a list; `with_ours`: it cannot do without ours, whose traces the driver uses for more."""
    common.define_list(
        "detector", [FUNCTIONAL], [FUNCTIONAL, *rivals], "Detectors: ours and baselines, which have no flags."
    )

    def check(names: list[str]) -> None:
        if FUNCTIONAL not in names:
            raise ValueError(f"wanted {FUNCTIONAL} among them, got {','.join(names)}")

    if with_ours:
        common.register_check("detector", check)


class Rival(NamedTuple):
    """A fitted baseline, and the seconds that its fit took."""

    name: str
    baseline: Baseline
    seconds: float


def fit_rivals(
    loss_fn: Any, params: Any, trusted: dict[str, Any], names: Iterable[str] | None = None, **settings: Any
) -> Iterator[Rival]:
    """The baselines of `--detector`, with their published settings and the flags of calibration; see `Baseline.fit`.

    Args:
      names: others than those of the flag.
      settings: of `Baseline.fit`, for a driver without those flags.
    """
    values = flags.FLAGS
    settings = settings or {name: values[name].value for name in ("fpr", "per_class", "batch_size")}
    for name in values.detector if names is None else names:
        if name != FUNCTIONAL:
            start = time.perf_counter()
            baseline = Baseline.fit(baselines.lookup(name), loss_fn, params, trusted, **settings)
            yield Rival(name, baseline, time.perf_counter() - start)


# presets that are reported together as well, and how much each counts
MEMBERS = {"default": DRAWS.weight, "tangent": TANGENT.weight, FEATURES.statistic: FEATURES.weight}
_TANGENT = {
    "sampler": "tangent", "num_draws": TANGENT.num_draws, "moved": 0.0, "coupling": [TANGENT.coupling],
    "traces": TANGENT.traces, "layout": "auto",
}  # fmt: skip
PAPER = {
    "sampler": "rmsprop_sgld", "num_draws": 1750, "step_size": 1e-6, "nbeta": 100.0, "localization": 1e4,
    "num_chains": 1, "num_burnin_steps": 250, "num_steps_between_draws": 1, "drift": True, "parameters": None,
    "coupling": ["class_correlation", "class_ccc"], "traces": "raw",
}  # fmt: skip


def with_draws(presets: Sequence[str]) -> list[str]:
    """Those presets that draws are made by."""
    return [preset for preset in presets if preset not in ("batch", FEATURES.statistic)]


class Judged(NamedTuple):
    """A fitted detector, what it says of the test examples, and its row of results.json."""

    detector: Detector | Baseline | Ensemble
    scores: Scores
    row: dict[str, Any]


def judge_features(
    attack: str,
    seed: int,
    loss_fn: Any,
    params: Any,
    trusted: dict[str, Any],
    test: dict[str, Any],
    is_anomalous: np.ndarray,
    **known: float,
) -> dict[str, Judged]:
    """The statistic that an ensemble has beside its draws, by its name, where `--preset` asks for it.

    Unless that is given, a model whose layers cannot be read does without.
    """
    flag, name = flags.FLAGS["preset"], FEATURES.statistic
    if name not in (flag.value or []) or not (flag.present or can_read(loss_fn, params, trusted)):
        return {}
    (rival,) = fit_rivals(loss_fn, params, trusted, [name])
    row, scores = rival_row(attack, seed, rival, test, is_anomalous, **known)
    return {name: Judged(rival.baseline, scores, row)}


def together(judged: Mapping[str, Judged], is_anomalous: np.ndarray) -> Judged | None:
    """What the members of an ensemble among presets say together; None where there is but one."""
    members = {name: judged[name] for name in MEMBERS if name in judged}
    if len(members) < 2:
        return None
    detectors = tuple(cast(Detector | Baseline, each.detector) for each in members.values())
    ensemble = Ensemble(detectors, tuple(MEMBERS[name] for name in members))
    scores = ensemble.add([each.scores for each in members.values()])
    return Judged(ensemble, scores, derived_row([each.row for each in members.values()], scores, is_anomalous))


class Settings(NamedTuple):
    """What a preset decides: how parameters are drawn and traces compared."""

    preset: str
    perturbation: Perturbation
    sampler: str
    num_draws: int
    coupling: Sequence[str]
    traces: Traces
    layout: str


def settings_from_flags(preset: str) -> Settings:
    """The settings of a preset: "default" follows the flags, the others go their own way, whatever those say.

    "tangent" are those of `madjax.ensemble.TANGENT`, "paper" arXiv 2604.18970's.
    """
    values: dict[str, Any] = {name: flags.FLAGS[name].value for name in flag_names()}
    values |= {"default": {}, "tangent": _TANGENT, "paper": PAPER}[preset]
    names = ("sampler", "num_draws", "coupling", "traces", "layout")
    return Settings(preset, _perturbation(values), *(values[name] for name in names))


def _perturbation(values: dict[str, Any]) -> Perturbation:
    if values["sampler"] == "gaussian":
        names = ("noise", "scale", "retained", "moved", "parameters")
        return Gaussian(**{name: values[name] for name in names})
    if values["sampler"] == "tangent":
        given = {name: values[name] for name in ("moved", "parameters") if values[name]}
        return Tangent(**given)
    names = (
        "step_size", "nbeta", "localization", "num_chains", "num_burnin_steps", "num_steps_between_draws", "drift",
        "parameters",
    )  # fmt: skip
    return Langevin(values["sampler"], **{name: values[name] for name in names})


def fit(
    settings: Settings,
    seed: int,
    loss_fn: Any,
    params: Any,
    trusted: dict[str, Any],
    sampling: dict[str, Any] | None,
    test: dict[str, Any] | None,
    workdir: Path | None,
) -> Detector:
    """A detector by a preset's settings and the flags of calibration and sweep; see `Detector.fit`."""
    values = flags.FLAGS
    return Detector.fit(
        jax.random.key(seed),
        loss_fn,
        params,
        trusted,
        test=test,
        sampling=sampling,
        workdir=workdir,
        perturbation=settings.perturbation,
        num_draws=settings.num_draws,
        coupling=settings.coupling[0],
        traces=settings.traces,
        fpr=values.fpr,
        per_class=values.per_class,
        layout=settings.layout,
        batch_size=values.batch_size,
        model_shards=values.model_shards,
        progress=True,
    )


def sample_forwards(detector: Detector, num_test: int) -> int:
    """Forward passes of one example that the fit and so many test examples take."""
    return detector.sample_forwards + forward_passes(detector.loss_fn, detector.draws) * num_test


def result_row(
    attack: str,
    seed: int,
    settings: Settings,
    coupling: str,
    detector: Detector,
    scores: Scores,
    is_anomalous: np.ndarray,
    *,
    accuracy: float,
    asr: float,
    sweep_seconds: float,
) -> dict[str, Any]:
    """A row of results.json: the figures of one coupling, and what they were reached with; see `detection_row`."""
    num_draws, num_trusted = detector.scorer.trusted.shape
    forwards = sample_forwards(detector, len(is_anomalous))
    return {
        "attack": attack,
        "detector": FUNCTIONAL,
        "preset": settings.preset,
        "sampler": settings.sampler,
        "coupling": coupling,
        "seed": seed,
        **detection_row(scores, is_anomalous, accuracy, asr, detector.fpr),
        "num_draws": num_draws,
        **_mixing(detector, settings.perturbation),
        "sample_forwards": forwards,
        "sweep_seconds": sweep_seconds,
        "seconds": sweep_seconds,
        "forwards_per_example": forwards / (num_trusted + len(is_anomalous)),
        "scale": detector.scale,
        "num_trusted": num_trusted,
        "num_benign": int((~is_anomalous).sum()),
        "num_anomalous": int(is_anomalous.sum()),
    }


def derived_row(
    rows: Sequence[dict[str, Any]], scores: Scores, is_anomalous: np.ndarray, suffix: str = ""
) -> dict[str, Any]:
    """The same of scores made from those of one or several detectors, from their rows."""
    first = rows[0]
    summed = ("num_draws", "sample_forwards", "sweep_seconds", "seconds", "forwards_per_example")
    named = [row if row["preset"] else row | {"preset": row["detector"], "coupling": row["detector"]} for row in rows]
    joined = {
        name: "+".join(row[name] for row in named if row[name] != "-") for name in ("preset", "sampler", "coupling")
    }
    return {
        **first,
        **detection_row(scores, is_anomalous, first["acc"], first["asr"], first["threshold_fpr"]),
        **{name: sum(row[name] for row in rows) for name in summed},
        **joined,
        "preset": joined["preset"] + suffix,
    }


def rival_row(
    attack: str,
    seed: int,
    rival: Rival,
    test: dict[str, Any],
    is_anomalous: np.ndarray,
    *,
    accuracy: float,
    asr: float,
) -> tuple[dict[str, Any], Scores]:
    """The same of a baseline, which has no draws, and what it says of the test examples."""
    start = time.perf_counter()
    scores = rival.baseline.score(test)
    seconds = rival.seconds + time.perf_counter() - start
    num_trusted, forwards = len(rival.baseline.trusted_scores), rival.baseline.statistic.forwards
    row = {
        "attack": attack,
        "detector": rival.name,
        "preset": "",
        "sampler": "-",
        "coupling": "-",
        "seed": seed,
        **detection_row(scores, is_anomalous, accuracy, asr, rival.baseline.fpr),
        "num_draws": 0,
        "sample_forwards": forwards * (num_trusted + len(is_anomalous)),
        "sweep_seconds": seconds,
        "seconds": seconds,
        "forwards_per_example": float(forwards),
        "scale": None,
        "num_trusted": num_trusted,
        "num_benign": int((~is_anomalous).sum()),
        "num_anomalous": int(is_anomalous.sum()),
    }
    return row, scores


def _mixing(detector: Detector, perturbation: Perturbation) -> dict[str, float]:
    """Of chains: the median effective sample size of trusted traces, and the worst-mixed twentieth's R-hat."""
    if not isinstance(perturbation, Langevin) or detector.draws.num_draws < 4 * perturbation.num_chains:
        return {}
    mixing = trace_diagnostics(split_chains(detector.scorer.trusted, perturbation.num_chains))
    return {"ess": _quantile(mixing.ess, 0.5), "rhat": _quantile(mixing.rhat, 0.95)}


def _quantile(values: np.ndarray, share: float) -> float:
    """Of those that are known: a trace that stands still has neither figure."""
    known = values[~np.isnan(values)]
    return float(np.quantile(known, share)) if len(known) else math.nan


def flag_names() -> list[str]:
    """Names of the flags that `define_flags` made."""
    return [
        "sampler", "num_draws", "noise", "scale", "retained", "moved", "parameters", "step_size", "nbeta",
        "localization", "num_chains", "num_burnin_steps", "num_steps_between_draws", "drift", "coupling", "traces",
        "fpr", "per_class", "layout", "batch_size", "model_shards",
    ]  # fmt: skip
