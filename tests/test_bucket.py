"""Losses in a bucket: what holds of a folder holds of gs://, against a server on this machine."""

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import tensorstore as ts

from madjax import Detector, Langevin, loss_matrix, open_traces, sweep
from madjax.store import TraceStore
from tests import linear
from tests.bucket import serve
from tests.drivers import ROOT

NUM_DRAWS = 14
HAS_GCSFS = importlib.util.find_spec("gcsfs") is not None


@pytest.fixture(scope="module")
def server():
    with serve() as (bucket, address), pytest.MonkeyPatch.context() as patch:
        # read once a process, and nothing else here asks for a bucket
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", address)
        patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "any")
        patch.setenv("STORAGE_EMULATOR_HOST", address)
        patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # asks what no emulator knows
        yield bucket


@pytest.fixture
def bucket(server, monkeypatch):
    """An empty one."""
    monkeypatch.setattr(sweep, "BLOCK", 4)
    server.objects.clear()
    server.requests.clear()
    server.refuses = False
    return server


@pytest.fixture
def interrupt(monkeypatch):
    """Has a sweep end at one of its calls from now, as Ctrl-C would; None for never."""
    call = sweep._block

    def interrupt(at):
        left = [at]

        def counted(*args):
            if left[0] == 0:
                raise KeyboardInterrupt
            left[0] = left[0] and left[0] - 1
            return call(*args)

        monkeypatch.setattr(sweep, "_block", counted)

    return interrupt


def draws(kind):
    return linear.independent(NUM_DRAWS) if kind == "gaussian" else linear.chains(NUM_DRAWS)


def store(folder="gs://bucket/run", **settings):
    return TraceStore(folder, settings, {"trusted": 30, "test": 7}, np.arange(37) % 10)


def swept(draws, into):
    devices = jax.devices()[:1]
    return loss_matrix(linear.loss_fn, draws, linear.examples(), layout="host", devices=devices, store=into)


def in_pieces(draws, interrupt):
    for calls in (3, 6, 1):
        interrupt(calls)
        with pytest.raises(KeyboardInterrupt):
            swept(draws, store())
    interrupt(None)


def parts(bucket, folder):
    """Name -> bytes of what lies under a folder of the bucket."""
    return {name.removeprefix(folder): data for name, (_, data) in bucket.objects.items() if name.startswith(folder)}


