"""What every driver shares: kinds of flags, the work directory, one-line errors."""

from __future__ import annotations

import json
import math
import os
import platform
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import app, flags, logging

from experiments.cases import Recipe
from madjax import hosts
from madjax.data import parse_normalization
from madjax.data.images import FILES
from madjax.interop.guard import printable
from madjax.models import MODELS
from madjax.report import write_json
from madjax.store import changed
from madjax.sweep import Layout

# what is defined here counts as the driver's own flags, which its --help shows
flags.disclaim_key_flags()


def define_checked(name: str, default: str | None, check: Callable[[str], Any], help_text: str) -> None:
    """A flag of text that `check` judges when flags are parsed, by a ValueError."""
    flags.DEFINE_string(name, default, help_text)
    register_check(name, check)


def register_check(name: str, check: Callable[[Any], Any]) -> None:
    """Lets `check` judge a flag when flags are parsed, by a ValueError."""

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

    register_check(name, check)


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

    register_check(name, check_all)


def define_seeds() -> None:
    """The flag `seed`, a list."""
    flags.DEFINE_list("seed", ["0"], "Seeds of training, splits and draws, comma-separated.")

    def check(values: list[str]) -> None:
        numbers = {int(value) for value in values if value.isdecimal()}
        if not values or len(numbers) < len(values):
            raise ValueError(f"wanted numbers from 0 on, each once, comma-separated, got {','.join(values)!r}")

    register_check("seed", check)


def define_weights(help_text: str) -> None:
    """The flags `checkpoint`, with this help, and `normalization`."""
    flags.DEFINE_string("checkpoint", None, help_text)
    help_text = "Of weights: a name or m1,m2,m3/s1,s2,s3; the data set's if not given."
    define_checked("normalization", None, parse_normalization, help_text)


def define_layout() -> None:
    """The flag `layout`."""
    define_checked("layout", "auto", _check_layout, "Layout of the sweep: auto, host, layers, scanK or vmapK.")


def _check_layout(text: str) -> None:
    if text != "auto":
        Layout.parse(text)


def check_positive(value: float) -> None:
    """Raises ValueError unless it is."""
    if not 0 < value < math.inf:
        raise ValueError(f"wanted a positive number, got {value}")


def check_share(value: float) -> None:
    """Raises ValueError unless it is one."""
    if not 0 < value < 1:
        raise ValueError(f"wanted a share between 0 and 1, got {value}")


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
    register_check("poison_ratio", check_share)
    flags.DEFINE_integer(
        "target", 0, "The class that the trigger asks for; -1: the next one (all-to-all).", lower_bound=-1
    )
    flags.DEFINE_integer("num_epochs", None, "Training epochs; 40 for digits, 50 for gtsrb, else 100.", lower_bound=1)
    flags.DEFINE_float("learning_rate", None, "Of SGD, before its cosine decay; 0.05 for digits, else 0.01.")
    register_check("learning_rate", check_positive)
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
