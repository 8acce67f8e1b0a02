"""One of several hosts: sweeps, and writes what it got. Arguments: port, number of hosts, this host, folder."""

import sys

import numpy as np

from madjax import hosts, loss_matrix
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


if __name__ == "__main__":
    port, num_hosts, host, folder = sys.argv[1:]
    hosts.connect(f"127.0.0.1:{port}", int(num_hosts), int(host), timeout=120)
    np.savez(f"{folder}/host-{host}.npz", **sweeps(folder))
