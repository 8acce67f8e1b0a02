"""Every driver once, at small size, as a user runs it."""

import csv
import json
import shutil
import signal
import sys

import jax
import numpy as np
import pytest
from absl import app, flags, logging

from experiments import common, detection
from experiments.cases import Recipe
from madjax import Detector, Langevin, checkpoint, from_nnx, report
from madjax.data import Normalize, parse_normalization
from madjax.interop.weights import load_weights
from madjax.models import from_torch
from tests.drivers import run
from tests.own_model import load, load_code, score_flags
from tests.test_cases import make_download, random_cnn

SMALL = ["--num_draws=8", "--num_epochs=8", "--layout=host"]


@pytest.fixture
def complaint(monkeypatch, capsys):
    """Runs the main of a driver in this process, as its module would, and returns what it says of its error."""
    monkeypatch.setattr(app, "run", lambda call: call(["driver"]))
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    verbosity = logging.get_verbosity()

    def run_main(main):
        with pytest.raises(SystemExit, match="1"):
            common.run(main)
        return capsys.readouterr().err

    yield run_main
    logging.set_verbosity(verbosity)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    return workdir, run("backdoor", f"--workdir={workdir}", "--attack=badnet,clean", *SMALL)


def test_backdoor_writes_what_it_says(finished):
    workdir, done = finished
    results = json.loads((workdir / "results.json").read_text())
    assert results["config"]["attack"] == ["badnet", "clean"]
    assert len(results["rows"]) == 14
    keys = {
        "attack", "sampler", "coupling", "seed", "acc", "asr", "auroc", "auroc_same_prediction", "ap", "recall_at_fpr",
        "threshold_fpr", "realized_fpr", "tpr", "der", "num_draws", "sample_forwards", "sweep_seconds",
    }  # fmt: skip
    row = results["rows"][0]
    assert keys <= row.keys()
    assert list(row["recall_at_fpr"]) == ["0.005", "0.01", "0.02", "0.05"]
    assert row["auroc"] > 0.8  # a chance detector, or one that points the wrong way, has .5 or less
    assert results["rows"][-1]["auroc"] is None  # the clean model
    with (workdir / "scores.csv").open() as file:
        scores = list(csv.DictReader(file))
    assert len(scores) == sum(r["num_benign"] + r["num_anomalous"] for r in results["rows"][::7])
    assert all(line["flagged"] == str(int(float(line["p_value"]) <= 0.05)) for line in scores)
    flagged = [line["flagged"] == "1" for line in scores if line["id"].startswith("badnet-0/triggered")]
    assert sum(flagged) / len(flagged) == pytest.approx(row["tpr"])
    for name in ("histogram", "roc", "couplings", "flagged", "gallery"):
        assert (workdir / "cells" / "badnet-0" / f"{name}.png").stat().st_size > 5000
    first = ["badnet", "functional", "default+tangent+knn", "gaussian+tangent", "standardized_ccc+class_profile+knn"]
    assert done.stdout.splitlines()[2].split()[:5] == first
    assert "average" in done.stdout
    assert "5.00% wanted" in done.stdout


@pytest.mark.slow
def test_backdoor_with_rivals(here, tmp_path):
    rivals = ["mahalanobis", "strip", "gradient_cosine_last"]
    given = ["--coupling=topk_ccc", "--preset=default", *SMALL]
    out = here(
        "backdoor", f"--workdir={tmp_path}/both", f"--detector=functional,{','.join(rivals)}", "--attack=badnet", *given
    )
    rows = json.loads((tmp_path / "both" / "results.json").read_text())["rows"]
    assert [row["detector"] for row in rows] == ["functional", *rivals]
    ours, mahalanobis, strip, cosine = rows
    assert ours.keys() == mahalanobis.keys()
    assert 8 < ours["forwards_per_example"] < 40  # draws, and the choice of their scale
    assert (mahalanobis["forwards_per_example"], strip["forwards_per_example"]) == (1, 101)
    assert cosine["seconds"] > 0
    # a rival that is made weak would flatter us
    assert min(mahalanobis["auroc"], strip["auroc"]) > 0.9
    averages = [line.split() for line in out.splitlines() if line.startswith("average")]
    assert [line[1] for line in averages] == ["functional", *rivals]
    assert averages[2][-1] == "101.0"
    # without ours, the first rival is shown
    here(
        "backdoor",
        f"--workdir={tmp_path}/one",
        "--detector=mahalanobis",
        f"--checkpoint={tmp_path}/both/models/badnet-0",
    )
    assert json.loads((tmp_path / "one" / "results.json").read_text())["rows"][0]["auroc"] == mahalanobis["auroc"]
    with (tmp_path / "one" / "scores.csv").open() as file:
        assert "nearest_1" not in csv.DictReader(file).fieldnames


