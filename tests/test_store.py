"""Nothing is lost: whatever interrupts a sweep, a second one ends with the same bits."""

import resource
import shutil
import threading
import time

import jax
import numpy as np
import pytest
import xarray as xr

from madjax import Detector, Gaussian, Langevin, loss_matrix, open_traces, sweep
from madjax.sampling import ChainDraws
from madjax.store import TRACES, TraceStore
from tests import linear

NUM_DRAWS = 22


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(sweep, "BLOCK", 4)


@pytest.fixture(scope="module", params=["gaussian", "chains"])
def draws(request):
    return linear.independent(NUM_DRAWS) if request.param == "gaussian" else linear.chains(NUM_DRAWS)


@pytest.fixture(scope="module")
def examples():
    return linear.examples()


def store(folder, **settings):
    classes = np.arange(37) % 10
    return TraceStore(folder, {"model": "a", **settings}, {"trusted": 30, "test": 7}, classes)


class Interrupted:
    """A walk that raises at one of its items, and notes those it gave."""

    def __init__(self, walk, start, error, at):
        self.walk, self.index, self.error, self.at, self.walked = walk, start, error, at, []
        self.state, self.info = walk.state, walk.info

    def __iter__(self):
        return self

    def __next__(self):
        if self.index == self.at:
            raise self.error
        item = next(self.walk)
        self.walked.append(self.index)
        self.index += 1
        return item


@pytest.fixture
def interrupt(draws, monkeypatch):
    """Makes the draws raise; the walks that were begun are in the list it returns."""
    walks, items = [], type(draws).items

    def interrupt(error, at):
        def walk(draws, start=0, state=None):
            walks.append(Interrupted(items(draws, start, state), start, error, at))
            return walks[-1]

        monkeypatch.setattr(type(draws), "items", walk)
        return walks

    return interrupt


@pytest.fixture
def break_off(draws, examples, interrupt, tmp_path):
    """Begins a sweep that dies at one of its draws; later ones do not."""

    def break_off(layout, at):
        interrupt(RuntimeError, at)
        with pytest.raises(RuntimeError):
            sweep_with(draws, examples, layout, store=store(tmp_path))
        interrupt(RuntimeError, None)

    return break_off


def sweep_with(draws, examples, layout, **kwargs):
    return loss_matrix(
        linear.loss_fn, draws, examples, layout=layout, batch_size=16, devices=jax.devices()[:1], **kwargs
    )


@pytest.mark.parametrize("layout", ["host", "scan3"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, RuntimeError])
def test_pieces_equal_one_run(draws, examples, layout, error, interrupt, tmp_path):
    straight = sweep_with(draws, examples, layout)
    for at in (3, 9, 10, 21):
        interrupt(error, at)
        with pytest.raises(error):
            sweep_with(draws, examples, layout, store=store(tmp_path))
    walks = interrupt(error, None)
    matrix = sweep_with(draws, examples, layout, store=store(tmp_path))
    np.testing.assert_array_equal(matrix, straight)
    # only what was open is walked twice: less than a block, or after a signal less than a call
    again = sum(len(walk.walked) for walk in walks) - NUM_DRAWS
    calls = {"host": 1, "scan3": 3}[layout]
    open_at_most = {"host": 4, "scan3": 6}[layout] if error is RuntimeError else calls
    assert again <= 4 * (open_at_most - 1)
    if error is not RuntimeError and layout == "host":
        assert again == 0
    assert not list(tmp_path.glob("*.chains/*"))  # what chains need to go on is gone once they need not


def test_a_finished_sweep_is_read_not_computed(draws, examples, interrupt, tmp_path):
    first = sweep_with(draws, examples, "host", store=store(tmp_path))
    walks = interrupt(RuntimeError, None)
    np.testing.assert_array_equal(sweep_with(draws, examples, "host", store=store(tmp_path)), first)
    assert [walk.walked for walk in walks] == [[]]


def test_another_layout_does_not_change_what_was_begun(draws, examples, break_off, tmp_path):
    straight = sweep_with(draws, examples, "scan3")
    break_off("scan3", 7)
    matrix = sweep_with(draws, examples, "auto", store=store(tmp_path))
    np.testing.assert_array_equal(matrix, straight)


