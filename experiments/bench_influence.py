r"""Do couplings rank training examples as retraining without them does? Leave-one-out on digits, and subsets.

    python -m experiments.bench_influence

The model is a softmax regression on scikit-learn's digits with a quadratic penalty, so that its optimum is unique and
retraining exact: Newton's method to a gradient of 1e-9, in float64. True effects are the change of every test example's
loss (against the model's own prediction) by retraining without one training example, and the loss itself after training
on random halves. Against them stand exact influence functions, those of Arnoldi's iteration (30 eigenvectors), the
inner product of gradients, and pair measures of loss traces at draws of the parameters: those that the Detector makes
(independent, of its own scale), and draws from the Gaussian approximation of the posterior, whose covariance is the
influence function as draws grow in number. Prints Spearman's rank correlations over training examples (leave-one-out)
or over halves (of the sum over the half, as the linear datamodeling score of Park et al. 2023, arXiv 2303.14186), means
over test examples with the standard error; writes results.json.
"""

from __future__ import annotations

import json
from typing import Any

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from scipy.special import log_softmax, softmax
from scipy.stats import spearmanr

from experiments import common
from madjax import Gaussian, from_linen, loss_matrix, report
from madjax.baselines.influence import leading_eigenvectors
from madjax.coupling import Pair, pairs
from madjax.data import digits
from madjax.sampling.draws import StoredDraws
from madjax.traces import fit_trace_map

flags.DEFINE_string("workdir", "runs/influence", "Folder for results.")
flags.DEFINE_integer("num_train", 200, "Training examples.", lower_bound=20)
flags.DEFINE_integer("num_test", 100, "Test examples.", lower_bound=2)
flags.DEFINE_integer("num_subsets", 100, "Random halves of the training examples.", lower_bound=3)
flags.DEFINE_list("num_draws", ["128", "2048"], "Draws of the parameters.")
flags.DEFINE_float("penalty", 1e-2, "Of half the squared norm of the parameters, beside the mean loss.")
flags.DEFINE_integer("seed", 0, "Seed of split, subsets and draws.")


