r"""What sequential stopping and bfloat16 save, and what they do to detection.

    python -m experiments.bench_shortcuts                      # digits alone
    python -m experiments.bench_shortcuts --data=DATA          # and public checkpoints

A detector with the defaults is fitted on every model and scores its test examples three times: with all draws, with
`Sequential`, and with the network computing in bfloat16 (parameters, draws and losses stay float32). Prints a row a
model and, as the last line, JSON: the AUROC of each, the share of verdicts that differ from those of the first, the
draws that a benign and an anomalous example took on average, and between the couplings in bfloat16 and in float32 the
correlation and the largest difference.
"""

from __future__ import annotations

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx

from experiments import cases, common
from madjax import Detector, Scores, from_nnx
from madjax.metrics import auroc
from madjax.stopping import Sequential

flags.DEFINE_string("data", None, "Folder with checkpoints and data sets; digits alone where not given.")
flags.DEFINE_integer("num_draws", 128, "Draws of the detector.", lower_bound=4)
flags.DEFINE_integer("num_examples", 300, "Trusted, benign and anomalous examples, so many of each.", lower_bound=20)
flags.DEFINE_integer("seed", 0, "Seed of training, splits and draws.")
common.define_list("attack", ["badnet", "blended", "sig"], list(cases.ATTACKS), "Attacks of the digits models.")
common.define_list("published", list(cases.PUBLISHED), list(cases.PUBLISHED), "Public checkpoints under --data.")
common.define_list("shortcut", ["stopping", "bfloat16"], ["stopping", "bfloat16"], "What to measure.")
common.define_layout()


def main() -> None:
    """Scores every model's test examples in every way."""
    values = flags.FLAGS
    results = {}
    for name, make in cases.benchmark_models(values.attack, values.seed, values.data, values.published).items():
        results[name] = _measure(make())
        print(f"{name:<16}", *(f"{key} {value:.4g}" for key, value in results[name].items()), flush=True)
    config = {name: values[name].value for name in ("num_draws", "num_examples", "seed", "layout")}
    print(json.dumps({"device": common.device(), "config": config, "models": results}))


def _measure(case: cases.Case) -> dict[str, Any]:
    values = flags.FLAGS
    test_set = cases.make_small_test_set(case, values.seed, (0.4, 0.6), values.num_examples)
    is_anomalous, test = test_set.is_anomalous, {"image": test_set.images}

    def fit(case: cases.Case) -> Detector:
        return Detector.fit(
            jax.random.key(values.seed), case.loss_fn, case.params, test_set.trusted, num_draws=values.num_draws,
            layout=values.layout,
        )  # fmt: skip

    detector = fit(case)
    full = detector.score(test)
    result = {"auroc": _auroc(full, is_anomalous)}
    if "stopping" in values.shortcut:
        scores, num_draws = Sequential.fit(detector).score(test)
        result |= {
            "auroc_stopping": _auroc(scores, is_anomalous),
            "changed_stopping": float(np.mean(scores.flagged != full.flagged)),
            "draws_benign": float(num_draws[~is_anomalous].mean()),
            "draws_anomalous": float(num_draws[is_anomalous].mean()),
        }
    if "bfloat16" in values.shortcut:
        scores = fit(_in_bfloat16(case)).score(test)
        result |= {
            "auroc_bfloat16": _auroc(scores, is_anomalous),
            "changed_bfloat16": float(np.mean(scores.flagged != full.flagged)),
            "correlation_bfloat16": float(np.corrcoef(scores.anomaly_score, full.anomaly_score)[0, 1]),
            "largest_difference_bfloat16": float(np.abs(scores.anomaly_score - full.anomaly_score).max()),
        }
    return result


def _auroc(scores: Scores, is_anomalous: np.ndarray) -> float:
    return auroc(scores.anomaly_score[~is_anomalous], scores.anomaly_score[is_anomalous])


def _in_bfloat16(case: cases.Case) -> cases.Case:
    """The same network with all layers but the last computing in bfloat16, as `build_model(dtype=...)` makes it."""
    module = case.loss_fn.module
    model: Any = nnx.merge(module.graphdef, module.rng_state, case.params)
    for path, layer in nnx.iter_modules(model):
        if isinstance(layer, nnx.Conv | nnx.Linear | nnx.BatchNorm) and ".".join(map(str, path)) != model.HEAD:
            layer.dtype = jnp.bfloat16
    loss_fn, params = from_nnx(model, preprocess=module.preprocess)
    return case._replace(loss_fn=loss_fn, params=params)


if __name__ == "__main__":
    common.run(main)
