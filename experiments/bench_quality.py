r"""Detection against what it costs: AUROC and recall over forward passes per example, for every sampler.

    python -m experiments.bench_quality                        # digits alone
    python -m experiments.bench_quality --data=DATA            # and public checkpoints

Per model one run of the reference procedure (a chain of RMSprop-SGLD with 2,000 steps, plain traces, class correlation)
and one sweep a sampler, of which the leading draws are scored too. A gradient counts as three forward passes; what the
chains' own steps and the choice of the scale take counts as well. Writes results.json and quality.png; the last line of
output is JSON: how many times fewer forward passes than the reference's the defaults take at the least number of draws
from which on their AUROC is nowhere more than --tolerance below the reference's, the worst over the models.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import matplotlib.pyplot as plt
from absl import flags
from tqdm import tqdm

from experiments import cases, common
from madjax import Detector, Gaussian, Langevin, report
from madjax.coupling import DEFAULT
from madjax.sampling.perturbation import Perturbation
from madjax.scorer import Scorer, Traces

flags.DEFINE_string("data", None, "Folder with checkpoints and data sets; digits alone where not given.")
flags.DEFINE_string("workdir", "runs/quality", "Folder for results.")
flags.DEFINE_list("num_draws", ["8", "16", "32", "64", "128", "256"], "Leading draws that are scored, ascending.")
flags.DEFINE_integer("num_reference_draws", 1750, "Draws of the reference, after 250 steps.", lower_bound=4)
flags.DEFINE_integer("num_examples", 300, "Trusted, benign and anomalous examples, so many of each.", lower_bound=20)
flags.DEFINE_float("tolerance", 0.005, "AUROC that the defaults may lose to the reference.")
flags.DEFINE_integer("seed", 0, "Seed of training, splits and draws.")


class Sampler(NamedTuple):
    """How parameters are drawn and traces compared."""

    perturbation: Perturbation
    coupling: str = DEFAULT
    traces: Traces = "whitened"


REFERENCE = "reference"
OURS = "independent"


# the reference, the defaults, and what else draws near the trained parameters
SAMPLERS = {
    REFERENCE: Sampler(Langevin(drift=True), "class_correlation", "raw"),
    OURS: Sampler(Gaussian()),
    "antithetic": Sampler(Gaussian(antithetic=True)),
    "8 chains": Sampler(Langevin(num_chains=8, num_burnin_steps=20, num_steps_between_draws=5)),
    "independent, plain": Sampler(Gaussian(), "class_correlation", "raw"),
}

common.define_list("attack", ["badnet", "blended", "sig"], list(cases.ATTACKS), "Attacks of the digits models.")
common.define_list("sampler", [*SAMPLERS], [*SAMPLERS], "Samplers.")
common.define_list("published", list(cases.PUBLISHED), list(cases.PUBLISHED), "Public checkpoints under --data.")
common.define_layout()


def main() -> None:
    """Sweeps every model with every sampler."""
    values = flags.FLAGS
    names = ["data", "num_draws", "num_reference_draws", "num_examples", "tolerance", "seed", "attack", "sampler"]
    names += ["published"]
    workdir, config = common.open_workdir(values.workdir, names)
    models = cases.benchmark_models(values.attack, values.seed, values.data, values.published)
    rows = [row for name, make in tqdm(models.items(), unit="model") for row in _rows(name, make(), workdir)]
    result = {"device": common.device(), **_ratio(rows, values.tolerance)}
    report.write_json(workdir / "results.json", {"config": config, "result": result, "rows": rows})
    _plot(workdir / "quality.png", rows, list(models))
    print(json.dumps(result))


def _rows(model: str, case: cases.Case, workdir: Path) -> list[dict[str, Any]]:
    values, rows = flags.FLAGS, []
    test_set = cases.make_small_test_set(case, values.seed, (0.3, 0.2, 0.5), values.num_examples)
    counted, images, is_anomalous = test_set.counted, test_set.images, test_set.is_anomalous
    most = int(values.num_draws[-1])
    for name in values.sampler:
        sampler = SAMPLERS[name]
        is_chain = isinstance(sampler.perturbation, Langevin)
        num_draws = values.num_reference_draws if name == REFERENCE else most
        detector = Detector.fit(
            jax.random.key(values.seed),
            case.loss_fn,
            case.params,
            test_set.trusted,
            test={"image": images},
            sampling=test_set.sampling if is_chain else None,
            workdir=workdir / "traces" / f"{model}-{name}".replace(" ", "_"),
            perturbation=sampler.perturbation,
            num_draws=num_draws,
            coupling=sampler.coupling,
            traces=sampler.traces,
            layout=values.layout,
        )
        assert detector.test is not None
        losses, classes = detector.test
        count = detector.scorer.trusted.shape[1] + len(images)
        # chains pay for every step, the others once for their scale
        extra = detector.sample_forwards - detector.scorer.trusted.size
        for draws in [num_draws] if name == REFERENCE else map(int, values.num_draws):
            scorer = Scorer.fit(
                detector.scorer.trusted[:draws],
                detector.scorer.trusted_classes,
                coupling=sampler.coupling,
                traces=sampler.traces,
            )
            row = report.detection_row(
                scorer.score(losses[:draws], classes), is_anomalous, counted.accuracy, counted.asr, detector.fpr
            )
            rows.append(
                {
                    "model": model,
                    "sampler": name,
                    "num_draws": draws,
                    "forwards_per_example": draws + extra * (draws / num_draws if is_chain else 1) / count,
                    "auroc": row["auroc"],
                    "recall_at_1%": row["recall_at_fpr"]["0.01"],
                }
            )
            print(" ".join(f"{v:.3f}" if isinstance(v, float) else f"{v!s:<18}" for v in rows[-1].values()), flush=True)
    return rows


def _ratio(rows: list[dict[str, Any]], tolerance: float) -> dict[str, Any]:
    """See the module's docstring; without a number of draws that suffices, the ratio is None."""
    references = {row["model"]: row for row in rows if row["sampler"] == REFERENCE}
    if not references or OURS not in flags.FLAGS.sampler:
        return {}
    ours = {(row["model"], row["num_draws"]): row for row in rows if row["sampler"] == OURS}
    counts = sorted({count for _, count in ours})
    enough = [
        count
        for count in counts
        if all(
            ours[model, more]["auroc"] >= reference["auroc"] - tolerance
            for model, reference in references.items()
            for more in counts[counts.index(count) :]
        )
    ]
    count = enough[0] if enough else counts[-1]
    ratios = [
        row["forwards_per_example"] / ours[model, count]["forwards_per_example"] for model, row in references.items()
    ]
    return {
        "forward_pass_ratio": min(ratios) if enough else None,
        "num_draws": count,
        "models": list(references),
        "auroc_reference": [row["auroc"] for row in references.values()],
        "auroc_ours": [ours[model, count]["auroc"] for model in references],
    }


def _plot(path: Path, rows: list[dict[str, Any]], models: list[str]) -> None:
    figure, grid = plt.subplots(
        2, len(models), figsize=(2.6 * len(models), 5.2), sharex=True, sharey="row", layout="constrained", squeeze=False
    )
    for axes_of_figure, figure_name in zip(grid, ("auroc", "recall_at_1%"), strict=True):
        for axes, model in zip(axes_of_figure, models, strict=True):
            for name in flags.FLAGS.sampler:
                points = [
                    (row["forwards_per_example"], row[figure_name])
                    for row in rows
                    if (row["model"], row["sampler"]) == (model, name)
                ]
                axes.plot(*zip(*points, strict=True), "-o", markersize=4, label=name)
            axes.set_xscale("log")
            axes.grid(alpha=0.3)
            axes.set_title(model if figure_name == "auroc" else "", fontsize=9)
        axes_of_figure[0].set_ylabel({"auroc": "AUROC"}.get(figure_name, "recall at 1 % false positives"))
    report.save_grid(path, figure, grid, "forward passes an example")


if __name__ == "__main__":
    common.run(main)