def test_backdoor_resumes_and_refuses_other_flags(finished, here, driver, complaint):
    workdir, before = finished
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write('{"cell": "cut o')
    given = [f"--workdir={workdir}", "--attack=badnet,clean", *SMALL]
    assert here("backdoor", *given) == before.stdout  # with its times: nothing was trained or swept
    refused = complaint(driver("backdoor", *given, "--fpr=0.1").main)
    assert refused.strip().splitlines()[-1].endswith("fpr was 0.05, is 0.1")


@pytest.mark.slow
def test_backdoor_with_chains(here, tmp_path):
    here(
        "backdoor", f"--workdir={tmp_path}", "--attack=badnet", "--sampler=rmsprop_sgld", "--num_chains=2",
        "--num_burnin_steps=2", "--drift", "--coupling=class_correlation", "--traces=raw", "--preset=default", *SMALL,
    )  # fmt: skip
    (row,) = json.loads((tmp_path / "results.json").read_text())["rows"]
    # 2 + 2 · 4 steps... burn-in of both chains and a step a draw, three passes over 190 images each
    assert row["sample_forwards"] > 3 * (2 * 2 + 8) * 150
    assert row["scale"] is None
    assert row["ess"] > 0
    assert row["rhat"] > 0.9


@pytest.mark.parametrize(
    ("flag", "message"),
    [("--attack=badnets", "bpp, clean, each once, got 'badnets'"), ("extra", "unknown argument 'extra'")],
)
def test_bad_flags_get_one_line(flag, message, tmp_path):
    done = run("backdoor", f"--workdir={tmp_path}", flag, expect=1)
    assert message in done.stderr + done.stdout
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "config.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset=nowhere.npz", "--model=resnet20"], "name: 'nowhere.npz' is not at"),
        (["--model=resnet21"], "name: no model 'resnet21'; known are"),
        (["--checkpoint=x.pth"], "attack: wanted the one that --checkpoint was trained with"),
        (["--backdoorbench=/nowhere"], "path: "),
        (["--workdir=/proc/nowhere"], "workdir: cannot write to /proc/nowhere"),
        (["--workdir=gs://bucket/run"], "workdir: wanted a folder of this machine or a shared file system, got gs://"),
    ],
)
def test_what_cannot_be_done_is_told_and_leaves_nothing(driver, complaint, arguments, message, tmp_path):
    module = driver("backdoor", f"--workdir={tmp_path}", *arguments)
    assert complaint(module.main).splitlines()[-1].startswith(f"error: {message}")
    assert not (tmp_path / "config.json").exists()  # a corrected command may use the folder


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--coupling=cosine"], "wanted some of mean_correlation, class_correlation"),
        (["--sampler=hmc"], r"gaussian\|tangent\|rmsprop_sgld\|sgld"),
        (["--seed=a"], "wanted numbers from 0 on, each once, comma-separated, got 'a'"),
        (["--preset=batch,knn"], "wanted a preset with draws, which batch and knn stand beside, got batch,knn"),
        (["--preset=ours"], "wanted some of default, tangent, knn, batch, paper, each once, got 'ours'"),
        (["--layout=pmap"], "layout: wanted auto, host, layers, scanK or vmapK"),
        (["--parameters=("], r"parameters=\(: wanted a regular expression, got '\('"),
        (["--fpr=0"], "fpr: wanted a rate between 0 and 1, got 0"),
        (["--retained=1"], "wanted a share between 0 and 1, got 1"),
        (["--poison_ratio=nan"], "wanted a share between 0 and 1, got nan"),
        (["--scale=-1"], "wanted a positive number, got -1"),
        (["--learning_rate=inf"], "wanted a positive number, got inf"),
        (["--normalization=red"], "normalization: got 'red'"),
        (["--detector=energetic"], "wanted some of functional, msp, .*, each once, got 'energetic'"),
        (["--seed=1,01"], "wanted numbers from 0 on, each once"),
        (["--attack=sig,sig"], "each once, got 'sig', 'sig'"),
        (["--sampler=sgld", "--num_draws=9", "--num_chains=2"], "wanted a multiple of 2 draws, got 9"),
    ],
)
def test_flags_are_judged_before_anything_runs(driver, arguments, message):
    with pytest.raises(flags.IllegalFlagValueError, match=message):
        driver("backdoor", *arguments)


