"""Slow, obvious versions of what the package does fast."""

import jax
import numpy as np
from sklearn.linear_model import Ridge


def loss_matrix(loss_fn, draws, examples):
    rows = []
    for item in draws.items():
        params = draws.params(item)
        count = len(jax.tree.leaves(examples)[0])
        rows.append([float(loss_fn(params, {k: v[i : i + 1] for k, v in examples.items()})[0]) for i in range(count)])
    return np.array(rows, np.float32)


def pair(kind, x, y):
    if kind == "correlation":
        return np.corrcoef(x, y)[0, 1] if x.std() > 0 and y.std() > 0 else 0.0
    covariance = np.mean((x - x.mean()) * (y - y.mean()))
    if kind == "covariance":
        return covariance
    return 2 * covariance / (x.var() + y.var() + (x.mean() - y.mean()) ** 2)


def information(trusted, test, num_parts=1):
    """Nats, by what a ridge regression on each part of the draws leaves of the test trace."""
    if num_parts > 1:
        return sum(map(information, np.split(trusted, num_parts), np.split(test, num_parts)))
    centered = [traces.astype(float) - traces.astype(float).mean(0) for traces in (trusted, test)]
    x, y = (traces / np.linalg.norm(traces, axis=0) for traces in centered)
    ridge = 0.3 * max(1.0, trusted.shape[1] / len(trusted))
    weights = Ridge(ridge, fit_intercept=False, solver="cholesky").fit(x, y).coef_
    return -np.log(np.square(y - x @ weights).sum() + ridge * np.square(weights).sum()) / 2


def coupling(kind, reduction, trusted, test, classes, top_k, leave_out=None, peers=40, num_parts=1):
    """One test trace against the trusted ones, without the one at `leave_out`."""
    values, groups = [], []
    for index in range(trusted.shape[1]):
        if index != leave_out:
            values.append(pair(kind, trusted[:, index], test))
            groups.append(classes[index])
    values, groups = np.array(values), np.array(groups)
    if reduction == "mean":
        return values.mean()
    top = np.sort(values)[-top_k:].mean()
    if reduction == "topk":
        return top
    if reduction in ("peer", "peer_joint"):
        others = [i for i in range(trusted.shape[1]) if i != leave_out]
        own = []
        for j in others:
            rest = [i for i in others if i != j]
            if reduction == "peer_joint":
                own.append(information(trusted[:, rest], trusted[:, j], num_parts))
            else:
                own.append(np.sort([pair(kind, trusted[:, i], trusted[:, j]) for i in rest])[-top_k:].mean())
        distances = [abs(trusted[:, j].astype(float).mean() - test.astype(float).mean()) for j in others]
        of_peers = np.array(own)[np.argsort(distances)[:peers]].mean()
        if reduction == "peer_joint":
            spread = trusted[:, others].astype(float).mean(0).std()
            fade = np.exp(-np.square(np.sort(distances)[:peers] / (5 * spread)) / 2).mean()
            return fade * information(trusted[:, others], test, num_parts) - of_peers
        return np.sign(top) * abs(top) ** 0.5 - np.sign(of_peers) * abs(of_peers) ** 0.5
    if reduction in ("cluster", "topk_class"):
        shrunk = max(values[groups == group].sum() / (20 + (groups == group).sum()) for group in np.unique(groups))
        return shrunk if reduction == "cluster" else (top + shrunk) / 2
    return max(values[groups == group].mean() for group in np.unique(groups))
