"""The benchmarks of large sweeps, at small size."""

import json

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


def test_cost_model(here):
    one, eight = (cost(PREACT_RESNET18, H100, count, 1, 8000, 1000) for count in (1, 8))
    assert one.examples == 8 * eight.examples  # examples are shared out, noise is not
    assert one.noise == eight.noise
    assert one.links == 0
    assert cost(PREACT_RESNET18._replace(sent_bytes=1e6), V5E, 8, 4, 8000, 1000).links > 0
    assert "256 × v5e" in here("cost_model")
