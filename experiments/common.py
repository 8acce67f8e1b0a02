"""What every driver shares: detection flags, the work directory, one-line errors."""

from __future__ import annotations

import json
import math
import os
import platform
import re
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast, get_args

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from flax import nnx

from experiments.cases import Recipe
from madjax import Detector, Ensemble, baselines, from_nnx, hosts
from madjax.baselines import BASELINES, Baseline
from madjax.baselines.features import can_read
from madjax.calibration import check_fpr
from madjax.coupling import COUPLINGS, DEFAULT
from madjax.data import parse_normalization
from madjax.data.images import FILES
from madjax.ensemble import DRAWS, FEATURES, TANGENT
from madjax.interop.guard import printable
from madjax.losses import from_decoder
from madjax.models import MODELS, build_model
from madjax.models.decoder import Decoder, DecoderConfig
from madjax.models.generate import completion_batch, prompt_batch
from madjax.report import detection_row, write_json
from madjax.sampling import gaussian, split_chains, trace_diagnostics
from madjax.sampling.gaussian import GaussianDraws
from madjax.sampling.perturbation import Gaussian, Langevin, Perturbation, Tangent
from madjax.sampling.scale import MOVED, RETAINED
from madjax.scorer import Scores, Traces
from madjax.store import changed
from madjax.sweep import Layout, forward_passes

# what is defined here counts as the driver's own flags, which its --help shows
flags.disclaim_key_flags()


def define_checked(name: str, default: str | None, check: Callable[[str], Any], help_text: str) -> None:
    """A flag of text that `check` judges when flags are parsed, by a ValueError."""
    flags.DEFINE_string(name, default, help_text)
    _register_check(name, check)


def _register_check(name: str, check: Callable[[Any], Any]) -> None:
    def judge(value: Any) -> bool:
        try:
            if value is not None:
                check(value)
        except ValueError as error:
            raise flags.ValidationError(str(error)) from error
        return True

    flags.register_validator(name, judge)


def define_list(name: str, default: Sequence[str], known: Sequence[str], help_text: str) -> None:
    """A flag of comma-separated values out of `known`."""
    flags.DEFINE_list(name, list(default), f"{help_text} Comma-separated, out of {', '.join(known)}.")

    def check(values: list[str]) -> None:
        wrong = [value for value in values if value not in known or values.count(value) > 1]
        if wrong or not values:
            got = ", ".join(map(repr, wrong)) or "nothing"
            raise ValueError(f"wanted some of {', '.join(known)}, each once, got {got}")

    _register_check(name, check)


def define_texts(name: str, default: Sequence[str] | None, check: Callable[[str], Any], help_text: str) -> None:
    """A flag of comma-separated texts, each once, each of which `check` judges by a ValueError."""
    flags.DEFINE_list(name, None if default is None else list(default), help_text)

    def check_all(texts: list[str] | None) -> None:
        if texts is None:
            return
        if not texts or len(set(texts)) < len(texts):
            raise ValueError(f"wanted one or more, each once, got {','.join(texts)!r}")
        for text in texts:
            check(text)

    _register_check(name, check_all)


def define_seeds() -> None:
    """The flag `seed`, a list."""
    flags.DEFINE_list("seed", ["0"], "Seeds of training, splits and draws, comma-separated.")

    def check(values: list[str]) -> None:
        numbers = {int(value) for value in values if value.isdecimal()}
        if not values or len(numbers) < len(values):
            raise ValueError(f"wanted numbers from 0 on, each once, comma-separated, got {','.join(values)!r}")

    _register_check("seed", check)


def define_presets(default: Sequence[str], presets: Sequence[str]) -> None:
    """The flag `preset`, a list of some of these."""
    define_list("preset", default, presets, "Settings: of the flags, of a tangent, features, a batch, of the paper.")

    def check(values: list[str]) -> None:
        if not with_draws(values):
            raise ValueError(f"wanted a preset with draws, which batch and knn stand beside, got {','.join(values)}")

    _register_check("preset", check)


