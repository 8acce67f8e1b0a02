r"""A forward pass, a gradient, and gradients image by image of ours against torch's own, of the same networks.

    pip install torch
    python -m experiments.bench_torch

Random weights; a batch of --batch_size images, eval mode, the mean cross-entropy's gradient by all parameters, and the
gradients of each of the first 32 images (`vmap` in both). Turns alternate; compilation does not count. Prints a table
of medians of --repeats, and JSON as the last line: torch's time over ours, so above 1 ours is faster.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import flags

from experiments import bench, common
from madjax.types import Batch

_SHAPES = {
    "digits_cnn": (8, 8, 1),
    "badnets_cnn": (32, 32, 3),
    "wrn16_1": (32, 32, 3),
    "resnet20": (32, 32, 3),
    "preact_resnet18": (32, 32, 3),
}
_BY_IMAGE = 32  # images with a gradient each

common.define_list("models", ["digits_cnn", "badnets_cnn", "wrn16_1", "resnet20"], list(_SHAPES), "Networks.")
flags.DEFINE_integer("batch_size", 256, "Images of a pass.", lower_bound=1)
flags.DEFINE_integer("repeats", 7, "Turns.", lower_bound=1)


def main() -> None:
    """Times all networks."""
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError(f"torch: {error}; pip install torch") from error
    values, results = flags.FLAGS, {}
    print(f"{'model':<16} {'pass':<9} {'ours ms':>8} {'torch ms':>9} {'torch/ours':>10}")
    for name in values.models:
        passes = _passes(name)
        results[name] = {}
        for kind in ("forward", "gradient", "by_image"):
            runs = {who: passes[who][kind] for who in ("ours", "torch")}
            bench.time_in_turns(runs, 1)  # compiles
            seconds = bench.time_in_turns(runs, values.repeats)
            medians = {who: statistics.median(times) for who, times in seconds.items()}
            results[name][kind] = {**medians, "torch_over_ours": medians["torch"] / medians["ours"]}
            own, other = (1e3 * medians[who] for who in ("ours", "torch"))
            print(f"{name:<16} {kind:<9} {own:>8.1f} {other:>9.1f} {other / own:>10.2f}", flush=True)
    setting = {"device": common.device(), "torch_threads": torch.get_num_threads(), "batch_size": values.batch_size}
    print(json.dumps({**setting, "models": results}))


def _passes(name: str) -> dict[str, dict[str, Callable[[], Any]]]:
    import torch  # pyright: ignore[reportMissingImports]

    from experiments import torch_networks

    values, shape = flags.FLAGS, _SHAPES[name]
    loss_fn, params, _, examples = bench.random_problem(name, values.batch_size, 1)
    forward = jax.jit(loss_fn)
    is_trainable = jax.tree.leaves(loss_fn.is_trainable(params))
    leaves, structure = jax.tree.flatten(params)
    drawn = [leaf for leaf, moves in zip(leaves, is_trainable, strict=True) if moves]

    def loss(drawn: list[jax.Array], examples: Batch) -> jax.Array:
        rest = iter(drawn)
        merged = [next(rest) if moves else leaf for leaf, moves in zip(leaves, is_trainable, strict=True)]
        return loss_fn(structure.unflatten(merged), examples).mean()

    gradient = jax.jit(jax.grad(loss))
    by_image = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))
    single = jax.tree.map(lambda leaf: leaf[:_BY_IMAGE, None], examples)

    build = {
        "digits_cnn": lambda: torch_networks.digits(shape[2], shape[0]),
        "badnets_cnn": lambda: torch_networks.badnets(shape[2], shape[0]),
        "wrn16_1": lambda: torch_networks.Residual("wrn", (16, 32, 64), 2, 3),
        "resnet20": lambda: torch_networks.Residual("resnet", (16, 32, 64), 3, 3),
        "preact_resnet18": lambda: torch_networks.Residual("preact", (64, 128, 256, 512), 2, 3),
    }[name]
    net = build().eval()
    x = torch.from_numpy((examples["image"].transpose(0, 3, 1, 2) / 255).astype(np.float32))
    y = torch.from_numpy(examples["label"].astype(np.int64))
    cross_entropy = torch.nn.functional.cross_entropy

    def torch_forward() -> Any:
        with torch.no_grad():
            return cross_entropy(net(x), y, reduction="none")

    def torch_gradient() -> None:
        net.zero_grad()
        cross_entropy(net(x), y).backward()

    def torch_loss(weights: Any, x: Any, y: Any) -> Any:
        return cross_entropy(torch.func.functional_call(net, weights, (x[None],)), y[None])

    weights = {name: weight.detach() for name, weight in net.named_parameters()}
    torch_by_image = torch.func.vmap(torch.func.grad(torch_loss), (None, 0, 0))

    return {
        "ours": {
            "forward": lambda: jax.block_until_ready(forward(params, examples)),
            "gradient": lambda: jax.block_until_ready(gradient(drawn, examples)),
            "by_image": lambda: jax.block_until_ready(by_image(drawn, single)),
        },
        "torch": {
            "forward": torch_forward,
            "gradient": torch_gradient,
            "by_image": lambda: torch_by_image(weights, x[:_BY_IMAGE], y[:_BY_IMAGE]),
        },
    }


if __name__ == "__main__":
    common.run(main)