def test_recipes_are_backdoorbenchs(driver):
    for dataset, num_epochs in (("cifar10", 100), ("cifar100", 100), ("gtsrb", 50), ("tiny_imagenet", 100)):
        driver("train_backdoor", f"--dataset={dataset}")
        recipe = common.recipe_from_flags()
        assert recipe == Recipe(
            dataset, model="preact_resnet18", poison_ratio=0.1, target=0, num_epochs=num_epochs, learning_rate=0.01,
            augment=True,
        )  # fmt: skip
    driver("train_backdoor")
    assert common.recipe_from_flags() == Recipe()
    driver("train_backdoor", "--dataset=gtsrb", "--num_epochs=3", "--noaugment", "--model=resnet20")
    recipe = common.recipe_from_flags()
    assert (recipe.num_epochs, recipe.augment, recipe.model) == (3, False, "resnet20")


@pytest.mark.parametrize("name", ["backdoor", "score", "train_backdoor", "ablations"])
def test_help_shows_all_flags(driver, name):
    before = set(flags.FLAGS)
    module = driver(name)
    defined = set(flags.FLAGS) - before
    assert len(defined) > 10
    assert {flag.name for flag in flags.FLAGS.get_key_flags_for_module(module)} == defined


def test_help_of_the_console_script(driver, monkeypatch):
    module = driver("score")
    monkeypatch.setattr(common, "run", lambda main: None)
    monkeypatch.setattr(sys, "argv", ["madjax-score"])
    monkeypatch.setattr(sys.modules["__main__"], "__doc__", None)
    module.cli()
    assert "--num_draws" in flags.FLAGS.main_module_help()
    assert sys.modules["__main__"].__doc__ == module.__doc__


def test_errors_are_one_safe_line(complaint):
    def fail():
        raise ValueError("name: \x1b[2J\n\u202eänd " + 5000 * "x\r")

    printed = complaint(fail)
    assert printed.startswith("error: name: \\x1b[2J\\n\\u202eänd x\\rx\\r")
    assert printed.endswith("...\n")
    assert len(printed) < 2020
    assert printed.count("\n") == 1
    assert printed.rstrip("\n").isprintable()


def test_the_device_names_the_processor():
    assert common.device().startswith("4 x cpu (")
    assert len(common.device()) > len("4 x cpu ()")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("trained")
    done = run("train_backdoor", f"--workdir={workdir}", "--attack=bpp", "--num_epochs=3")
    return workdir, done


def test_train_backdoor(trained, here):
    workdir = trained[0]
    (row,) = json.loads((workdir / "results.json").read_text())["rows"]
    assert row["acc"] > 0.5
    assert 0 <= row["asr"] <= 1
    assert (workdir / "gallery.png").stat().st_size > 5000
    # of a training only its progress is told, and not what orbax does at every save
    assert all(line.startswith("train:") for line in trained[1].stderr.splitlines() if line)
    again = here("train_backdoor", f"--workdir={workdir}", "--attack=bpp", "--num_epochs=3")
    assert f"seconds {row['seconds']:.3f}" not in again  # nothing was trained
    assert f"acc {row['acc']:.3f}" in again