def test_a_chain_without_its_state_walks_there_again(draws, examples, break_off, tmp_path):
    straight = sweep_with(draws, examples, "host")
    break_off("host", 9)
    assert (store(tmp_path).state(8) is not None) == isinstance(draws, ChainDraws)
    for path in tmp_path.glob("*.chains/*"):
        path.unlink()
    np.testing.assert_array_equal(sweep_with(draws, examples, "host", store=store(tmp_path)), straight)


def test_what_is_half_kept_is_made_again(draws, examples, break_off, tmp_path):
    if not isinstance(draws, ChainDraws):
        pytest.skip("chains alone keep more than losses")
    whole = store(tmp_path / "whole")
    straight = sweep_with(draws, examples, "host", store=whole)
    break_off("host", 13)
    # written side by side, so either may have come first
    for name in ("loss/c/2/0", "minibatch_loss/c/1"):
        (tmp_path / TRACES / name).unlink()
        assert len(store(tmp_path).whole()) == {"loss/c/2/0": 8, "minibatch_loss/c/1": 4}[name]
    states = sorted(tmp_path.glob("*.chains/*"))
    shutil.copy(states[0], states[0].with_name("host-0-draw-000004.npz"))
    for damaged in (b"", states[0].read_bytes()[:300], b"x" * 300):
        states[0].with_name("host-0-draw-000004.npz").write_bytes(damaged)
        assert store(tmp_path).state(4) is None
    np.testing.assert_array_equal(sweep_with(draws, examples, "host", store=store(tmp_path)), straight)
    np.testing.assert_array_equal(open_traces(tmp_path).minibatch_loss, open_traces(tmp_path / "whole").minibatch_loss)


def test_a_block_is_written_while_the_next_is_computed(tmp_path, monkeypatch):
    go_on, write = threading.Event(), TraceStore._write

    def late(*args):
        assert go_on.wait(60)
        time.sleep(0.2)  # whoever does not wait comes too early
        write(*args)

    monkeypatch.setattr(TraceStore, "_write", late)
    losses = np.arange(8 * 37, dtype=np.float32).reshape(8, 37)
    begun = store(tmp_path)
    begun.create(8, 4, "host")
    begun.write(0, losses[:4], {}, None)
    assert not (tmp_path / TRACES / "loss" / "c").exists()
    go_on.set()
    np.testing.assert_array_equal(store(tmp_path).whole(), losses[:4])
    # a part of a block, which is kept when a sweep ends early, and the last block are there at once
    for start, stop in ((4, 6), (6, 8)):
        begun.write(start, losses[start:stop], {}, None)
        np.testing.assert_array_equal(begun.whole(), losses[:stop])


def test_a_sweep_that_is_stopped_leaves_nothing_unwritten(draws, break_off, tmp_path, monkeypatch):
    write = TraceStore._write

    def late(*args):
        time.sleep(0.3)
        write(*args)

    monkeypatch.setattr(TraceStore, "_write", late)
    break_off("host", 13)  # on its way to the 13th draw, all that is done being handed over
    assert (tmp_path / TRACES / "loss/c/2/0").exists()


def test_readers_see_a_labelled_set_while_it_fills(draws, examples, break_off, tmp_path):
    break_off("host", 9)
    half = open_traces(tmp_path)
    assert np.isfinite(half.loss[:8]).all()
    assert np.isnan(half.loss[8:]).all()
    matrix = sweep_with(draws, examples, "host", store=store(tmp_path))
    traces = open_traces(tmp_path)
    assert dict(traces.sizes) == {"draw": NUM_DRAWS, "example": 37}
    np.testing.assert_array_equal(traces.loss, matrix)
    np.testing.assert_array_equal(traces.loss[:, traces.split == "test"], matrix[:, 30:])
    np.testing.assert_array_equal(traces.example, [*range(30), *range(7)])
    np.testing.assert_array_equal(traces.prediction, np.arange(37) % 10)
    if isinstance(draws, ChainDraws):
        np.testing.assert_array_equal(traces.chain, np.arange(NUM_DRAWS) % 2)
        assert np.isfinite(traces.minibatch_loss).all()
    np.testing.assert_array_equal(xr.open_zarr(str(tmp_path / TRACES), consolidated=False)["loss"], matrix)


