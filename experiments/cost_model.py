r"""What a sweep costs on paper: FLOPs, bytes, memory and time, from one accelerator to a pod.

    python -m experiments.cost_model

A draw costs each device F · n / d for its share n / d of the examples and R · P for the noise of its P parameters; both
counts are checked by experiments.bench_devices (docs/scale.md). Peaks are the vendors' data sheets. The shares of them
that are reached are assumptions, not measurements, until somebody runs it there.
"""

from __future__ import annotations

from typing import NamedTuple

from experiments import common

# XLA's count of operations for one Gaussian number and its use, from experiments.bench_devices
NOISE_FLOPS = 97
# assumed: share of the peak that large convolutions and matrix products reach
UTILIZATION = 0.4


class Chip(NamedTuple):
    """Peaks of one device: FLOP/s in bf16 and of the vector units, bytes/s of memory and of links, bytes of memory."""

    name: str
    matrix: float
    vector: float
    memory_rate: float
    link_rate: float
    memory: float


# vector rate of the v5e: assumed, for it is not published
H100 = Chip("H100", 989e12, 67e12, 3.35e12, 450e9, 80e9)
V5E = Chip("v5e", 197e12, 4e12, 819e9, 200e9, 16e9)


class Model(NamedTuple):
    """A network: parameters and bytes of each, FLOPs and bytes of activations of an example, bytes sent when split."""

    name: str
    num_parameters: float
    parameter_bytes: int
    flops: float
    activation_bytes: float
    sent_bytes: float


PREACT_RESNET18 = Model("PreActResNet18, 32x32", 11.2e6, 4, 0.966e9, 4e6, 0)
# 512 tokens; 2 FLOPs a parameter and token; when split, each of 32 layers reduces two [512, 4096] bf16 arrays
DECODER_8B = Model(
    "8B decoder, 512 tokens", 8.03e9, 2, 2 * 8.03e9 * 512, 512 * 4096 * 2 * 8, 32 * 2 * 2 * 512 * 4096 * 2
)


class Cost(NamedTuple):
    """Of one draw on one device: seconds of the parts; and bytes of memory that are held."""

    examples: float
    noise: float
    links: float
    memory: float


def cost(model: Model, chip: Chip, num_devices: int, shards: int, num_examples: int, batch_size: int) -> Cost:
    """Of one draw, examples being split over num_devices / shards groups of devices that share a model."""
    share = -(-num_examples // (num_devices // shards))
    batches = -(-share // batch_size)
    parameters = model.num_parameters / shards
    # every batch reads the perturbed parameters; to make them reads the center and writes
    read = batches * parameters * model.parameter_bytes / chip.memory_rate
    compute = share * model.flops / shards / (chip.matrix * UTILIZATION)
    made = 2 * parameters * model.parameter_bytes / chip.memory_rate
    noise = max(NOISE_FLOPS * parameters / chip.vector, made)
    links = share * model.sent_bytes * (shards - 1) / shards / chip.link_rate if shards > 1 else 0.0
    memory = 2 * parameters * model.parameter_bytes + min(batch_size, share) * model.activation_bytes / shards
    return Cost(max(compute, read), noise, links, memory)


_ROWS = (
    (PREACT_RESNET18, H100, 1, 1, 10_000, 1024), (PREACT_RESNET18, H100, 8, 1, 10_000, 1024),
    (PREACT_RESNET18, V5E, 1, 1, 10_000, 1024), (PREACT_RESNET18, V5E, 8, 1, 10_000, 1024),
    (PREACT_RESNET18, V5E, 64, 1, 10_000, 1024), (PREACT_RESNET18, V5E, 256, 1, 10_000, 1024),
    (DECODER_8B, H100, 1, 1, 1024, 16), (DECODER_8B, H100, 8, 1, 1024, 16),
    (DECODER_8B, V5E, 8, 4, 1024, 16), (DECODER_8B, V5E, 64, 4, 1024, 16), (DECODER_8B, V5E, 256, 4, 1024, 16),
)  # fmt: skip


def main() -> None:
    """Prints the table of docs/scale.md."""
    columns = ["model", "devices", "split over", "GB a device", "ms a draw: examples", "noise", "links", "128 draws, s"]
    print(f"| {' | '.join(columns)} | efficiency |")
    print("|---" * (len(columns) + 1) + "|")
    for model, chip, num_devices, shards, num_examples, batch_size in _ROWS:
        one = cost(model, chip, num_devices, shards, num_examples, batch_size)
        seconds = one.examples + one.noise + one.links
        # against all the FLOPs of the examples at the assumed share of the peak
        ideal = num_examples * model.flops / (chip.matrix * UTILIZATION * num_devices)
        parts = " | ".join(f"{1e3 * part:.3g}" for part in one[:3])
        print(
            f"| {model.name} | {num_devices} × {chip.name} | {shards} | {one.memory / 1e9:.2g} | {parts} "
            f"| {128 * seconds:.3g} | {ideal / seconds:.0%} |"
        )


if __name__ == "__main__":
    common.run(main)