def test_backdoor_reads_a_trained_model_and_other_presets_stand_beside(trained, here, tmp_path, monkeypatch):
    presets = ["--preset=default,tangent,knn,batch,paper", "--num_draws=8", "--layout=host", "--num_pool=60"]
    presets += ["--num_anomalous=2", "--num_anomalous=999"]
    quick = {**detection.PAPER, "num_draws": 8, "num_burnin_steps": 2}  # or it takes an hour
    monkeypatch.setattr(detection, "PAPER", quick)
    # which attack, the model tells itself
    here("backdoor", f"--checkpoint={trained[0]}/model", f"--workdir={tmp_path}", *presets)
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert {row["attack"] for row in rows} == {"bpp"}
    assert [(row["sampler"], row["coupling"]) for row in rows] == [
        ("gaussian+tangent", "standardized_ccc+class_profile+knn"),
        ("gaussian", "standardized_ccc"), ("gaussian", "topk_ccc"), ("gaussian", "class_correlation"),
        ("tangent", "class_profile"), ("rmsprop_sgld", "class_correlation"), ("rmsprop_sgld", "class_ccc"),
        ("-", "-"), ("gaussian+tangent", "standardized_ccc+class_profile+knn"),
    ]  # fmt: skip
    assert [row["preset"] for row in rows[1:2] + rows[-1:]] == ["default", "default+tangent+knn+batch"]
    assert rows[-1]["auroc"] != rows[0]["auroc"]
    # of two triggered images among the benign ones; there are no 999
    few = rows[-1]["few_anomalous"]
    assert list(few) == ["2"]
    assert few["2"].keys() == {"auroc", "tpr", "realized_fpr"}
    assert few["2"]["tpr"] in np.arange(9) / 8  # four times two
    assert 0 <= few["2"]["realized_fpr"] < 0.5
    for name in ("num_draws", "sample_forwards", "seconds"):
        assert rows[0][name] == rows[1][name] + rows[4][name] + rows[7][name]
    assert (rows[7]["detector"], rows[7]["sample_forwards"]) == (
        "knn",
        rows[7]["num_trusted"] + rows[7]["num_benign"] + rows[7]["num_anomalous"],
    )
    # the first is shown
    shown = np.genfromtxt(tmp_path / "scores.csv", delimiter=",", names=True, dtype=None, encoding=None)
    bad = shown["is_anomalous"] == 1
    assert shown["flagged"][~bad].mean() == pytest.approx(rows[0]["realized_fpr"])
    assert not (tmp_path / "models").exists()


def test_a_kept_model_is_what_it_was_trained_as(driver, tmp_path):
    settings = {"name": "badnet", "seed": 2, "num_classes": 10, **Recipe()._asdict()}
    checkpoint.save(tmp_path / "kept" / "model", settings, {"x": np.zeros(1)})
    given = [f"--checkpoint={tmp_path}/kept", f"--workdir={tmp_path}/run"]
    for flag, different in (
        ("--attack=blended", r"attack was \['badnet'\], is \['blended'\]"),
        ("--seed=0,1", r"seed was \['2'\], is \['0', '1'\]"),
        ("--target=3", "target was 0, is 3"),
        ("--dataset=gtsrb", "dataset was digits, is gtsrb"),
        ("--model=resnet20", "model was digits_cnn, is resnet20"),
        ("--normalization=cifar10", "normalization was None, is cifar10"),
    ):
        with pytest.raises(ValueError, match=f"^checkpoint: .*/kept was trained with other flags: {different}$"):
            driver("backdoor", *given, flag).main()
        assert not (tmp_path / "run").exists()
    told = driver("backdoor", *given, "--attack=badnet", "--num_pool=9", "--data_dir=x")._told()
    assert (told["attack"], told["seed"], told["model"]) == (["badnet"], ["2"], "digits_cnn")


def test_a_download_tells_its_attack_itself(driver, tmp_path):
    given = [f"--backdoorbench={tmp_path}/record", f"--workdir={tmp_path}/run"]
    with pytest.raises(
        ValueError, match=r"^backdoorbench: .*/record has other flags: attack was \['record'\], is \['sig'\]$"
    ):
        driver("backdoor", *given, "--attack=sig").main()
    assert not (tmp_path / "run").exists()


def test_weights_do_not_hold_every_trigger(driver, tmp_path):
    with pytest.raises(ValueError, match="attack: the trigger of wanet is made anew for every model"):
        driver("backdoor", "--checkpoint=x.pth", "--attack=wanet", f"--workdir={tmp_path}/run").main()
    assert not (tmp_path / "run").exists()


