"""A user's own model: its files, and a loader for `madjax-score --loss_fn=tests.own_model:load`."""

import numpy as np
from safetensors.numpy import save_file

from madjax import from_nnx
from madjax.interop.weights import load_weights
from madjax.models import from_torch


def load(checkpoint):
    model = from_torch("badnets_cnn", load_weights(checkpoint), (16, 16, 1))
    return from_nnx(model, preprocess=lambda image: image.astype("float32") / 255)


def load_code(checkpoint):
    """The same as code of one's own, whose layers nobody can read."""
    loss_fn, params = load(checkpoint)
    return lambda drawn, batch: loss_fn(drawn, loss_fn.label(params, batch)), params


def make_files(folder):
    """Weights of a BadNets CNN for 16×16 images, trusted and test examples."""
    rng = np.random.default_rng(0)
    shapes = {"conv1": (16, 1, 5, 5), "conv2": (32, 16, 5, 5), "fc1": (512, 32), "fc2": (10, 512)}
    weights = {f"{name}.weight": rng.normal(size=shape) / np.sqrt(np.prod(shape[1:])) for name, shape in shapes.items()}
    weights |= {f"{name}.bias": np.zeros(shape[0]) for name, shape in shapes.items()}
    weights["fc2.weight"] *= 300  # sure of its outputs
    save_file({name: value.astype(np.float32) for name, value in weights.items()}, folder / "model.safetensors")
    image = rng.integers(0, 256, (90, 16, 16, 1)).astype(np.uint8)
    np.savez(folder / "trusted.npz", image=image[:50], id=[f"good{i}" for i in range(50)])
    np.savez(folder / "sampling.npz", image=image[:50], label=np.arange(50) % 10)
    np.savez(folder / "test.npz", image=image[50:], is_anomalous=np.arange(40) >= 30)
    np.savez(folder / "unknown.npz", image=image[50:])
    return folder


def score_flags(folder, workdir, test="test.npz"):
    return [
        "--architecture=badnets_cnn", f"--checkpoint={folder}/model.safetensors", f"--trusted={folder}/trusted.npz",
        f"--test={folder}/{test}", f"--workdir={workdir}", "--num_draws=8", "--layout=host",
    ]  # fmt: skip