@pytest.mark.parametrize("kind", ["gaussian", "chains"])
def test_pieces_equal_one_run(kind, bucket, interrupt, tmp_path):
    straight = swept(draws(kind), store(tmp_path))
    in_pieces(draws(kind), interrupt)
    assert len(store().whole()) == 10
    assert (store().state(10) is not None) == (kind == "chains")
    np.testing.assert_array_equal(swept(draws(kind), store()), straight)
    # the same files as in a folder, and no state of a chain that is done
    local = {str(path.relative_to(tmp_path)): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert parts(bucket, "run/") == local
    calls = [sum("alt" not in query for method, _, query in bucket.requests if method == "GET")]
    np.testing.assert_array_equal(swept(draws(kind), store()), straight)
    assert calls == [sum("alt" not in query for method, _, query in bucket.requests if method == "GET")]


def test_only_its_own_folder_is_cleared(bucket):
    others = ["run/other", "run/traces.zarr2/loss/zarr.json", "run/traces.zarr.chains2/a", "run2/traces.zarr/zarr.json"]
    left = [f"run/traces.zarr/loss/c/{block}/0" for block in range(9)] + ["run/traces.zarr.chains/host-0-draw-4.npz"]
    bucket.objects |= dict.fromkeys([*others, *left], (1, b"left"))
    store().create(4, 4, "host")
    assert sorted(name for name, (_, data) in bucket.objects.items() if data == b"left") == sorted(others)
    writes = [name for method, name, _ in bucket.requests if method == "POST"]
    assert writes[-1] == "run/traces.zarr/zarr.json"


def test_what_is_refused_is_told_and_what_was_written_stays(bucket, interrupt):
    straight = swept(draws("chains"), None)
    bucket.refuses = True
    with pytest.raises(ValueError, match=r"^workdir: cannot begin gs://bucket/run/traces.zarr \(.*Forbidden"):
        swept(draws("chains"), store())
    bucket.refuses = False
    interrupt(6)
    with pytest.raises(KeyboardInterrupt):
        swept(draws("chains"), store())
    interrupt(None)
    begun, bucket.refuses = store(), True
    with pytest.raises(
        ValueError, match=r"^workdir: cannot write draws 6 to 9 to gs://.*Forbidden.*; the 6 draws"
    ) as told:
        swept(draws("chains"), begun)
    assert "\n" not in str(told.value)
    bucket.refuses = False
    with pytest.raises(ValueError, match="losses of other settings: seed was None, is 1"):
        store(seed=1)
    np.testing.assert_array_equal(swept(draws("chains"), store()), straight)
    with pytest.raises(ValueError, match=r"made a pathlib\.Path, which drops a slash"):
        store(Path("gs://bucket/run"))
    with pytest.raises(ValueError, match=r"workdir: cannot read gcs://bucket/run/traces.zarr .*unsupported URL scheme"):
        store("gcs://bucket/run")


def test_a_detector_resumes(bucket, interrupt):
    def fit(**more):
        return Detector.fit(
            jax.random.key(0), linear.loss_fn, linear.params(), linear.examples(), sampling=linear.examples(),
            perturbation=Langevin(num_burnin_steps=2), num_draws=12, layout="host", **more,
        )  # fmt: skip

    straight = fit()
    for calls in (5, 4):
        interrupt(calls)
        with pytest.raises(KeyboardInterrupt):
            fit(workdir="gs://bucket/fit")
    interrupt(None)
    resumed = fit(workdir="gs://bucket/fit")
    np.testing.assert_array_equal(resumed.scorer.trusted, straight.scorer.trusted)
    losses, _ = straight.sweep(linear.examples(11))
    np.testing.assert_array_equal(resumed.sweep(linear.examples(11), workdir="gs://bucket/new")[0], losses)
    assert {name.split("/")[0] for name in bucket.objects} == {"fit", "new"}


@pytest.mark.skipif(not HAS_GCSFS, reason="gcsfs is not installed")
def test_readers_see_a_labelled_set_while_it_fills(bucket, interrupt):
    with pytest.raises(ValueError, match="holds no losses"):
        open_traces("gs://bucket/run")
    in_pieces(draws("chains"), interrupt)
    half = open_traces("gs://bucket/run/")
    assert np.isfinite(half.loss[:10]).all()
    assert np.isnan(half.loss[10:]).all()
    matrix = swept(draws("chains"), store())
    traces = open_traces("gs://bucket/run/traces.zarr")
    np.testing.assert_array_equal(traces.loss, matrix)
    np.testing.assert_array_equal(traces.loss[:, traces.split == "test"], matrix[:, 30:])
    np.testing.assert_array_equal(traces.prediction, np.arange(37) % 10)


@pytest.mark.skipif(HAS_GCSFS, reason="gcsfs is installed")
def test_what_a_reader_lacks_is_named(bucket):
    store().create(4, 4, "host")
    with pytest.raises(ValueError, match=r"^workdir: cannot read gs://.* \(.*gcsfs.*\); pip install 'madjax\[gcs\]'$"):
        open_traces("gs://bucket/run")


def test_the_server_holds_to_preconditions(bucket):
    files = ts.KvStore.open("gs://bucket/x/").result()
    first = files.write("a", b"1").result().generation
    assert files.read("a").result().stamp.generation == first
    files.write("a", b"2", if_equal=first).result()
    files.write("a", b"3", if_equal=first).result()  # came too late
    assert files.read("a").result().value == b"2"


@pytest.mark.slow
def test_killed_at_any_moment(bucket, tmp_path):
    rng = np.random.default_rng(0)

    def worker(folder, **kwargs):
        return subprocess.Popen([sys.executable, "-m", "tests.kill_worker", folder, "chains", "48"], cwd=ROOT, **kwargs)

    for _ in range(5):
        process, before = worker("gs://bucket/run"), len(bucket.objects)
        while process.poll() is None and len(bucket.objects) == before:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.3))
        process.kill()
        assert process.wait() != 0, "it came to its end before it was killed"
    for folder in ("gs://bucket/run", os.fspath(tmp_path)):
        assert worker(folder).wait() == 0
    local = {str(path.relative_to(tmp_path)): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert parts(bucket, "run/") == local
