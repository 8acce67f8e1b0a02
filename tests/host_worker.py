"""One of several hosts: sweeps, and writes what it got. Arguments: port, number of hosts, this host, folder."""

import sys

import jax
import numpy as np

from madjax import Detector, Gaussian, hosts, loss_matrix
from madjax.store import TraceStore
from tests import linear


def sweeps(folder):
    """The matrix without a store, of fewer examples than hosts, and of chains in a store."""
    examples, few = linear.examples(), linear.examples(3)
    store = TraceStore(folder, {}, {"test": 37})
    return {
        "plain": loss_matrix(linear.loss_fn, linear.independent(6), examples, batch_size=8),
        "few": loss_matrix(linear.loss_fn, linear.independent(6), few, layout="host"),
        "chains": loss_matrix(linear.loss_fn, linear.chains(6), examples, layout="scan2", batch_size=8, store=store),
    }


class Watched:
    """Images that tell which of them were looked at."""

    # so that they are not looked through for numbers that are not finite
    dtype = np.dtype(np.uint8)

    def __init__(self, array):
        self.array, self.shape, self.ndim, self.seen = array, array.shape, array.ndim, set()

    def __len__(self):
        return len(self.array)

    def __getitem__(self, rows):
        self.seen.update(range(*rows.indices(len(self.array))))
        return self.array[rows]

    def __array__(self, dtype=None, copy=None):
        raise AssertionError("all rows were asked for")


def looked_at(folder):
    """Which rows of 40 test examples this host looked at for a detector with 8 trusted ones."""
    trusted, test = linear.examples(8), linear.examples(40)
    watched = Watched(test["image"])
    Detector.fit(
        jax.random.key(0), linear.loss_fn, linear.params(), trusted, test={**test, "image": watched},
        perturbation=Gaussian(scale=0.1), num_draws=4, layout="host", coupling="topk_ccc", workdir=folder,
    )  # fmt: skip
    return sorted(watched.seen)


if __name__ == "__main__":
    port, num_hosts, host, folder = sys.argv[1:]
    hosts.connect(f"127.0.0.1:{port}", int(num_hosts), int(host), timeout=120)
    np.savez(f"{folder}/host-{host}.npz", looked_at=looked_at(f"{folder}/detector"), **sweeps(folder))