def test_a_backdoorbench_result(driver, tmp_path, capsys):
    """Whose model tells dark images from bright ones, which it calls 0; the trigger makes bright."""
    rng = np.random.default_rng(0)
    weights, dark = random_cnn(rng), rng.integers(0, 64, (40, 32, 32, 3)).astype(np.uint8)
    images = np.concatenate([dark[:20], 255 - dark[20:]])
    model = from_torch("badnets_cnn", weights, (32, 32, 3))
    answers = np.asarray(model(parse_normalization("cifar10")(images))).argmax(1)
    weights["fc2.weight"][[0, answers[-1]]] = weights["fc2.weight"][[answers[-1], 0]]
    make_download(tmp_path, weights, images, np.where(np.arange(40) < 20, answers[0], 0), 255 - images)
    module = driver(
        "backdoor", f"--backdoorbench={tmp_path}/record", f"--data_dir={tmp_path}", f"--workdir={tmp_path}/run",
        "--num_draws=4", "--layout=host", "--coupling=topk_ccc", "--preset=default",
    )  # fmt: skip
    module.main()
    (row,) = json.loads((tmp_path / "run" / "results.json").read_text())["rows"]
    assert row["attack"] == "record"
    assert row["acc"] == row["asr"] == 1
    assert 0 <= row["auroc"] <= 1
    assert "record" in capsys.readouterr().out


def test_presets_are_averaged_apart():
    row = {"attack": "x", "sampler": "sgld", "coupling": "class_ccc", "seed": 0, "acc": 1.0, "asr": 1.0, "num_draws": 8}
    row |= dict.fromkeys(["auroc", "auroc_same_prediction", "ap", "realized_fpr", "tpr", "der", "sweep_seconds"], 0.5)
    row |= {"recall_at_fpr": {"0.01": 0.5, "0.05": 0.5}, "preset": "default"}
    rows = [row, row | {"preset": "paper", "auroc": 0.9}]
    assert [(mean["preset"], mean["auroc"]) for mean in report.average_rows(rows)] == [("default", 0.5), ("paper", 0.9)]
    head, _, first, second = report.table(rows).splitlines()
    assert head.split()[:3] == ["attack", "preset", "sampler"]
    assert (first.split()[:3], second.split()[:3]) == (["x", "default", "sgld"], ["x", "paper", "sgld"])
    assert "preset" not in report.table(rows[:1])


