"""The benchmarks of large sweeps, at small size."""

import json
from importlib.util import find_spec

import pytest

from experiments.cost_model import H100, PREACT_RESNET18, V5E, cost


def test_bench_devices(here):
    small = ["--num_devices=1,2", "--num_examples=32", "--num_draws=2", "--model_shards=2"]
    one, two = json.loads(here("bench_devices", *small).splitlines()[-1])["rows"]
    assert (one["collectives"], two["model_shards"]) == (0, 2)
    assert two["collectives"] > 0
    assert two["flops_per_device"] < 0.6 * one["flops_per_device"]
    assert two["largest_difference"] < 1e-5


def test_bench_store(here):
    small = ["--num_examples=16", "--num_draws=4", "--repeats=1", "--chains"]
    result = json.loads(here("bench_store", *small).splitlines()[-1])
    assert result["overhead"] > -1
    assert len(result["seconds_with"]) == 1


def test_bench_detector(here):
    small = ["--model=digits_cnn", "--num_trusted=20", "--num_draws=4", "--num_inputs=1,3", "--repeats=2"]
    result = json.loads(here("bench_detector", *small, "--layout=host").splitlines()[-1])
    assert result["inputs"].keys() == {"1", "3"}
    assert all(0 < row["median_sweep_seconds"] <= row["median_seconds"] for row in result["inputs"].values())


def test_bench_quality(here, tmp_path):
    small = ["--attack=badnet", "--num_draws=4,8", "--num_reference_draws=6", "--num_examples=40", "--layout=host"]
    small += ["--sampler=reference,independent,antithetic"]
    result = json.loads(here("bench_quality", f"--workdir={tmp_path}", *small).splitlines()[-1])
    assert result["models"] == ["digits badnet"]
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [(row["sampler"], row["num_draws"]) for row in rows] == [
        ("reference", 6), ("independent", 4), ("independent", 8), ("antithetic", 4), ("antithetic", 8)
    ]  # fmt: skip
    reference, few, many = (row["forwards_per_example"] for row in rows[:3])
    assert reference > 6 + 3 * 256 * 256 / 1000  # the chain's own steps count
    assert many == few + 4
    if result["forward_pass_ratio"] is not None:
        assert result["forward_pass_ratio"] == reference / (few if result["num_draws"] == 4 else many)
    assert (tmp_path / "quality.png").stat().st_size > 5000


@pytest.mark.skipif(find_spec("torch") is None, reason="torch is not installed")
def test_bench_torch(here):
    small = ["--models=digits_cnn", "--batch_size=8", "--repeats=1"]
    passes = json.loads(here("bench_torch", *small).splitlines()[-1])["models"]["digits_cnn"]
    assert passes.keys() == {"forward", "gradient"}
    assert all(one["torch_over_ours"] > 0 for one in passes.values())


@pytest.mark.skipif(find_spec("devinterp") is None, reason="devinterp is not installed")
def test_bench_reference(here):
    small = ["--num_draws=6", "--num_burnin_steps=2", "--num_default_draws=4", "--repeats=1", "--num_pool=300"]
    found = json.loads(here("bench_reference", *small).splitlines()[-1])["models"]["digits"]
    theirs, same, defaults = found.values()
    assert theirs["forward_passes"] == same["forward_passes"]
    assert 0 <= defaults["auroc"] <= 1


def test_cost_model(here):
    one, eight = (cost(PREACT_RESNET18, H100, count, 1, 8000, 1000) for count in (1, 8))
    assert one.examples == 8 * eight.examples  # examples are shared out, noise is not
    assert one.noise == eight.noise
    assert one.links == 0
    assert cost(PREACT_RESNET18._replace(sent_bytes=1e6), V5E, 8, 4, 8000, 1000).links > 0
    assert "256 × v5e" in here("cost_model")