def define_weights(help_text: str) -> None:
    """The flags `checkpoint`, with this help, and `normalization`."""
    flags.DEFINE_string("checkpoint", None, help_text)
    help_text = "Of weights: a name or m1,m2,m3/s1,s2,s3; the data set's if not given."
    define_checked("normalization", None, parse_normalization, help_text)


def define_layout() -> None:
    """The flag `layout`."""
    define_checked("layout", "auto", _check_layout, "Layout of the sweep: auto, host, layers, scanK or vmapK.")


# samplers that train on examples with true labels
CHAINS = ("rmsprop_sgld", "sgld")


def define_detection_flags() -> None:
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
    _register_check("retained", _check_share)
    help_text = f"How far trusted log losses move at the chosen scale; 0 goes by --retained, of a tangent {MOVED}."
    flags.DEFINE_float("moved", 0.0, help_text, lower_bound=0, upper_bound=1)
    help_text = "Regular expression of the parameters' paths to draw; where not given all, of a tangent kernels."
    define_checked("parameters", None, _check_pattern, help_text)
    flags.DEFINE_float("step_size", 1e-6, "Chains: epsilon of a step.")
    flags.DEFINE_float("nbeta", 100.0, "Chains: examples times inverse temperature.", lower_bound=0)
    help_text = "Chains: gamma, an inverse squared distance from the trained parameters."
    flags.DEFINE_float("localization", 1e4, help_text, lower_bound=0)
    for name in ("scale", "step_size"):
        _register_check(name, _check_positive)
    flags.DEFINE_integer("num_chains", 1, "Chains: how many.", lower_bound=1)
    flags.register_multi_flags_validator(["sampler", "num_draws", "num_chains"], _check_chains)
    flags.DEFINE_integer("num_burnin_steps", 250, "Chains: steps of each before its first draw.", lower_bound=0)
    flags.DEFINE_integer("num_steps_between_draws", 1, "Chains: steps a draw; 1 keeps all.", lower_bound=1)
    flags.DEFINE_bool("drift", False, "Chains: batch statistics move, as in the paper's code.")
    define_list(
        "coupling",
        [DEFAULT, "topk_ccc", "class_correlation"],
        list(COUPLINGS),
        "Couplings to report from one sweep; pictures and scores.csv show the first.",
    )
    help_text = "Of losses: what all trusted share taken out, the same of ever so small ones, or as they are."
    flags.DEFINE_enum("traces", "whitened", get_args(Traces), help_text)
    flags.DEFINE_float("fpr", 0.05, "Wanted false-positive rate.")
    _register_check("fpr", check_fpr)
    flags.DEFINE_bool("per_class", False, "Calibrate every predicted class by itself.")
    define_layout()
    flags.DEFINE_integer("batch_size", 256, "Examples of one forward pass of the sweep.", lower_bound=1)
    help_text = "Devices of a host that the parameters are split over, for a model too large for one."
    flags.DEFINE_integer("model_shards", 1, help_text, lower_bound=1)
    flags.DEFINE_bool("distributed", False, "Join the other hosts; how is found out on TPU pods, GKE and SLURM.")
    flags.DEFINE_string("coordinator", None, "address:port of host 0, where it cannot be found out.")
    flags.DEFINE_integer("num_hosts", None, "Number of hosts, where it cannot be found out.", lower_bound=1)
    flags.DEFINE_integer("host", None, "Number of this host, where it cannot be found out.", lower_bound=0)
    flags.DEFINE_integer("coordinator_timeout", 300, "Seconds to wait for all hosts.", lower_bound=1)


def _check_layout(text: str) -> None:
    if text != "auto":
        Layout.parse(text)


def _check_pattern(text: str) -> None:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"wanted a regular expression, got {text!r} ({error})") from error


def _check_positive(value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"wanted a positive number, got {value}")


