"""The benchmarks of large sweeps, at small size."""

import json
from importlib.util import find_spec

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from experiments import detection
from experiments.cost_model import H100, PREACT_RESNET18, V5E, cost


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_bench_shortcuts(here):
    small = ["--attack=badnet", "--num_draws=8", "--num_examples=30", "--layout=host"]
    row = json.loads(here("bench_shortcuts", *small).splitlines()[-1])["models"]["digits badnet"]
    assert 2 <= row["draws_benign"] <= 8
    assert 0 <= row["changed_stopping"] <= 1
    assert row["correlation_bfloat16"] > 0.98
    assert row["largest_difference_bfloat16"] > 0  # it was computed otherwise


@pytest.mark.slow
def test_bench_detectors(here, tmp_path):
    small = ["--attack=badnet", "--num_draws=32", "--num_examples=30", "--layout=host"]
    small += ["--detector=functional,knn,scale_up", f"--workdir={tmp_path}"]
    out = here("bench_detectors", *small)
    result = json.loads((tmp_path / "results.json").read_text())
    assert [(row["detector"], row["num_draws"]) for row in result["rows"]] == [
        ("functional", 32), ("functional", 8), ("knn", 0), ("scale_up", 0)
    ]  # fmt: skip
    many, few, knn, scale_up = (row["forwards_per_example"] for row in result["rows"])
    assert (many - few, knn, scale_up) == (24, 1, 6)
    assert (tmp_path / "detectors.png").stat().st_size > 5000
    aurocs = [row["auroc"] for row in result["means"]]
    assert aurocs == sorted(aurocs, reverse=True)
    before = (tmp_path / "metrics.jsonl").read_text()
    assert here("bench_detectors", *small).splitlines() == out.splitlines()[-5:]  # nothing is done again
    assert (tmp_path / "metrics.jsonl").read_text() == before


def test_bench_influence(here, tmp_path):
    small = ["--num_train=30", "--num_test=5", "--num_subsets=5", "--num_draws=8", f"--workdir={tmp_path}"]
    here("bench_influence", *small)
    rows = {row["attribution"]: row for row in json.loads((tmp_path / "results.json").read_text())["rows"]}
    # to first order influence functions are the effect of leaving one out
    assert rows["influence, exact"]["loo"] > 0.9
    assert rows["gradients"]["loo"] < rows["influence, exact"]["loo"]


def test_retraining_reaches_the_optimum(driver):
    bench = driver("bench_influence")
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 3)), np.arange(40) % 10
    weights = bench.fit(x, y, 0.1)
    model = LogisticRegression(C=1 / (0.1 * 40), fit_intercept=False, tol=1e-10, max_iter=1000).fit(x, y)
    np.testing.assert_allclose(weights, model.coef_.T, atol=1e-5)
    weights = rng.normal(size=(3, 10))

    def objective(weights):
        return bench.losses(weights, x, y).mean() + 0.05 * np.square(weights).sum()

    step = rng.normal(size=(3, 10))
    second = (objective(weights + 1e-3 * step) + objective(weights - 1e-3 * step) - 2 * objective(weights)) / 1e-6
    found = step.ravel() @ bench.hessian(weights, x, 0.1) @ step.ravel()
    np.testing.assert_allclose(found, second, rtol=1e-4)


def test_bench_roofline(here, tmp_path):
    small = ["--model=digits_cnn", "--dtype=float32", "--num_examples=64", "--num_draws=2", "--batch_size=32"]
    small += ["--matrix_size=64", "--repeats=1", "--layout=host", f"--workdir={tmp_path}"]
    result = json.loads(here("bench_roofline", *small).splitlines()[-1])
    # two 3×3 convolutions, 1 -> 16 -> 32 features on 8×8, and 512×96 + 96×10 weights
    products = 2 * (64 * 9 * (16 + 16 * 32) + 512 * 96 + 960)
    passes = result["flops_per_second"]["sweep"] * result["seconds"]["sweep"] / (64 * 2)
    assert products * 0.8 < passes < products * 1.3  # padding is not multiplied; norms and relus count too
    assert len(result["largest_costs_seconds"]) == 5
    assert list(tmp_path.rglob("*.xplane.pb"))


@pytest.mark.slow
def test_bench_growth(here, driver, monkeypatch):
    bench_growth = driver("bench_growth")
    small = ["--repeats=1", "--layout=host"]
    point = json.loads(here("bench_growth", *small, "--point=draws=16").splitlines()[-1])
    assert point["count"] == 16
    assert point["seconds"] > 0
    monkeypatch.setitem(bench_growth._POINTS, "trusted", [30, 60])
    growth = json.loads(here("bench_growth", "--grows=trusted", *small).splitlines()[-1])["growth"]
    assert growth["trusted"]["points"][0]["count"] == 30
    points = [{"count": 10, "seconds": 3.0}, {"count": 100, "seconds": 300.0}]
    assert bench_growth._slope(points, "seconds") == pytest.approx(2)
    with pytest.raises(ValueError, match=r"^point: wanted what=value, .* got 'weather=16'"):
        here("bench_growth", "--point=weather=16")


@pytest.mark.skipif(find_spec("torch") is None, reason="torch is not installed")
def test_bench_torch(here):
    small = ["--models=digits_cnn", "--batch_size=8", "--repeats=1"]
    passes = json.loads(here("bench_torch", *small).splitlines()[-1])["models"]["digits_cnn"]
    assert passes.keys() == {"forward", "gradient", "by_image"}
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


@pytest.mark.parametrize("preset", [[], pytest.param(["--preset=paper"], marks=pytest.mark.slow)])
def test_bench_cell(here, monkeypatch, preset):
    monkeypatch.setitem(detection.PAPER, "num_draws", 40)
    monkeypatch.setitem(detection.PAPER, "num_burnin_steps", 1)
    small = ["--model=badnets_cnn", "--dtype=float32", "--num_examples=60", "--num_draws=4", "--layout=host"]
    row = json.loads(here("bench_cell", *small, "--retained=0.5", *preset).splitlines()[-1])
    assert (row["num_draws"], row["num_trusted"]) == (40 if preset else 4, 20)
    assert 0 < row["fit_seconds"] < row["seconds"]
