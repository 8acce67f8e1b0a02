"""The drivers beyond backdoors, once each at small size: mechanisms, adversarial inputs, out-of-distribution inputs."""

import csv
import json

import numpy as np
import pytest
from absl import flags

from experiments.cases import Recipe, train_known, train_several
from madjax import Scores
from madjax.attacks import ATTACKS
from tests.test_experiments import complaint  # noqa: F401

SMALL = ["--num_draws=16", "--num_epochs=10", "--layout=host"]


def results(workdir):
    return json.loads((workdir / "results.json").read_text())["rows"]


def test_mechanisms(here, tmp_path):
    given = ["--backdoors=badnet:0+sig:1", "--detector=functional,msp", f"--workdir={tmp_path}", *SMALL]
    printed = here("mechanisms", *given)
    row, rival = results(tmp_path)
    assert (row["detector"], rival["detector"], rival["num_anomalous"]) == ("functional", "msp", row["num_anomalous"])
    assert rival["forwards_per_example"] == 1
    assert row["auroc"] > 0.7
    assert row["num_mechanisms"] == 3
    assert row["num_groups"] == len(row["groups"]) > 0
    assert row["ari"] > 0.3  # groups by chance have 0
    assert {"ami", "ari_anomalies"} <= row.keys()
    folder = tmp_path / "cells" / "badnet-0+sig-1-0"
    assert (folder / "mechanisms.png").stat().st_size > 5000
    assert (folder / "central.png").stat().st_size > 2000
    with (folder / "groups.csv").open() as file:
        lines = list(csv.DictReader(file))
    for label, group in enumerate(row["groups"]):
        members = sorted((line for line in lines if line["group"] == str(label)), key=lambda line: int(line["rank"]))
        assert len(members) == group["size"] == sum(group["kinds"].values())
        assert [int(line["number"]) for line in members[:8]] == group["central"]
    assert here("mechanisms", *given) == printed  # nothing was run again


def test_adversarial(here, tmp_path):
    given = ["--attack=fgsm,adaptive", "--weight=0,1", "--num_attacked=24", "--num_steps=4", f"--workdir={tmp_path}"]
    printed = here("adversarial", "--detector=functional,energy", *given, *SMALL)
    everyone = results(tmp_path)
    rows, rivals = everyone[::2], everyone[1::2]
    assert [row["attack"] for row in rows] == [row["attack"] for row in rivals] == ["fgsm", "adaptive 0", "adaptive 1"]
    assert {row["detector"] for row in rivals} == {"energy"}
    assert [row["robust"] for row in rows] == [row["robust"] for row in rivals]
    assert rows[0]["auroc"] != rivals[0]["auroc"]
    for row in rows:
        assert row["robust"] == pytest.approx(row["acc"] * (1 - row["asr"]))
        assert row["evades"] <= row["asr"] + 1e-9
        assert row["num_anomalous"] == round(24 * row["asr"])
    assert rows[0]["asr"] > 0.1
    assert rows[0]["auroc"] > 0.6
    assert (tmp_path / "cells" / "clean-0" / "trade-off.png").stat().st_size > 5000
    assert "adaptive 1" in printed


def test_ood(here, tmp_path):
    given = ["--detector=functional,msp,knn", "--parts=functional,msp", "--num_ood=60", f"--workdir={tmp_path}", *SMALL]
    printed = here("ood", *given)
    rows = {(row["detector"], row["attack"]): row for row in results(tmp_path)}
    assert {name for _, name in rows} == {"held_out", "patches", "jpeg"}
    assert {method for method, _ in rows} == {"functional", "msp", "knn", "combined"}
    forwards = {method: row["forwards_per_example"] for (method, _), row in rows.items()}
    assert forwards["msp"] == forwards["knn"] == 1
    assert forwards["combined"] == forwards["functional"] + 1 > 5
    assert all(row["seconds"] > 0 for row in rows.values())
    assert rows["msp", "held_out"]["auroc"] > 0.7
    assert rows["combined", "held_out"]["auroc"] > 0.7
    # what a JPEG round trip leaves is in distribution, nearly
    assert rows["combined", "jpeg"]["auroc"] < rows["combined", "held_out"]["auroc"]
    assert sum(rows["combined", "held_out"]["shares"].values()) == pytest.approx(1)
    assert "[near]" in printed


def test_how_much_coupling_counts_depends_on_the_data(driver):
    weights = driver("ood")._weights
    assert weights(None, "digits") == {"functional": 1, "energy": 1, "knn": 1}
    assert weights(None, "cifar10") == {"functional": 0.25, "energy": 1, "knn": 1}
    assert weights(["msp:2"], "cifar10") == {"msp": 2}


def test_parts_are_standardized_weighed_and_added(driver):
    rng = np.random.default_rng(0)
    trusted = {"functional": rng.normal(5, 3, 50), "msp": rng.normal(-1, 0.1, 50)}

    def scores(values):
        return Scores(values, values, values > 0, np.zeros(len(values), int), np.zeros((len(values), 0), int))

    values = {part: {name: rng.normal(size=7) for name in ("benign", "far")} for part in trusted}
    scored = {part: {name: scores(one) for name, one in some.items()} for part, some in values.items()}
    shares = driver("ood")._combine(scored, trusted, {"functional": 0.25, "msp": 2.0}, 0.05)
    z = {p: {n: (v - trusted[p].mean()) / trusted[p].std() for n, v in some.items()} for p, some in values.items()}
    expected = 0.25 * z["functional"]["far"] + 2 * z["msp"]["far"]
    np.testing.assert_allclose(scored["combined"]["far"].anomaly_score, expected)
    gap = {p: w * (z[p]["far"].mean() - z[p]["benign"].mean()) for p, w in (("functional", 0.25), ("msp", 2))}
    assert shares["far"] == pytest.approx({p: one / sum(gap.values()) for p, one in gap.items()})