def test_bad_input(draws, examples, break_off, tmp_path):
    with pytest.raises(ValueError, match="holds no losses"):
        open_traces(tmp_path)
    # a start that did not come to its end is begun anew
    (tmp_path / TRACES / "loss").mkdir(parents=True)
    (tmp_path / TRACES / "loss" / "zarr.json").write_text("{")
    break_off("host", 13)
    with pytest.raises(ValueError, match="losses of other settings: batch was None, is 3; model was a, is b"):
        store(tmp_path, model="b", batch=3)
    chunk = next((tmp_path / TRACES / "loss" / "c" / "1").iterdir())
    data = chunk.read_bytes()
    for damaged in (data[:50], data[:20] + bytes(4) + data[24:], b""):
        chunk.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"is damaged \(.*loss/c/1/0.*; remove the file named"):
            sweep_with(draws, examples, "host", store=store(tmp_path))
    chunk.unlink()
    straight = sweep_with(draws, examples, "host")
    np.testing.assert_array_equal(sweep_with(draws, examples, "host", store=store(tmp_path)), straight)
    (tmp_path / TRACES / "zarr.json").write_text('{"zarr')
    with pytest.raises(ValueError, match=r"zarr.json is damaged; remove .* to begin anew"):
        store(tmp_path)


def test_a_full_disk_loses_no_whole_block(draws, examples, break_off, tmp_path):
    straight = sweep_with(draws, examples, "host")
    break_off("host", 9)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    begun = store(tmp_path)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
        with pytest.raises(ValueError, match=r"^workdir: cannot begin .*/new/.* \(.*File too large\)$"):
            sweep_with(draws, examples, "host", store=store(tmp_path / "new"))
        with pytest.raises(ValueError, match=r"cannot write draws 8 to 11 to .* \(.*File too large.*; the 8 draws"):
            sweep_with(draws, examples, "host", store=begun)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(store(tmp_path).whole()) == 8
    np.testing.assert_array_equal(sweep_with(draws, examples, "host", store=store(tmp_path)), straight)


@pytest.mark.parametrize("perturbation", [Gaussian(), Langevin(num_burnin_steps=2)])
@pytest.mark.parametrize("together", [True, False])
def test_a_detector_resumes(examples, perturbation, together, tmp_path, monkeypatch):
    settings = {"sampling": examples, "perturbation": perturbation, "num_draws": 12, "layout": "host"}
    settings["test"] = linear.examples(41) if together else None

    def fit(**more):
        return Detector.fit(jax.random.key(0), linear.loss_fn, linear.params(), examples, **(settings | more))

    straight, write, left = fit(), TraceStore.write, [1, 1]

    def killed(*args):
        write(*args)
        left[-1] -= 1
        if not left[-1]:
            left.pop()
            raise RuntimeError

    monkeypatch.setattr(TraceStore, "write", killed)
    for _ in range(2):
        with pytest.raises(RuntimeError):
            fit(workdir=tmp_path)
    monkeypatch.setattr(TraceStore, "write", write)
    resumed = fit(workdir=tmp_path)
    np.testing.assert_array_equal(resumed.scorer.trusted, straight.scorer.trusted)
    assert resumed.sample_forwards == straight.sample_forwards
    if together:
        np.testing.assert_array_equal(resumed.test[0], straight.test[0])
    # new examples at the same draws, kept as well
    losses, _ = straight.sweep(examples)
    for _ in range(2):
        np.testing.assert_array_equal(resumed.sweep(examples, workdir=tmp_path / "new")[0], losses)
    np.testing.assert_allclose(losses, straight.scorer.trusted, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"workdir: .* holds losses of other settings: num_draws was 12, is 11"):
        Detector.fit(
            jax.random.key(0),
            linear.loss_fn,
            linear.params(),
            examples,
            workdir=tmp_path,
            **(settings | {"num_draws": 11}),
        )