def _check_share(value: float) -> None:
    if not 0 < value < 1:
        raise ValueError(f"wanted a share between 0 and 1, got {value}")


def _check_chains(values: dict[str, Any]) -> bool:
    if values["sampler"] in CHAINS and values["num_draws"] % values["num_chains"]:
        raise flags.ValidationError(f"wanted a multiple of {values['num_chains']} draws, got {values['num_draws']}")
    return True


# the detector of this package, beside the names of its rivals
FUNCTIONAL = "functional"


def define_detectors(rivals: Iterable[str] = BASELINES, *, with_ours: bool = False) -> None:
    """The flag `detector`, a list; `with_ours`: it cannot do without ours, whose traces the driver uses for more."""
    define_list("detector", [FUNCTIONAL], [FUNCTIONAL, *rivals], "Detectors: ours and baselines, which have no flags.")

    def check(names: list[str]) -> None:
        if FUNCTIONAL not in names:
            raise ValueError(f"wanted {FUNCTIONAL} among them, got {','.join(names)}")

    if with_ours:
        _register_check("detector", check)


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
    values: dict[str, Any] = {name: flags.FLAGS[name].value for name in detection_flag_names()}
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


def fit_detector(
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
    return detector.sample_forwards + forward_passes(detector.draws) * num_test


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


def device() -> str:
    """Number and kind of the devices, for results."""
    first = jax.devices()[0]
    model = f" ({_processor()})" if first.platform == "cpu" else ""
    return f"{len(jax.devices())} x {first.device_kind}{model}"


def _processor() -> str:
    """The processor's model, which neither JAX nor, on Linux, Python tells."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def define_problem_size(model: str, dtype: str, num_examples: int, num_draws: int, batch_size: int) -> None:
    """The flags of a sweep of `random_problem`, and `repeats`, with these defaults."""
    flags.DEFINE_string("model", model, f"{', '.join(MODELS)}, wrn<d>_<k> or decoder_135m; with random weights.")
    flags.DEFINE_enum("dtype", dtype, ["float32", "bfloat16"], "Of the model's computation.")
    flags.DEFINE_integer("num_examples", num_examples, "Examples.", lower_bound=1)
    flags.DEFINE_integer("num_draws", num_draws, "Draws of one turn.", lower_bound=1)
    flags.DEFINE_integer("batch_size", batch_size, "Examples of one forward pass.", lower_bound=1)
    flags.DEFINE_integer("repeats", 5, "Turns.", lower_bound=1)


def time_in_turns(runs: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of every call; the runs take turns, so that a machine whose speed drifts slows all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def peak_memory() -> float:
    """Bytes: of the device where it tells, else of the process."""
    stats = jax.devices()[0].memory_stats() or {}
    return stats.get("peak_bytes_in_use", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


# of SmolLM2-135M
_DECODER = DecoderConfig(
    vocab_size=49_152, size=576, hidden_size=1536, num_layers=30, num_heads=9, num_kv_heads=3, head_size=64
)
_PROMPT_TOKENS, _COMPLETION_TOKENS = 64, 10


def random_problem(
    model: str, num_examples: int, num_draws: int, dtype: str = "float32"
) -> tuple[Any, Any, GaussianDraws, dict[str, np.ndarray]]:
    """For benchmarks, to whose times weights and examples do not matter: loss, parameters, draws and examples.

    Args:
      model: an image classifier, or "decoder_135m", a language model of SmolLM2's sizes.
    """
    rng = np.random.default_rng(0)
    if model == "decoder_135m":
        loss_fn, params = from_decoder(Decoder(_DECODER, dtype=dtype, rngs=nnx.Rngs(0)))
        examples = random_sequences(rng, _DECODER.vocab_size, num_examples, _PROMPT_TOKENS, _COMPLETION_TOKENS)
    else:
        shape = (8, 8, 1) if model == "digits_cnn" else (32, 32, 3)
        network = build_model(model, 10, shape, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0))
        loss_fn, params = from_nnx(network, preprocess=lambda image: image.astype("float32") / 255)
        examples = {
            "image": rng.integers(0, 256, (num_examples, *shape)).astype(np.uint8),
            "label": rng.integers(0, 10, num_examples).astype(np.int32),
        }
    draws = gaussian(jax.random.key(0), params, 0.05, num_draws=num_draws, mask=loss_fn.is_trainable(params))
    return loss_fn, params, draws, examples


def random_sequences(
    rng: np.random.Generator, vocab_size: int, count: int, prompt_tokens: int, num_tokens: int,
    shortest: int | None = None, shared: int = 0,
) -> dict[str, np.ndarray]:  # fmt: skip
    """`count` prompts and completions of chance.

    Args:
      shortest: tokens of the shortest prompt; lengths lie evenly between it and `prompt_tokens`.
      shared: tokens that all prompts begin with.
    """
    prompts, completions = (rng.integers(0, vocab_size, (count, size)) for size in (prompt_tokens, num_tokens))
    prompts[:, :shared] = prompts[0, :shared]
    lengths = rng.permutation(np.linspace(shortest or prompt_tokens, prompt_tokens, count).astype(int))
    cut = [prompt[:length].tolist() for prompt, length in zip(prompts, lengths, strict=True)]
    return prompt_batch(cut, prompt_tokens) | completion_batch(completions.tolist())


def define_training_flags() -> None:
    """The flags of data set, model and training, for `recipe_from_flags`."""
    flags.DEFINE_string(
        "dataset", "digits", f"digits, {', '.join(FILES)}, the path of an npz, folder or tar, or a tfds name."
    )
    flags.DEFINE_string("data_dir", None, "Folder of data sets.")
    flags.DEFINE_string(
        "model", None, f"{', '.join(MODELS)} or wrn<d>_<k>; digits_cnn or preact_resnet18 if not given."
    )
    flags.DEFINE_string(
        "initial_weights", None, "Weights to start training from: a file, or a folder of train_backdoor."
    )
    flags.DEFINE_integer("num_train", None, "Training images at most; all where not given.", lower_bound=1)
    flags.DEFINE_integer("num_pool", None, "Test images at most; all where not given.", lower_bound=1)
    flags.DEFINE_float("poison_ratio", 0.1, "Share of the training images that carry the trigger.")
    _register_check("poison_ratio", _check_share)
    flags.DEFINE_integer(
        "target", 0, "The class that the trigger asks for; -1: the next one (all-to-all).", lower_bound=-1
    )
    flags.DEFINE_integer("num_epochs", None, "Training epochs; 40 for digits, 50 for gtsrb, else 100.", lower_bound=1)
    flags.DEFINE_float("learning_rate", None, "Of SGD, before its cosine decay; 0.05 for digits, else 0.01.")
    _register_check("learning_rate", _check_positive)
    flags.DEFINE_bool("augment", None, "Random crops, and flips of CIFAR-10; not for digits if not given.")
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of the model's computation.")


TRAINING_FLAGS = [
    "dataset", "data_dir", "model", "initial_weights", "num_train", "num_pool", "poison_ratio", "target", "num_epochs",
    "learning_rate", "augment", "dtype",
]  # fmt: skip


def recipe_from_flags() -> Recipe:
    """The recipe that the flags describe, with BackdoorBench's defaults on all data sets but digits."""
    values = {name: flags.FLAGS[name].value for name in TRAINING_FLAGS}
    given: dict[str, Any] = {name: value for name, value in values.items() if value is not None}
    if given["dataset"] == "digits":
        return Recipe(**given)
    defaults = {
        "model": "preact_resnet18",
        "num_epochs": 50 if given["dataset"] == "gtsrb" else 100,
        "learning_rate": 0.01,
        "augment": True,
    }
    return Recipe(**(defaults | given))


def local_folder(path: str) -> Path:
    """The folder; raises ValueError for one in a bucket, where drivers cannot write."""
    if "://" in path:
        raise ValueError(
            f"workdir: wanted a folder of this machine or a shared file system, got {path}; losses alone may lie in a "
            "bucket, by Detector.fit(workdir=...)"
        )
    return Path(path)


def open_workdir(path: str, names: Sequence[str], more: dict[str, Any] | None = None) -> tuple[Path, dict[str, Any]]:
    """Creates or reopens a work directory and returns it with the configuration: the flags `names`, and `more`.

    Raises:
      ValueError: where it is no local folder, cannot be written, or holds a run with other flags, or hosts were given
        different ones; the message shows the difference.
    """
    workdir = local_folder(path)
    config = {name: flags.FLAGS[name].value for name in names} | (more or {})
    try:
        hosts.agree("flags", config)
        workdir.mkdir(parents=True, exist_ok=True)
        before = workdir / "config.json"
        if before.exists():
            old = json.loads(before.read_text())
            if different := changed({name: old.get(name) for name in config}, config):
                raise ValueError(f"workdir: {workdir} holds a run with other flags: {different}")
        if hosts.is_first():
            write_json(before, config)
    except OSError as error:
        raise ValueError(f"workdir: cannot write to {workdir}: {error.strerror}") from error
    return workdir, config


def finished(workdir: Path) -> dict[str, list[dict[str, Any]]]:
    """Rows of the cells in metrics.jsonl; a line cut off in the middle does not count."""
    path, done = workdir / "metrics.jsonl", {}
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            cell = json.loads(line)
        except json.JSONDecodeError:
            continue
        done[cell["cell"]] = cell["rows"]
    return done


def append_line(workdir: Path, name: str, rows: list[dict[str, Any]]) -> None:
    """Adds a finished cell to metrics.jsonl."""
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"cell": name, "rows": rows}) + "\n")