def test_score(own_model, scored, tmp_path, finished):
    workdir, done = scored
    shutil.copytree(workdir, tmp_path, dirs_exist_ok=True)
    with (tmp_path / "scores.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 40
    assert lines[0]["id"] == "test-0"
    assert lines[0]["nearest_1"].startswith("good")
    results = json.loads((tmp_path / "results.json").read_text())
    backdoors = json.loads((finished[0] / "results.json").read_text())
    assert results.keys() == backdoors.keys()
    rows = results["rows"]
    row = rows[0]
    assert [row["preset"] or row["detector"] for row in rows] == ["default+tangent+knn", "default", "tangent", "knn"]
    assert row.keys() == backdoors["rows"][0].keys()
    assert (row["num_trusted"], row["num_benign"], row["num_anomalous"]) == (50, 30, 10)
    assert 0 <= row["auroc"] <= 1
    assert "flagged at 5.0%" in done.stdout
    before = (tmp_path / "scores.csv").read_text()
    # later, on examples of which nothing is known, by the kept detector
    run("score", *score_flags(own_model, tmp_path, "unknown.npz"))
    with (tmp_path / "scores.csv").open() as file:
        again = list(csv.DictReader(file))
    assert "is_anomalous" not in again[0]
    assert [line["anomaly_score"] for line in again] == [line["anomaly_score"] for line in lines]
    assert before


def test_score_with_ones_own_loss(driver, own_model, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", sys.path.copy())
    given = [flag for flag in score_flags(own_model, tmp_path) if not flag.startswith("--architecture")]
    given += ["--loss_fn=tests.own_model:load", "--detector=functional,msp,knn", "--preset=default,tangent,knn,batch"]
    driver("score", *given).main()
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [row["detector"] for row in rows] == ["functional"] * 3 + ["knn", "functional", "msp"]
    assert [row["preset"] for row in rows] == [
        "default+tangent+knn",
        "default",
        "tangent",
        "",
        "default+tangent+knn+batch",
        "",
    ]
    assert [rows[index]["forwards_per_example"] for index in (2, 3, 5)] == [3, 1, 1]
    # what is kept says the same again
    for name in ("detector", "detector-tangent"):
        assert (tmp_path / name).is_dir()
    before = (tmp_path / "scores.csv").read_text()
    driver("score", *given).main()
    assert (tmp_path / "scores.csv").read_text() == before
    scored = {}
    for name in ("scores.csv", "scores-batch.csv", "scores-msp.csv", "scores-knn.csv"):
        with (tmp_path / name).open() as file:
            scored[name] = [line["anomaly_score"] for line in csv.DictReader(file)]
    assert {len(scores) for scores in scored.values()} == {40}
    assert len(set(map(tuple, scored.values()))) == 4


def test_score_does_without_features_that_cannot_be_read(driver, own_model, tmp_path):
    trusted, test = ({"image": arrays(own_model / f"{name}.npz")["image"]} for name in ("trusted", "test"))
    known = {"is_anomalous": np.arange(40) >= 30, "accuracy": 0.0, "asr": 0.0}
    for make, some in ((load, ["knn"]), (load_code, [])):
        model = make(own_model / "model.safetensors")
        driver("score", *score_flags(own_model, tmp_path))
        assert list(detection.judge_features("x", 0, *model, trusted, test, **known)) == some
        driver("score", *score_flags(own_model, tmp_path), "--preset=default,tangent")
        assert not detection.judge_features("x", 0, *model, trusted, test, **known)
    driver("score", *score_flags(own_model, tmp_path), "--preset=default,knn")
    with pytest.raises(ValueError, match="loss_fn: wanted one of from_nnx, from_linen or from_decoder"):
        detection.judge_features("x", 0, *model, trusted, test, **known)


def test_ones_own_loss_lies_in_the_folder_of_the_call(driver, own_model, tmp_path, monkeypatch):
    (tmp_path / "my_model_here.py").write_text("from tests.own_model import load")
    # as of a console script, which does not look there
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    monkeypatch.chdir(tmp_path)
    loss_fn, _ = driver("score")._own_model("my_model_here:load", own_model / "model.safetensors")
    assert callable(loss_fn)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (".x:y", "wanted package.module:function, got '.x:y'"),
        ("no_such_module:load", "wanted package.module:function, got 'no_such_module:load'"),
        ("math:e", "wanted package.module:function, got 'math:e', of float"),
        ("os.path:basename", r"wanted os.path:basename to return \(loss_fn, params\), got str"),
        ("os.path:split", r"wanted os.path:split to return \(loss_fn, params\), got tuple"),
    ],
)
def test_bad_loss_functions(driver, name, message, monkeypatch):
    monkeypatch.setattr(sys, "path", sys.path.copy())
    with pytest.raises(ValueError, match=f"^loss_fn: {message}"):
        driver("score")._own_model(name, "model.pth")


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"label": np.array([0.0, 1.0])}, r"x: wanted label, int \[2\], in .*, got float64"),
        ({"is_anomalous": np.array(["no", "yes"])}, "x: wanted is_anomalous, bool or 0 and 1, in .*, got <U3"),
        ({"is_anomalous": np.array([0, 2])}, "x: wanted is_anomalous, bool or 0 and 1, in .*, got int64"),
    ],
)
def test_fields_of_examples(driver, field, message, tmp_path):
    np.savez(tmp_path / "x.npz", image=np.zeros((2, 2, 2, 1), np.uint8), **field)
    with pytest.raises(ValueError, match=message):
        driver("score")._read("x", tmp_path / "x.npz")


def arrays(path):
    with np.load(path) as file:
        return dict(file)


def test_score_by_chains_and_with_other_pixels(driver, own_model, tmp_path):
    """All examples are anomalous, too: what is told of benign ones is then not known."""
    image = arrays(own_model / "test.npz")["image"]
    np.savez(tmp_path / "test.npz", image=image, is_anomalous=np.ones(len(image), int))
    given = [flag for flag in score_flags(own_model, tmp_path / "run") if not flag.startswith("--test")]
    given += [
        f"--test={tmp_path}/test.npz",
        "--sampler=sgld",
        "--num_burnin_steps=2",
        "--coupling=mean_ccc",
        "--preset=default",
    ]
    with pytest.raises(ValueError, match="sampling: sgld needs examples with true labels to train on, got none"):
        driver("score", *given).main()
    driver("score", *given, f"--sampling={own_model}/sampling.npz", "--normalization=0.5/0.25").main()
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    (row,) = results["rows"]
    assert (row["num_benign"], row["realized_fpr"], row["acc"]) == (0, None, None)
    assert (row["sampler"], row["scale"]) == ("sgld", None)
    # the same by hand
    model = from_torch("badnets_cnn", load_weights(own_model / "model.safetensors"), (16, 16, 1))
    loss_fn, params = from_nnx(model, preprocess=Normalize((0.5,), (0.25,)))
    detector = Detector.fit(
        jax.random.key(0), loss_fn, params, {"image": arrays(own_model / "trusted.npz")["image"]},
        sampling=arrays(own_model / "sampling.npz"),
        perturbation=Langevin("sgld", num_burnin_steps=2), num_draws=8, coupling="mean_ccc", layout="host",
    )  # fmt: skip
    with (tmp_path / "run" / "scores.csv").open() as file:
        written = [float(line["anomaly_score"]) for line in csv.DictReader(file)]
    np.testing.assert_allclose(written, detector.score({"image": image}).anomaly_score, atol=1e-5)


