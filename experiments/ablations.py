r"""What detection depends on, one figure each: draws, trusted examples, poison ratio, parameters drawn, statistics.

    python -m experiments.ablations --workdir=runs/ablations --seed=0

Some minutes on 2 CPU cores for digits. Takes the data set and training flags of experiments.backdoor. All but what a
figure varies stays at the defaults; "statistics" compares chains of the paper's kernel, on plain traces, whose batch
statistics are frozen or drift. Rivals (`--detector=functional,mahalanobis`) join where it may change them, with the
number of trusted examples and the poison ratio. Seconds are those of a fit and of scoring, compilation counted.
Writes results.json (a row a setting, detector, attack and seed) and <ablation>.png.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import matplotlib.pyplot as plt
import numpy as np
from absl import flags
from flax import nnx
from tqdm import tqdm

from experiments import cases, common, detection
from madjax import Detector, Gaussian, Langevin, report
from madjax.attacks import ATTACKS
from madjax.sampling.perturbation import Perturbation

common.define_training_flags()
common.define_list("attack", ["badnet", "blended", "sig"], list(ATTACKS), "Attacks.")
common.define_seeds()
detection.define_detectors(with_ours=True)
flags.DEFINE_integer("num_draws", 128, "Draws where their number is not what varies.", lower_bound=8)
common.define_layout()
flags.DEFINE_string("workdir", "runs/ablations", "Folder for results.")

_NUM_DRAWS = (8, 16, 32, 64, 128, 256)
_NUM_TRUSTED = (25, 50, 100, 200, 400)
_POISON_RATIOS = (0.01, 0.02, 0.05, 0.1, 0.2)
_FPR = 0.05
# title, key, digits
_SHOWN = (
    ("AUROC", "auroc", 3), ("FPR", "realized_fpr", 3), ("TPR", "tpr", 3), ("DER", "der", 3),
    ("seconds", "seconds", 1), ("forwards", "forwards_per_example", 1),
)  # fmt: skip


class _Cell:
    """One model, its counted examples, and detectors on them."""

    def __init__(self, attack: str, seed: int, poison_ratio: float | None = None):
        recipe = common.recipe_from_flags()
        if poison_ratio is not None:
            recipe = recipe._replace(poison_ratio=poison_ratio)
        folder = Path(flags.FLAGS.workdir) / "models" / f"{attack}-{seed}-{recipe.poison_ratio}"
        self.attack, self.seed = attack, seed
        self.case = cases.train_case(attack, seed, recipe, folder)
        self.test = cases.make_test_set(self.case, attack, seed)

    def ours(
        self, perturbation: Perturbation, num_draws: int, num_trusted: int | None = None, **settings: Any
    ) -> dict[str, Any]:
        start, trusted = time.perf_counter(), self._trusted(num_trusted)
        detector = Detector.fit(
            jax.random.key(self.seed),
            self.case.loss_fn,
            self.case.params,
            trusted,
            sampling=self.test.sampling,
            perturbation=perturbation,
            num_draws=num_draws,
            layout=flags.FLAGS.layout,
            **settings,
        )
        scores = detector.score({"image": self.test.images})
        counted, num_test = self.test.counted, len(self.test.images)
        return {
            "detector": detection.FUNCTIONAL,
            **report.detection_row(scores, self.test.is_anomalous, counted.accuracy, counted.asr, _FPR),
            "seconds": time.perf_counter() - start,
            "forwards_per_example": detection.sample_forwards(detector, num_test) / (len(trusted["image"]) + num_test),
        }

    def rivals(self, num_trusted: int | None = None) -> Iterator[dict[str, Any]]:
        counted, test = self.test.counted, {"image": self.test.images}
        for rival in detection.fit_rivals(self.case.loss_fn, self.case.params, self._trusted(num_trusted), fpr=_FPR):
            yield detection.rival_row(
                self.attack, self.seed, rival, test, self.test.is_anomalous, accuracy=counted.accuracy, asr=counted.asr
            )[0]

    def _trusted(self, count: int | None) -> dict[str, Any]:
        """The first ones, which lie in random order; all where `count` is None or more than there are."""
        return jax.tree.map(lambda leaf: leaf[:count], self.test.trusted)


def main() -> None:
    """Runs all ablations on all models."""
    values = flags.FLAGS
    names = [*common.TRAINING_FLAGS, "attack", "seed", "detector", "num_draws"]
    workdir, config = common.open_workdir(values.workdir, names)
    rows: list[dict[str, Any]] = []
    cells = [(attack, int(seed)) for seed in values.seed for attack in values.attack]
    for attack, seed in tqdm(cells, desc="cells", unit="cell"):
        cell = _Cell(attack, seed)
        for name, ablation in _ABLATIONS.items():
            for value, row in ablation(cell):
                rows.append({"ablation": name, "value": value, "attack": attack, "seed": seed, **row})
    report.write_json(workdir / "results.json", {"config": config, "device": common.device(), "rows": rows})
    for name in _ABLATIONS:
        _plot(workdir / f"{name}.png", name, [row for row in rows if row["ablation"] == name])
        settings = [(row["value"], row["detector"]) for row in rows if row["ablation"] == name]
        for setting in dict.fromkeys(settings):
            chosen = [row for row in rows if (row["ablation"], row["value"], row["detector"]) == (name, *setting)]
            means = [f"{label} {np.nanmean([row[key] for row in chosen]):.{digits}f}" for label, key, digits in _SHOWN]
            print(f"{name:<12} {setting[0]!s:<12} {setting[1]:<20}", *means)
    print(f"results in {workdir}")


def _num_draws(cell: _Cell) -> Iterator[tuple[Any, dict[str, Any]]]:
    for count in _NUM_DRAWS:
        yield count, cell.ours(Gaussian(), count)


def _num_trusted(cell: _Cell) -> Iterator[tuple[Any, dict[str, Any]]]:
    for count in _NUM_TRUSTED:
        yield count, cell.ours(Gaussian(), flags.FLAGS.num_draws, count)
        yield from ((count, row) for row in cell.rivals(count))


def _poison_ratio(cell: _Cell) -> Iterator[tuple[Any, dict[str, Any]]]:
    for ratio in _POISON_RATIOS:
        other = _Cell(cell.attack, cell.seed, ratio)
        if len(other.test.counted.triggered) < 20:
            continue  # the backdoor was not learned: there is nothing to find
        yield ratio, other.ours(Gaussian(), flags.FLAGS.num_draws)
        yield from ((ratio, row) for row in other.rivals())


def _parameters(cell: _Cell) -> Iterator[tuple[Any, dict[str, Any]]]:
    module = cell.case.loss_fn.module
    head = nnx.merge(module.graphdef, module.rng_state, cell.case.params).HEAD
    for name, pattern in {"all": None, "kernels": "kernel", "biases": "bias", "last layer": f"{head}/"}.items():
        yield name, cell.ours(Gaussian(parameters=pattern), flags.FLAGS.num_draws)


def _statistics(cell: _Cell) -> Iterator[tuple[Any, dict[str, Any]]]:
    for name, drift in {"frozen": False, "drifting": True}.items():
        chain = Langevin(num_burnin_steps=50, num_steps_between_draws=4, drift=drift)
        yield name, cell.ours(chain, flags.FLAGS.num_draws, coupling="class_correlation", traces="raw")


_ABLATIONS: dict[str, Callable[[_Cell], Iterator[tuple[Any, dict[str, Any]]]]] = {
    "num_draws": _num_draws,
    "num_trusted": _num_trusted,
    "poison_ratio": _poison_ratio,
    "parameters": _parameters,
    "statistics": _statistics,
}


def _plot(path: Path, name: str, rows: list[dict[str, Any]]) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    values = list(dict.fromkeys(row["value"] for row in rows))
    for attack, detector in dict.fromkeys((row["attack"], row["detector"]) for row in rows):
        own = [row for row in rows if (row["attack"], row["detector"]) == (attack, detector)]
        label = attack if detector == detection.FUNCTIONAL else f"{attack}, {detector}"
        for axis, key in zip(axes, ("auroc", "der"), strict=True):
            shown = [[row[key] for row in own if row["value"] == value] for value in values]
            report.plot_ranges(axis, list(map(str, values)), shown, label)
    for axis, label in zip(axes, ("AUROC", "DER"), strict=True):
        axis.set(xlabel=name.replace("_", " "), ylabel=label)
    axes[0].legend()
    figure.suptitle("mean and range over seeds", fontsize=9)
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    common.run(main)
