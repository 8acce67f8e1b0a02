"""A sweep to be killed: fits a detector slowly enough to be hit. Arguments: folder, "chains" or not, draws."""

import sys
import time

import jax

from madjax import Detector, Gaussian, Langevin, sweep
from tests import linear


def fit(folder, kind, num_draws):
    sweep.BLOCK, call = 4, sweep._block

    def slowly(*args):
        time.sleep(0.05)
        return call(*args)

    sweep._block = slowly
    examples = linear.examples(90)
    Detector.fit(
        jax.random.key(0),
        linear.loss_fn,
        linear.params(),
        {name: array[:50] for name, array in examples.items()},
        test={name: array[50:] for name, array in examples.items()},
        sampling=linear.examples(),
        perturbation=Langevin(num_burnin_steps=4) if kind == "chains" else Gaussian(scale=0.1),
        num_draws=num_draws,
        layout="host",
        workdir=folder,
    )


if __name__ == "__main__":
    jax.config.update("jax_enable_compilation_cache", False)  # a killed process may leave half an entry to others
    fit(sys.argv[1], sys.argv[2], int(sys.argv[3]))
