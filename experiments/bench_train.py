r"""Speed of training: images a second, per model, on this device.

    python -m experiments.bench_train --models=badnets_cnn,wrn16_1

Every model is trained for one epoch and for --num_epochs; what the second takes longer is the time of the epochs, and
the rest is compilation. The median of --repeats such pairs. Prints a table, and JSON as the last line.
"""

from __future__ import annotations

import json
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx

from experiments import common
from madjax.data import parse_normalization
from madjax.models import build_model, train_classifier
from madjax.models.augment import Augmentation

flags.DEFINE_list("models", ["badnets_cnn", "wrn16_1", "resnet20"], "Names of models, 32×32 colour images.")
flags.DEFINE_integer("num_images", 2560, "Images of an epoch.", lower_bound=1)
flags.DEFINE_integer("num_epochs", 3, "Epochs of the longer training.", lower_bound=2)
flags.DEFINE_integer("batch_size", 128, "Images of a step.", lower_bound=1)
flags.DEFINE_integer("repeats", 3, "Pairs of trainings.", lower_bound=1)
flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of the model's computation.")


def main() -> None:
    """Times all models."""
    values, results = flags.FLAGS, {}
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (values.num_images, 32, 32, 3)).astype(np.uint8)
    labels = rng.integers(0, 10, values.num_images).astype(np.int32)
    seen = values.num_images // values.batch_size * values.batch_size * (values.num_epochs - 1)
    print(f"{'model':<16} {'images/s':>9} {'compile s':>9}")
    for name in values.models:
        pairs = [
            [_train(name, images, labels, epochs) for epochs in (1, values.num_epochs)] for _ in range(values.repeats)
        ]
        epochs = statistics.median(long - short for short, long in pairs)
        compilation = statistics.median(short for short, _ in pairs) - epochs / (values.num_epochs - 1)
        results[name] = {"images_per_second": seen / epochs, "compile_seconds": compilation}
        print(f"{name:<16} {seen / epochs:>9.0f} {compilation:>9.1f}", flush=True)
    setting = {"device": common.device(), "dtype": values.dtype, "batch_size": values.batch_size}
    print(json.dumps({**setting, "models": results}))


def _train(name: str, images: np.ndarray, labels: np.ndarray, num_epochs: int) -> float:
    values = flags.FLAGS
    model = build_model(name, 10, (32, 32, 3), dtype=jnp.dtype(values.dtype), rngs=nnx.Rngs(0))
    start = time.perf_counter()
    train_classifier(
        model,
        images,
        labels,
        rng_key=jax.random.key(0),
        num_epochs=num_epochs,
        preprocess=parse_normalization("cifar10"),
        augmentation=Augmentation(flip=True),
        batch_size=values.batch_size,
        progress=False,
    )
    return time.perf_counter() - start


if __name__ == "__main__":
    common.run(main)