def main() -> None:
    """Retrains, attributes and compares."""
    values = flags.FLAGS
    names = ["num_train", "num_test", "num_subsets", "num_draws", "penalty", "seed"]
    workdir, config = common.open_workdir(values.workdir, names)
    rng = np.random.default_rng(values.seed)
    images, labels = digits()
    order = rng.permutation(len(images))[: values.num_train + values.num_test]
    x = np.concatenate([images[order].reshape(len(order), -1) / 255, np.ones((len(order), 1))], axis=1)
    train, test = np.split(np.arange(len(order)), [values.num_train])
    y = labels[order]
    weights = fit(x[train], y[train], values.penalty)
    explained = np.concatenate([y[train], (x[test] @ weights).argmax(axis=1)])
    before = losses(weights, x[test], explained[test])
    removed = [np.delete(train, i) for i in train]
    effects = np.stack([losses(fit(x[r], y[r], values.penalty, weights), x[test], explained[test]) for r in removed])
    effects = effects - before
    halves = [np.sort(rng.permutation(train)[: len(train) // 2]) for _ in range(values.num_subsets)]
    after = np.stack([losses(fit(x[h], y[h], values.penalty, weights), x[test], explained[test]) for h in halves])
    member = np.stack([np.isin(train, half) for half in halves])
    rows = []
    for name, attribution in _attributions(x, explained, train, test, weights).items():
        leave_one_out = _rank_agreement(attribution, effects)
        subsets = _rank_agreement(member @ attribution, -after)
        rows.append({"attribution": name, **_summary("loo", leave_one_out), **_summary("lds", subsets)})
    accuracy = float(((x[test] @ weights).argmax(axis=1) == y[test]).mean())
    result = {"device": common.device(), "accuracy": accuracy, "mean_effect": float(np.abs(effects).mean())}
    report.write_json(workdir / "results.json", {"config": config, "result": result, "rows": rows})
    print(f"{'attribution':<38} {'leave-one-out':>16} {'halves':>16}")
    for row in rows:
        loo, lds = (f"{row[name]:.3f} ± {row[f'{name}_error']:.3f}" for name in ("loo", "lds"))
        print(f"{row['attribution']:<38} {loo:>16} {lds:>16}")
    print(json.dumps(result))


def losses(weights: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Float64 `[n]`, in nats."""
    return -log_softmax(x @ weights, axis=1)[np.arange(len(y)), y]


def gradients(weights: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Float64 `[n, num_parameters]` of the losses."""
    error = softmax(x @ weights, axis=1)
    error[np.arange(len(y)), y] -= 1
    return (x[:, :, None] * error[:, None]).reshape(len(y), -1)


def hessian(weights: np.ndarray, x: np.ndarray, penalty: float) -> np.ndarray:
    """Of the mean loss and the penalty."""
    p = softmax(x @ weights, axis=1)
    inner = p[:, :, None] * np.eye(p.shape[1]) - p[:, :, None] * p[:, None]
    size = weights.size
    blocks = [(x * inner[:, i, j, None]).T @ x / len(x) for i in range(p.shape[1]) for j in range(p.shape[1])]
    count = x.shape[1]
    whole = np.reshape(blocks, (p.shape[1], p.shape[1], count, count)).transpose(2, 0, 3, 1).reshape(size, size)
    return whole + penalty * np.eye(size)


def fit(x: np.ndarray, y: np.ndarray, penalty: float, start: np.ndarray | None = None) -> np.ndarray:
    """The optimum `[num_features, 10]`: Newton's method, whose Hessian is made anew while steps stay large.

    Raises:
      FloatingPointError: where it is not reached.
    """
    weights = np.zeros((x.shape[1], 10)) if start is None else start.copy()
    inverse = None
    before = np.inf
    for _ in range(100):
        gradient = gradients(weights, x, y).mean(axis=0) + penalty * weights.ravel()
        size = float(np.linalg.norm(gradient))
        if size < 1e-9:
            return weights
        if inverse is None or size > 0.3 * before:
            inverse = np.linalg.inv(hessian(weights, x, penalty))
        before = size
        weights = weights - (inverse @ gradient).reshape(weights.shape)
    raise FloatingPointError(f"penalty: {penalty} left a gradient of {size:.1e} after 100 steps")


def _attributions(
    x: np.ndarray, y: np.ndarray, train: np.ndarray, test: np.ndarray, weights: np.ndarray
) -> dict[str, np.ndarray]:
    """Float64 `[num_train, num_test]` each, high = removing the training example raises the test loss."""
    values = flags.FLAGS
    gradient = gradients(weights, x, y)
    curvature = hessian(weights, x[train], values.penalty)
    spectrum, axes = leading_eigenvectors(lambda vector: curvature @ vector, len(curvature), 60)
    spectrum, axes = spectrum[-30:], axes[:, -30:]
    projected = gradient @ axes / np.sqrt(spectrum)
    found = {
        "influence, exact": gradient[train] @ np.linalg.solve(curvature, gradient[test].T),
        "influence, Arnoldi": projected[train] @ projected[test].T,
        "gradients": gradient[train] @ gradient[test].T,
    }
    rng = np.random.default_rng(values.seed)
    loss_fn, params = from_linen(flax.linen.Dense(10), _params(weights[None]))
    params = jax.tree.map(lambda leaf: leaf[0], params)
    examples = {"image": x[:, :-1].astype(np.float32), "label": y.astype(np.int32)}
    trusted = jax.tree.map(lambda leaf: leaf[train], examples)
    for num_draws in map(int, values.num_draws):
        root = np.linalg.cholesky(np.linalg.inv(len(train) * curvature))
        near = weights.ravel() + rng.normal(size=(num_draws, len(root))) @ root.T
        posterior = StoredDraws(_params(near.reshape(num_draws, *weights.shape)))
        ours = Gaussian().perturb(jax.random.key(values.seed), loss_fn, params, trusted, None, num_draws).draws
        for name, draws in (("posterior", posterior), ("Detector", ours)):
            matrix = loss_matrix(loss_fn, draws, examples, layout="host")
            raw, mapped = matrix.astype(np.float64), fit_trace_map(matrix[:, train])(matrix)
            measures: tuple[tuple[str, np.ndarray, Pair], ...] = (
                ("covariance", raw, "covariance"), ("correlation", raw, "correlation"),
                ("ccc, whitened", mapped, "ccc"),
            )  # fmt: skip
            for label, traces, pair in measures:
                measured = pairs(pair, traces[:, train], traces[:, test])
                found[f"{name}, {num_draws} draws, {label}"] = measured
    return found


def _params(weights: np.ndarray) -> Any:
    kernel, bias = weights[:, :-1].astype(np.float32), weights[:, -1].astype(np.float32)
    return {"params": {"kernel": jnp.asarray(kernel), "bias": jnp.asarray(bias)}}


def _rank_agreement(predicted: np.ndarray, actual: np.ndarray) -> np.ndarray:
    """Spearman's correlation down the rows, for every column."""
    return np.array([spearmanr(p, a)[0] for p, a in zip(predicted.T, actual.T, strict=True)])


def _summary(name: str, agreement: np.ndarray) -> dict[str, float]:
    return {name: float(agreement.mean()), f"{name}_error": float(agreement.std(ddof=1) / np.sqrt(len(agreement)))}


if __name__ == "__main__":
    common.run(main)