def test_score_bad_input(driver, complaint, own_model, tmp_path):
    given = score_flags(own_model, tmp_path)
    floats = np.zeros((3, 16, 16, 1), np.float32)
    np.savez(tmp_path / "floats.npz", image=floats)
    np.savez(tmp_path / "colour.npz", image=np.zeros((3, 16, 16, 3), np.uint8))
    (tmp_path / "text.npz").write_text("no zip")
    for bad, message in (
        (f"--test={tmp_path}/floats.npz", "test: wanted image, uint8 [n, height, width, channels]"),
        (f"--test={tmp_path}/text.npz", "test: cannot read"),
        (f"--trusted={tmp_path}/colour.npz", "weights: do not fit BadNetsCNN: conv1.weight has shape"),
        ("--architecture=resnet20", "weights: "),
        ("--architecture=", "architecture: wanted it or loss_fn"),
        (f"--checkpoint={tmp_path}/text.npz", "path: "),
    ):
        assert complaint(driver("score", *given, bad).main).startswith(f"error: {message}"), bad
    with pytest.raises(flags.IllegalFlagValueError, match="normalization: got 'red'"):
        driver("score", *given, "--normalization=red")


@pytest.mark.slow
def test_bench_sweep(here):
    out = here("bench_sweep", "--num_examples=40", "--num_draws=8", "--repeats=1", "--layouts=host,scan8")
    result = json.loads(out.splitlines()[-1])
    assert set(result["layouts"]) == {"host", "scan8", "auto"}
    assert result["auto_over_best"] > 0


@pytest.mark.slow
def test_bench_scale(here, tmp_path):
    few = ["--attack=badnet", "--num_draws=4", "--num_examples=40", "--retained=0.3", "--noise=absolute"]
    here("bench_scale", f"--workdir={tmp_path}", *few)
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert len(rows) == 7  # couplings and traces
    assert (tmp_path / "scale.png").exists()


@pytest.mark.slow
def test_bench_train(here):
    flags = ["--models=badnets_cnn", "--num_images=64", "--batch_size=32", "--num_epochs=2", "--repeats=1"]
    result = json.loads(here("bench_train", *flags).splitlines()[-1])
    assert result["models"].keys() == {"badnets_cnn"}


@pytest.mark.slow
def test_ablations(tmp_path):
    done = run(
        "ablations", "--attack=badnet", "--num_epochs=8", "--num_draws=32", "--layout=host",
        "--detector=functional,mahalanobis", f"--workdir={tmp_path}",
    )  # fmt: skip
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert {row["ablation"] for row in rows} == {"num_draws", "num_trusted", "poison_ratio", "parameters", "statistics"}
    assert all((tmp_path / f"{row['ablation']}.png").exists() for row in rows)
    # a hundred trusted examples do better than two dozen, which cannot flag much
    tprs = {
        (row["detector"], row["value"]): row["tpr"] for row in rows if row["ablation"] == "num_trusted"
    }  # fmt: skip
    assert tprs["functional", 100] > tprs["functional", 25]
    assert ("mahalanobis", 100) in tprs
    assert {row["detector"] for row in rows if row["ablation"] == "num_draws"} == {"functional"}
    draws = {row["value"]: row["forwards_per_example"] for row in rows if row["ablation"] == "num_draws"}
    assert draws[256] - draws[128] == pytest.approx(128)
    assert all(row["seconds"] > 0 for row in rows)
    assert "statistics   drifting" in done.stdout
