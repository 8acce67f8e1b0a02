"""One of several hosts: sweeps, and writes what it got. Arguments: port, number of hosts, this host, folder."""

import sys

import jax
import numpy as np

from madjax import from_nnx, hosts, loss_matrix
from madjax.models import DigitsCNN
from madjax.sampling import ChainDraws, Target, gaussian, sgld
from madjax.store import TraceStore


def problem():
    from flax import nnx

    loss_fn, params = from_nnx(DigitsCNN(rngs=nnx.Rngs(0)), preprocess=lambda image: image.astype("float32") / 255)
    rng = np.random.default_rng(0)
    examples = {
        "image": rng.integers(0, 256, (37, 8, 8, 1)).astype(np.uint8),
        "label": rng.integers(0, 10, 37).astype(np.int32),
    }
    mask = loss_fn.is_trainable(params)
    independent = gaussian(jax.random.key(0), params, 0.1, num_draws=6, mask=mask)
    chain = ChainDraws(
        jax.random.key(0), sgld(loss_fn, mask), Target(params, 10.0, 100.0), examples, num_draws=6, num_burnin_steps=2,
        step_size=1e-4, batch_size=16,
    )  # fmt: skip
    return loss_fn, independent, chain, examples


def sweeps(folder):
    """The matrix without a store, of fewer examples than hosts, and of a chain in a store."""
    loss_fn, independent, chain, examples = problem()
    few = {name: array[:3] for name, array in examples.items()}
    store = TraceStore(folder, {}, {"test": 37})
    return {
        "plain": loss_matrix(loss_fn, independent, examples, layout="host", batch_size=8),
        "few": loss_matrix(loss_fn, independent, few, layout="host"),
        "chain": loss_matrix(loss_fn, chain, examples, layout="host", batch_size=8, store=store),
    }


if __name__ == "__main__":
    port, num_hosts, host, folder = sys.argv[1:]
    hosts.connect(f"127.0.0.1:{port}", int(num_hosts), int(host), timeout=120)
    np.savez(f"{folder}/host-{host}.npz", **sweeps(folder))
