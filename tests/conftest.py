"""Four CPU devices, strict rank promotion, and small problems that many tests share."""

import importlib
import os
import tempfile
import warnings
from pathlib import Path

# before jax is imported, and in the environment, for the drivers that tests start: programs are compiled in a third of
# the time, since what LLVM makes of them is not what is tested, and once, though many processes ask for the same ones
PROGRAMS = tempfile.TemporaryDirectory(prefix="madjax-programs-")
for name, value in {
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "JAX_COMPILATION_CACHE_DIR": PROGRAMS.name,
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}.items():
    os.environ.setdefault(name, value)

import jax  # noqa: E402

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_rank_promotion", "raise")

import matplotlib as mpl  # noqa: E402

mpl.use("Agg")

import numpy as np  # noqa: E402
import pytest  # noqa: E402
from absl import flags  # noqa: E402
from flax import nnx  # noqa: E402

from madjax import from_nnx  # noqa: E402
from madjax.models import DigitsCNN, train  # noqa: E402
from tests.drivers import own_flags, run  # noqa: E402
from tests.own_model import make_files, score_flags  # noqa: E402

# drivers define flags when they are imported, which the search for doctests would do
collect_ignore = ["tiny_driver.py"]


@pytest.fixture(scope="session")
def digits_model():
    """An untrained digits CNN as (loss_fn, params)."""
    return from_nnx(DigitsCNN(rngs=nnx.Rngs(0)), preprocess=to_unit)


def to_unit(image):
    return image.astype("float32") / 255


@pytest.fixture(scope="session")
def examples():
    """37 random images with random labels: no multiple of anything."""
    rng = np.random.default_rng(0)
    return {
        "image": rng.integers(0, 256, (37, 8, 8, 1)).astype(np.uint8),
        "label": rng.integers(0, 10, 37).astype(np.int32),
    }


@pytest.fixture(scope="session")
def shared_data():
    """The folder of data sets and public checkpoints that do not ship with the package."""
    folder = Path(os.environ.get("MADJAX_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"development data is not at {folder}")
    return folder


@pytest.fixture(scope="session")
def own_model(tmp_path_factory):
    """A folder with weights, trusted and test examples, as a user would bring them."""
    return make_files(tmp_path_factory.mktemp("own"))


@pytest.fixture(scope="session")
def scored(own_model, tmp_path_factory):
    """What `experiments.score` made of `own_model`: its folder, not to be written to, and what it printed."""
    workdir = tmp_path_factory.mktemp("scored")
    return workdir, run("score", *score_flags(own_model, workdir))


@pytest.fixture
def driver():
    """Imports a driver into this process and gives it flags."""

    def load_driver(name, *arguments):
        module = importlib.import_module(f"experiments.{name}")
        flags.FLAGS.unparse_flags()
        flags.FLAGS([name, *arguments])
        return module

    with own_flags():
        yield load_driver


@pytest.fixture
def here(driver, capsys):
    """Runs a driver in this process, and returns what it printed."""

    def run_here(name, *arguments):
        module = driver(name, *arguments)
        with warnings.catch_warnings():
            warnings.simplefilter("default")  # as outside of pytest: so few draws and examples give reason to warn
            module.main()
        return capsys.readouterr().out

    return run_here


@pytest.fixture
def interrupt(monkeypatch):
    """Runs a training that keeps every epoch, and is told to stop just before it keeps one."""

    def run_until(stop, run_training):
        keep = train._keep

        def keep_or_stop(workdir, epoch, loss, state):
            if epoch == stop:
                raise KeyboardInterrupt
            keep(workdir, epoch, loss, state)

        with monkeypatch.context() as patch:
            patch.setattr(train, "_keep", keep_or_stop)
            patch.setattr(train, "_KEEP_SECONDS", 0)
            with pytest.raises(KeyboardInterrupt):
                run_training()

    return run_until