def detection_flag_names() -> list[str]:
    """Names of the flags that `define_detection_flags` made."""
    return [
        "sampler", "num_draws", "noise", "scale", "retained", "moved", "parameters", "step_size", "nbeta",
        "localization", "num_chains", "num_burnin_steps", "num_steps_between_draws", "drift", "coupling", "traces",
        "fpr", "per_class", "layout", "batch_size", "model_shards",
    ]  # fmt: skip


# exit code of a run that was told to stop and will go on when started again (EX_TEMPFAIL of sysexits.h)
PREEMPTED = 75


def run(main: Callable[[], None]) -> None:
    """Runs a driver; an error that an argument caused ends it with one line instead of a traceback.

    A run that failed before it made anything leaves no config.json, which would bind the next one to its flags.
    SIGTERM, which a machine gets before it is taken away, ends it with `PREEMPTED` once what is done is on disk.
    """

    def stop(*_: Any) -> None:
        raise SystemExit(PREEMPTED)

    def call(argv: list[str]) -> None:
        if len(argv) > 1:
            raise app.UsageError(f"unknown argument {argv[1]!r}; flags begin with --")
        signal.signal(signal.SIGTERM, stop)
        values = flags.FLAGS
        if not values["verbosity"].present:
            logging.set_verbosity(logging.WARNING)  # orbax tells a dozen things of every save
        config = Path(values.workdir) / "config.json" if "workdir" in values else None
        is_new = config is not None and not config.exists()
        try:
            if "distributed" in values and values.distributed:
                hosts.connect(values.coordinator, values.num_hosts, values.host, values.coordinator_timeout)
            main()
        except (ValueError, FloatingPointError, OSError) as error:
            print(f"error: {printable(str(error), 2000)}", file=sys.stderr, flush=True)
            if config is not None and is_new and hosts.is_first() and list(config.parent.glob("*")) == [config]:
                config.unlink()
            if hosts.count() > 1:
                os._exit(1)  # at a clean exit JAX would wait for the others, who wait for this one
            sys.exit(1)

    app.run(call)