def test_images_of_another_size_are_resized_only_when_asked(driver, tmp_path):
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "big.npz", x_test=rng.integers(0, 256, (9, 12, 10, 3)).astype(np.uint8), y_test=np.arange(9))
    benign, name = np.zeros((3, 8, 8, 1), np.uint8), str(tmp_path / "big.npz")
    module = driver("ood")
    with pytest.raises(ValueError, match=r"its images are \(12, 10, 3\) and the model's \(8, 8, 1\); --resize"):
        module._ood(name, benign[:0], benign, 0)
    flags.FLAGS.resize = True
    assert module._ood(name, benign[:0], benign, 0).shape == (9, 8, 8, 1)


@pytest.mark.parametrize(
    ("name", "flag", "message"),
    [
        ("mechanisms", "--backdoors=badnet:0", "wanted two attacks or more, each once, got 'badnet:0'"),
        ("mechanisms", "--backdoors=badnet:0+badnets:1", "wanted attack:target"),
        ("mechanisms", "--backdoors=badnet:0+sig:x", "wanted attack:target"),
        ("adversarial", "--attack=pdg", "wanted some of fgsm, pgd"),
        ("adversarial", "--detector=msp", "wanted functional among them, got msp"),
        ("adversarial", "--weight=0,7", "wanted 0 to 1, got '7'"),
        ("adversarial", "--weight=0,0", "wanted one or more, each once, got '0,0'"),
        ("ood", "--detector=mps", "wanted some of functional, msp"),
        ("ood", "--detector=msp", "wanted functional among them, got msp"),
        ("ood", "--parts=functional:0,msp", "wanted part or part:weight of functional, msp, .*, got 'functional:0'"),
        ("ood", "--parts=functional:much", "wanted part or part:weight of functional"),
    ],
)
def test_flags_are_judged_before_anything_runs(driver, name, flag, message):
    with pytest.raises(flags.IllegalFlagValueError, match=message):
        driver(name, flag)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("adversarial", ["--epsilon=0.03"], "epsilon: wanted 1 to 255, in levels of 0..255"),
        ("ood", ["--parts=msp,msp:2"], "parts: wanted each once, got msp,msp:2"),
        ("ood", ["--dataset=gtsrb"], "near, far: wanted the OOD sets for gtsrb, got none"),
    ],
)
def test_what_cannot_be_done_is_told_before_training(driver, complaint, name, arguments, message, tmp_path):  # noqa: F811
    module = driver(name, f"--workdir={tmp_path}", *arguments)
    assert complaint(module.main).splitlines()[-1].startswith(f"error: {message}")
    assert not (tmp_path / "config.json").exists()


@pytest.mark.parametrize(
    ("names", "targets", "ratio", "message"),
    [
        (["badnet"], [0], 0.1, "attack: wanted two or more, each once, got badnet"),
        (["badnet", "badnet"], [0, 1], 0.1, "attack: wanted two or more, each once, got badnet, badnet"),
        (["badnet", "sig"], [0], 0.1, "targets: wanted one for each of 2 attacks, got 1"),
        (["badnet", "sig"], [0, 1], 0.3, "poison_ratio: 2 attacks of 0.3 poison 60% of the training images"),
    ],
)
def test_several_backdoors_that_cannot_be(names, targets, ratio, message):
    with pytest.raises(ValueError, match=message):
        train_several(names, targets, 0, Recipe(poison_ratio=ratio))


def test_several_backdoors_have_images_of_their_own(monkeypatch):
    seen = {}
    monkeypatch.setattr("experiments.cases.train_classifier", lambda model, images, labels, **_: seen.update(
        images=images, labels=labels))  # fmt: skip
    _, attacks = train_several(["badnet", "sig"], [3, 4], 0, Recipe(poison_ratio=0.1))
    assert [attack.name for attack in attacks] == ["badnet", "sig"]
    assert set(ATTACKS) >= {"badnet", "sig"}
    corners = (seen["images"][:, -2:, -2:] == 255).all((1, 2, 3))
    share = corners.mean()
    assert 0.08 < share < 0.13  # badnet's tenth, and few digits that have such a corner
    assert (seen["labels"][corners] == 3).mean() > 0.95
    counts = np.bincount(seen["labels"], minlength=10) / len(seen["labels"])
    assert (counts[[3, 4]] > 0.15).all()


def test_unknown_classes_are_not_learned(monkeypatch):
    seen = {}
    monkeypatch.setattr("experiments.cases.train_classifier", lambda model, images, labels, **_: seen.update(
        labels=labels))  # fmt: skip
    case, others = train_known(8, 0)
    assert set(seen["labels"]) == set(case.pool.labels) == set(range(8))
    assert len(others) > 100
