"""Where the sweep's work goes: the one module that knows devices.

One mesh over all devices. The examples are split over it; where there are fewer examples than devices can share, the
draws of a block are. Each device computes its part of the matrix on its own, and nothing is exchanged before the
result is gathered.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
from jax.sharding import AxisType, Mesh, PartitionSpec

Axis = Literal["examples", "draws"]


class Placement(NamedTuple):
    """A mesh of one axis, and what is split over it."""

    mesh: Mesh
    axis: Axis

    @property
    def num_devices(self) -> int:
        """Devices of the mesh."""
        return self.mesh.size


def place(num_examples: int, devices: Sequence[Any] | None = None) -> Placement:
    """Splits examples where each device gets at least one, else draws; over all devices of the default backend."""
    devices = jax.devices() if devices is None else devices
    axis: Axis = "examples" if num_examples >= len(devices) else "draws"
    return Placement(jax.make_mesh((len(devices),), (axis,), axis_types=(AxisType.Auto,), devices=devices), axis)


def split(block_fn: Callable[..., jax.Array], placement: Placement) -> Callable[..., jax.Array]:
    """`block_fn(draws, items, examples) -> [num_items, num_examples]` on every device's part, as one function.

    Both counts must be multiples of the devices along the axis that is split.
    """
    if placement.num_devices == 1:
        return block_fn
    everywhere, parts = PartitionSpec(), PartitionSpec(placement.axis)
    if placement.axis == "examples":
        in_specs, out_specs = (everywhere, everywhere, parts), PartitionSpec(None, "examples")
    else:
        in_specs, out_specs = (everywhere, parts, everywhere), parts
    # a user's loss may hold a loop whose carry starts replicated, which the check of varying axes refuses
    return jax.shard_map(block_fn, mesh=placement.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def put_examples(examples: Any, placement: Placement) -> Any:
    """The examples on the devices: split over them, or whole on each."""
    if placement.num_devices == 1:
        return jax.device_put(examples, placement.mesh.devices.item())
    spec = PartitionSpec(placement.axis) if placement.axis == "examples" else PartitionSpec()
    return jax.device_put(examples, jax.NamedSharding(placement.mesh, spec))
