"""Where the work goes on one host: the one module that knows devices.

One mesh of three axes. Examples are split first; where there are fewer examples than devices can share, the draws of a
block are split too. Each device then computes its part of the matrix on its own. A model too large for one device is
split over the third axis, and only then do devices talk during a sweep.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

_AXES = ("examples", "draws", "model")


class Placement(NamedTuple):
    """A mesh of one host's devices, with the axes examples, draws and model."""

    mesh: Mesh

    @property
    def num_devices(self) -> int:
        """Devices of the mesh."""
        return self.mesh.size

    def parts(self, axis: str) -> int:
        """In how many parts an axis is split."""
        return self.mesh.shape[axis]


def place(num_examples: int, devices: Sequence[Any] | None = None, model_shards: int = 1) -> Placement:
    """Splits the model as told, then examples as far as each part gets one, then draws.

    Args:
      devices: all of this host where None.

    Raises:
      ValueError: where `model_shards` does not divide the devices.
    """
    devices = jax.local_devices() if devices is None else devices
    if model_shards < 1 or len(devices) % model_shards:
        raise ValueError(f"model_shards: wanted a divisor of the {len(devices)} devices of a host, got {model_shards}")
    rest = len(devices) // model_shards
    parts = max(n for n in range(1, rest + 1) if rest % n == 0 and n <= max(1, num_examples))
    shape = (parts, rest // parts, model_shards)
    return Placement(jax.make_mesh(shape, _AXES, axis_types=(AxisType.Auto,) * 3, devices=devices))


def split(block_fn: Callable[..., jax.Array], placement: Placement) -> Callable[..., jax.Array]:
    """`block_fn(draws, items, examples) -> [num_items, num_examples]` on every device's part, as one function.

    The counts must be multiples of the parts of their axes. Over the model axis the compiler splits `block_fn` itself,
    as the placement of the parameters asks.
    """
    if placement.num_devices == 1:
        return block_fn
    manual = {"examples", "draws"} | ({"model"} if placement.parts("model") == 1 else set())
    # a user's loss may hold a loop whose carry starts replicated, which the check of varying axes refuses
    return jax.shard_map(
        block_fn,
        mesh=placement.mesh,
        in_specs=(PartitionSpec(), PartitionSpec("draws"), PartitionSpec("examples")),
        out_specs=PartitionSpec("draws", "examples"),
        axis_names=manual,
        check_vma=False,
    )


def place_chains(num_chains: int, params: Any) -> Placement:
    """As many devices of this host as chains can share evenly, as draws are split; one where a model takes several."""
    devices = jax.local_devices()
    alone = any(isinstance(leaf, jax.Array) and len(leaf.devices()) > 1 for leaf in jax.tree.leaves(params))
    parts = max(n for n in range(1, 2 if alone else len(devices) + 1) if num_chains % n == 0)
    return place(1, devices[:parts])


def put_chains(trees: Sequence[Any], placement: Placement) -> Any:
    """One pytree a device, stacked; a leading axis of one on one device."""

    def stack(*leaves: Any) -> Any:
        # what lies on the host is stacked there: an operation a leaf on the device costs every step of a chain
        if all(isinstance(leaf, np.ndarray) for leaf in leaves):
            return np.stack(leaves)
        return jnp.stack([jnp.asarray(leaf) for leaf in leaves])

    stacked = jax.tree.map(stack, *trees)
    if placement.num_devices == 1:
        return stacked
    return jax.device_put(stacked, NamedSharding(placement.mesh, PartitionSpec("draws")))


def part(stacked: Any, index: int, placement: Placement) -> Any:
    """One pytree of what `put_chains` stacked, on the first device."""
    if placement.num_devices == 1:
        return jax.tree.map(lambda leaf: leaf[index], stacked)
    first = placement.mesh.devices.flat[0]
    return jax.tree.map(lambda leaf: jax.device_put(leaf.addressable_shards[index].data[0], first), stacked)


def side_by_side(step: Callable[..., Any], placement: Placement) -> Callable[..., Any]:
    """`step(*shared, own)` on every device with its own part of the last argument, whose leaves count devices first."""

    def on_one_device(*args: Any) -> Any:
        *shared, own = args
        result = step(*shared, jax.tree.map(lambda leaf: leaf[0], own))
        return jax.tree.map(lambda leaf: leaf[None], result)

    if placement.num_devices == 1:
        return on_one_device

    def on_all(*args: Any) -> Any:
        specs = tuple(PartitionSpec() for _ in args[1:])
        return jax.shard_map(
            on_one_device,
            mesh=placement.mesh,
            in_specs=(*specs, PartitionSpec("draws")),
            out_specs=PartitionSpec("draws"),
            check_vma=False,
        )(*args)

    return on_all


def put_examples(examples: Any, placement: Placement) -> Any:
    """The examples on the devices, split over their axis."""
    if placement.num_devices == 1:
        return jax.device_put(examples, placement.mesh.devices.item())
    return jax.device_put(examples, NamedSharding(placement.mesh, PartitionSpec("examples")))


def put_model(tree: Any, placement: Placement, *, stacked: bool = False) -> Any:
    """Parameters on the devices: each matrix and kernel split over the model axis, along its longest axis that divides.

    Args:
      stacked: whether a leading axis counts draws, and is split over those.
    """
    if placement.num_devices == 1:
        return tree

    def put(leaf: Any) -> Any:
        spec = _model_spec(leaf.shape[1:] if stacked else leaf.shape, placement.parts("model"))
        return jax.device_put(
            leaf, NamedSharding(placement.mesh, PartitionSpec(*(["draws"] if stacked else []), *spec))
        )

    return jax.tree.map(put, tree)


def _model_spec(shape: tuple[int, ...], shards: int) -> list[str | None]:
    spec: list[str | None] = [None] * len(shape)
    divisible = [axis for axis, length in enumerate(shape) if length % shards == 0]
    if shards > 1 and len(shape) > 1 and divisible:
        spec[max(divisible, key=lambda axis: shape[axis])] = "model"
    return spec
