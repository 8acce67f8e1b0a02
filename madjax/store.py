"""Losses on disk, a block of draws at a time: a Zarr v3 group that any reader of the format opens while it fills.

`loss[draw, example]` is in chunks of one block of draws times one host's examples. A chunk is written under another
name and then renamed, so it is there whole or not at all; what is not there reads as NaN, which no loss is. Beside it
lie `prediction[example]` and `split[example]`, what else is known of every draw, and, as attributes of the group, all
settings that the losses depend on. The group's own metadata are written last: without them the store was not begun.
Chains keep where they stand in `<path>.chains/`, written before the block that ends there.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import tensorstore as ts
from etils import epath

from madjax import hosts
from madjax.sampling.draws import WalkState
from madjax.types import LossMatrix

if TYPE_CHECKING:
    import xarray as xr

TRACES = "traces.zarr"
# draws of a block unless a layout needs more
BLOCK = 16


class TraceStore:
    """A loss matrix that grows on disk.

    Attributes:
      facts: what the first start found out and later ones must take over, such as the layout; empty until `create`.
    """

    def __init__(
        self,
        folder: str | Path,
        settings: dict[str, Any],
        split: dict[str, int],
        prediction: np.ndarray | None = None,
    ):
        """Opens the store in `folder`, or one to be.

        Args:
          settings: all that the losses depend on, of JSON's types; a store of other settings is refused.
          split: names of the parts of the examples -> how many, in order.
          prediction: int `[num_examples]`, the predicted classes.

        Raises:
          ValueError: a store with other settings, or a damaged one.
        """
        self.path = epath.Path(folder) / TRACES
        self._settings = json.loads(json.dumps(settings))  # as they come back: a tuple is then a list
        self._split, self._prediction = split, prediction
        self.num_examples = sum(split.values())
        self.facts: dict[str, Any] = {}
        # by the first host's word: it may have begun the store by the time another looks
        if hosts.first(str((self.path / "zarr.json").exists())) == "True":
            attributes = _attributes(self.path)
            if different := changed(attributes["settings"], self._settings):
                raise ValueError(f"workdir: {self.path} holds losses of other settings: {different}")
            self.facts = attributes["facts"]
            self._open()

    @property
    def block(self) -> int:
        """Draws of a chunk."""
        return self.facts["block"]

    def create(self, num_draws: int, block: int, layout: str, num_chains: int = 1, info: Iterable[str] = ()) -> None:
        """Makes the arrays, if they are not there.

        Args:
          block: draws of a chunk.
          layout: of the sweep.
          info: names of what `write` is told of every draw.
        """
        if self.facts:
            return
        if hosts.is_first():
            # what a start that did not come to its end has left
            if self.path.exists():
                self.path.rmtree()
            self.path.mkdir(parents=True)
            width, count = hosts.range_size(self.num_examples), self.num_examples
            self._make("loss", "float32", {"draw": (num_draws, block), "example": (count, width)})
            codes = np.repeat(np.arange(len(self._split)), list(self._split.values()))
            meanings = {"flag_values": list(range(len(self._split))), "flag_meanings": " ".join(self._split)}
            self._make("split", "uint8", {"example": (count, count)}, meanings).write(codes.astype(np.uint8)).result()
            index = np.concatenate([np.arange(size) for size in self._split.values()])
            self._make("example", "int64", {"example": (count, count)}).write(index).result()
            if self._prediction is not None:
                classes = self._make("prediction", "int32", {"example": (count, count)})
                classes.write(np.asarray(self._prediction, np.int32)).result()
            if num_chains > 1:
                chain = np.arange(num_draws, dtype=np.int32) % num_chains
                self._make("chain", "int32", {"draw": (num_draws, num_draws)}).write(chain).result()
            for name in info:
                self._make(name, "float32", {"draw": (num_draws, block)})
            facts = {"layout": layout, "block": block, "info": list(info)}
            group = {
                "zarr_format": 3,
                "node_type": "group",
                "attributes": {"settings": self._settings, "facts": facts},
            }
            write_whole(self.path / "zarr.json", json.dumps(group, indent=1).encode())
        hosts.barrier("store created")
        self.facts = _attributes(self.path)["facts"]
        self._open()

    def whole(self) -> LossMatrix:
        """This host's columns of the leading draws that are there whole, float32 `[num_whole, num_here]`.

        Raises:
          ValueError: a chunk is damaged; it names the file, and what to do.
        """
        here = hosts.host_range(self.num_examples)
        if not self.facts:
            return np.zeros((0, here.stop - here.start), np.float32)
        try:
            losses = np.asarray(self._arrays["loss"][:, here.start : here.stop].read().result())
        except ValueError as error:
            raise ValueError(_damaged(self.path, error)) from error
        missing = np.flatnonzero(np.isnan(losses).any(axis=1))
        return losses[: missing[0] if len(missing) else len(losses)]

    def state(self, num_draws: int) -> WalkState | None:
        """Where the chains stood after `num_draws` draws, if that is kept."""
        path = self._state_path(num_draws)
        if not path.exists():
            return None
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return dict(arrays)

    def write(self, start: int, losses: LossMatrix, info: dict[str, list[float]], state: WalkState | None) -> None:
        """Writes this host's losses of draws from `start` on, `[num, num_here]`, and where the chains stand after them.

        Raises:
          ValueError: where the disk refuses; what was written before stays.
        """
        stop, here = start + len(losses), hosts.host_range(self.num_examples)
        last = stop == self._arrays["loss"].shape[0]
        try:
            if state is not None and not last:
                self._state_path(0).parent.mkdir(parents=True, exist_ok=True)
                data = io.BytesIO()
                np.savez(data, **state)  # pyright: ignore[reportArgumentType]
                write_whole(self._state_path(stop), data.getvalue())
            if hosts.is_first():
                for name, values in info.items():
                    self._arrays[name][start:stop].write(np.asarray(values, np.float32)).result()
            self._arrays["loss"][start:stop, here.start : here.stop].write(losses).result()
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else _reason(error)
            raise ValueError(
                f"workdir: cannot write draws {start} to {stop - 1} to {self.path} ({reason}); "
                f"the {start} draws before them are kept"
            ) from error
        self._forget(start, last)

    def _make(self, name: str, dtype: str, axes: dict[str, tuple[int, int]], attributes: Any = None) -> Any:
        """A new array; `axes` are names -> (length, length of a chunk)."""
        lengths, chunks = (list(values) for values in zip(*axes.values(), strict=True))
        metadata = {
            "shape": lengths,
            "data_type": dtype,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunks}},
            "fill_value": "NaN" if dtype == "float32" else 0,
            # a checksum, so that a chunk cut off or altered is noticed
            "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
            "dimension_names": list(axes),
            "attributes": attributes or {},
        }
        return ts.open(self._spec(name) | {"metadata": metadata}, create=True).result()

    def _open(self) -> None:
        names = ["loss", *self.facts["info"]]
        self._arrays = {name: ts.open(self._spec(name), open=True).result() for name in names}

    def _spec(self, name: str) -> dict[str, Any]:
        path = str(self.path / name)
        return {"driver": "zarr3", "kvstore": path if "://" in path else f"file://{Path(path).absolute()}/"}

    def _state_path(self, num_draws: int) -> epath.Path:
        # every host walks the same chains, and comes to the end of a block when it does
        folder = self.path.parent / f"{self.path.name}.chains"
        return folder / f"host-{jax.process_index()}-draw-{num_draws:06d}.npz"

    def _forget(self, start: int, last: bool) -> None:
        """Drops the states that no later start can need: all but the one before the newest block, and the newest."""
        folder = self._state_path(0).parent
        for path in folder.glob(f"host-{jax.process_index()}-*") if folder.exists() else []:
            if last or path.name < self._state_path(start).name:
                path.unlink()


def open_traces(workdir: str | Path) -> xr.Dataset:
    """The losses that a run keeps in its work directory, also while it runs; read when they are looked at.

    Returns:
      `loss[draw, example]`, NaN where it is still to come, with the coordinates `draw`, `chain` (of several), `split`
      ("trusted" or "test"), `example` (its number in its split), and `prediction` where examples have a class.

    Raises:
      ValueError: where there are none.
    """
    import xarray as xr  # a second to import, and nothing else needs it

    path = epath.Path(workdir)
    path = path if path.name == TRACES else path / TRACES
    _attributes(path)
    data = xr.open_zarr(str(path), consolidated=False)
    names = np.array(data["split"].attrs["flag_meanings"].split())
    data = data.assign_coords(draw=np.arange(data.sizes["draw"]), split=("example", names[data["split"].values]))
    return data.set_coords([name for name in ("chain", "example", "prediction") if name in data.variables])


def _attributes(path: epath.Path) -> dict[str, Any]:
    if not (path / "zarr.json").exists():
        raise ValueError(f"workdir: {path} holds no losses, or none yet")
    try:
        attributes = json.loads((path / "zarr.json").read_text())["attributes"]
        return {"settings": attributes["settings"], "facts": attributes["facts"]}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"workdir: {path / 'zarr.json'} is damaged; remove {path} to begin anew") from error


def changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """How settings differ, for a message; empty where they do not.

    >>> changed({"seed": 0, "num_draws": 8}, {"seed": 1, "num_draws": 8})
    'seed was 0, is 1'
    """
    names = [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
    return "; ".join(f"{name} was {old.get(name)}, is {new.get(name)}" for name in names)


def write_whole(path: epath.PathLike, data: bytes) -> None:
    """Writes a file that is there whole or not at all."""
    path = epath.Path(path)
    part = path.parent / f"{path.name}.part"
    part.write_bytes(data)
    part.replace(path)


def _damaged(path: epath.Path, error: Exception) -> str:
    return f"workdir: {path} is damaged ({_reason(error)}); remove the file named to have that block computed again"


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
