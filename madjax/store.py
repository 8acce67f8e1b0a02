"""Losses on disk, a block of draws at a time: a Zarr v3 group that any reader of the format opens while it fills.

`loss[draw, example]` is in chunks of one block of draws times one host's examples. A chunk is written under another
name and then renamed, or put into a bucket as one object, so it is there whole or not at all; what is not there reads
as NaN, which no loss is. Beside it lie `prediction[example]` and `split[example]`, what else is known of every draw,
and, as attributes of the group, all settings that the losses depend on. The group's own metadata are written last:
without them the store was not begun. Chains keep where they stand in `<path>.chains/`, written before the block that
ends there.

Everything goes through tensorstore, into a folder as into a bucket (gs://). A block is written while the next one is
computed, and synchronized to the disk; the few small files that hold no losses are left to the system to write out.
"""

from __future__ import annotations

import io
import json
import os
import re
import zipfile
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import jax
import numpy as np
import tensorstore as ts

from madjax import hosts
from madjax.sampling.draws import WalkState
from madjax.types import LossMatrix

if TYPE_CHECKING:
    import xarray as xr

TRACES = "traces.zarr"
# draws of a block unless a layout needs more
BLOCK = 16
# a machine that fails within seconds of a start may cost that start; to wait for the disk costs every start
_UNSYNCED = ts.Context({"file_io_sync": False})
# writes one block after the other; Python does not end before it is done
_WRITER = ThreadPoolExecutor(1)


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
          folder: local, or a bucket's such as "gs://bucket/run".
          settings: all that the losses depend on, of JSON's types; a store of other settings is refused.
          split: names of the parts of the examples -> how many, in order.
          prediction: int `[num_examples]`, the predicted classes.

        Raises:
          ValueError: a store with other settings, or a damaged one.
        """
        self.path = _path(folder)
        self._settings = json.loads(json.dumps(settings))  # as they come back: a tuple is then a list
        self._split, self._prediction = split, prediction
        self.num_examples = sum(split.values())
        self.facts: dict[str, Any] = {}
        self._written = _WRITER.submit(int)
        # by the first host's word: it may have begun the store by the time another looks
        if attributes := json.loads(hosts.first(json.dumps(_attributes(self.path)))):
            if different := changed(attributes["settings"], self._settings):
                raise ValueError(f"workdir: {self.path} holds losses of other settings: {different}")
            self.facts = attributes["facts"]
            self._open()
        self._chains = _files(f"{self.path}.chains")

    @property
    def block(self) -> int:
        """Draws of a chunk."""
        return self.facts["block"]

    def create(
        self,
        num_draws: int,
        block: int,
        layout: str,
        known: Mapping[str, np.ndarray] | None = None,
        info: Iterable[str] = (),
    ) -> None:
        """Makes the arrays, if they are not there.

        Args:
          block: draws of a chunk.
          layout: of the sweep.
          known: int32 `[num_draws]` by name, coordinates of the draws.
          info: names of what `write` is told of every draw.
        """
        if self.facts:
            return
        facts = {"layout": layout, "block": block, "info": list(info)}
        if hosts.is_first():
            try:
                self._begin(num_draws, block, known, info, facts)
            except ValueError as error:
                raise ValueError(f"workdir: cannot begin {self.path} ({_reason(error)})") from error
        hosts.barrier("store created")
        self.facts = facts
        self._open()

    def _begin(
        self,
        num_draws: int,
        block: int,
        of_draws: Mapping[str, np.ndarray] | None,
        info: Iterable[str],
        facts: dict[str, Any],
    ) -> None:
        # what a start that did not come to its end has left, and states of a store that was removed
        files = _files(self.path)
        for folder in (files, self._chains):
            folder.delete_range(ts.KvStore.KeyRange()).result()
        count, sizes = self.num_examples, list(self._split.values())
        known = {
            "split": ("example", np.repeat(np.arange(len(sizes), dtype=np.uint8), sizes)),
            "example": ("example", np.concatenate([np.arange(size) for size in sizes])),
        }
        if self._prediction is not None:
            known["prediction"] = ("example", np.asarray(self._prediction, np.int32))
        known |= {name: ("draw", values) for name, values in (of_draws or {}).items()}
        # all at a time, for a bucket takes long to answer
        loss = self._make("loss", "float32", draw=(num_draws, block), example=(count, hosts.range_size(count)))
        made = [loss, *(self._make(name, "float32", draw=(num_draws, block)) for name in info)]
        begun = {
            name: self._make(name, values.dtype.name, **{axis: (len(values), len(values))})
            for name, (axis, values) in known.items()
        }
        made += [array.result().write(known[name][1]) for name, array in begun.items()]
        for future in made:
            future.result()
        group = {"zarr_format": 3, "node_type": "group", "attributes": {"settings": self._settings, "facts": facts}}
        files.write("zarr.json", json.dumps(group, indent=1)).result()

    def whole(self) -> LossMatrix:
        """This host's columns of the leading draws that are there whole, float32 `[num_whole, num_here]`.

        Raises:
          ValueError: a chunk is damaged; it names the file, and what to do.
        """
        here = hosts.host_range(self.num_examples)
        if not self.facts:
            return np.zeros((0, here.stop - here.start), np.float32)
        reads = [self._arrays["loss"][:, here.start : here.stop].read()]
        reads += [self._arrays[name].read() for name in self.facts["info"]]
        try:
            losses, *info = [np.asarray(read.result()) for read in reads]
        except ValueError as error:
            raise ValueError(_damaged(self.path, error)) from error
        # they are written side by side, so either may be there alone
        missing = np.any([np.isnan(losses).any(axis=1), *map(np.isnan, info)], axis=0)
        return losses[: missing.argmax() if missing.any() else len(losses)]

    def state(self, num_draws: int) -> WalkState | None:
        """Where the chains stood after `num_draws` draws, if that is kept."""
        kept = self._chains.read(self._state_name(num_draws)).result().value
        try:
            with np.load(io.BytesIO(kept), allow_pickle=False) as arrays:
                return dict(arrays)
        except (EOFError, ValueError, KeyError, zipfile.BadZipFile):  # none, or damaged: the chains walk there again
            return None

    def write(self, start: int, losses: LossMatrix, info: dict[str, list[float]], state: WalkState | None) -> None:
        """Writes this host's losses of draws from `start` on, `[num, num_here]`, and where the chains stand after them.

        Returns while a whole block is being written, unless it is the last.

        Raises:
          ValueError: where the disk refuses, or refused the block before; what was written before stays.
        """
        self.flush()
        self._written = _WRITER.submit(self._write, start, losses, info, state)
        if len(losses) < self.block or start + len(losses) == self._arrays["loss"].shape[0]:
            self.flush()

    def flush(self) -> None:
        """Returns once the block that is being written is there; raises what `write` would."""
        self._written.result()

    def _write(self, start: int, losses: LossMatrix, info: dict[str, list[float]], state: WalkState | None) -> None:
        stop, here = start + len(losses), hosts.host_range(self.num_examples)
        last = stop == self._arrays["loss"].shape[0]
        try:
            if state is not None and not last:
                data = io.BytesIO()
                np.savez(data, **state)  # pyright: ignore[reportArgumentType]
                self._chains.write(self._state_name(stop), data.getvalue()).result()
            begun = [self._arrays["loss"][start:stop, here.start : here.stop].write(losses)]
            if hosts.is_first():
                for name, values in info.items():
                    begun.append(self._arrays[name][start:stop].write(np.asarray(values, np.float32)))
            for future in begun:
                future.result()
        except ValueError as error:
            raise ValueError(
                f"workdir: cannot write draws {start} to {stop - 1} to {self.path} ({_reason(error)}); "
                f"the {start} draws before them are kept"
            ) from error
        if state is not None:
            # no later start can need any but the one before the newest block, and the newest
            older = ts.KvStore.KeyRange(self._state_name(0), self._state_name(stop if last else start))
            self._chains.delete_range(older).result()

    def _make(self, name: str, dtype: str, **axes: tuple[int, int]) -> ts.Future:
        """A new array to be; axes are (length, length of a chunk)."""
        lengths, chunks = (list(values) for values in zip(*axes.values(), strict=True))
        meanings = {"flag_values": list(range(len(self._split))), "flag_meanings": " ".join(self._split)}
        metadata = {
            "shape": lengths,
            "data_type": dtype,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunks}},
            "fill_value": "NaN" if dtype == "float32" else 0,
            # a checksum, so that a chunk cut off or altered is noticed
            "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
            "dimension_names": list(axes),
            "attributes": meanings if name == "split" else {},
        }
        return ts.open(self._spec(name) | {"metadata": metadata}, create=True, context=_UNSYNCED)

    def _open(self) -> None:
        names = ["loss", *self.facts["info"]]
        opened = [ts.open(self._spec(name), open=True) for name in names]
        self._arrays = {name: array.result() for name, array in zip(names, opened, strict=True)}

    def _spec(self, name: str) -> dict[str, Any]:
        return {"driver": "zarr3", "kvstore": _kvstore(f"{self.path}/{name}")}

    def _state_name(self, num_draws: int) -> str:
        # every host walks the same chains, and comes to the end of a block when it does
        return f"host-{jax.process_index()}-draw-{num_draws:06d}.npz"


def open_traces(workdir: str | Path) -> xr.Dataset:
    """The losses that a run keeps in its work directory, also while it runs; read when they are looked at.

    Returns:
      `loss[draw, example]`, NaN where it is still to come, with the coordinates `draw`, `chain` or `part` (of several),
      `split` ("trusted" or "test"), `example` (its number in its split), and `prediction` where examples have a class.

    Raises:
      ValueError: where there are none, or what reads buckets is not installed.
    """
    import xarray as xr  # a second to import, and nothing else needs it

    path = _path(workdir)
    if _attributes(path) is None:
        raise ValueError(f"workdir: {path} holds no losses, or none yet")
    try:
        data = xr.open_zarr(path, consolidated=False)
    except ImportError as error:
        raise ValueError(f"workdir: cannot read {path} ({_reason(error)}); pip install 'madjax[gcs]'") from error
    names = np.array(data["split"].attrs["flag_meanings"].split())
    data = data.assign_coords(draw=np.arange(data.sizes["draw"]), split=("example", names[data["split"].values]))
    return data.set_coords([name for name in ("chain", "part", "example", "prediction") if name in data.variables])


def _path(workdir: str | Path) -> str:
    path = os.fspath(workdir)
    if re.match(r"\w\w+:/(?!/)", path):
        raise ValueError(f"workdir: {path} was made a pathlib.Path, which drops a slash of a bucket's; give a string")
    return path.rstrip("/") if Path(path).name == TRACES else os.path.join(path, TRACES)


def _kvstore(path: str) -> str | dict[str, str]:
    """A folder or a prefix of a bucket, as tensorstore wants it named."""
    return f"{quote(path, safe=':/')}/" if "://" in path else {"driver": "file", "path": f"{Path(path).absolute()}/"}


def _files(path: str) -> ts.KvStore:
    return ts.KvStore.open(_kvstore(path), context=_UNSYNCED).result()


def _attributes(path: str) -> dict[str, Any] | None:
    """Settings and facts; None where the store was not begun."""
    _WRITER.submit(int).result()  # what this process has begun to write is to be seen
    try:
        found = _files(path).read("zarr.json").result()
    except ValueError as error:
        raise ValueError(f"workdir: cannot read {path} ({_reason(error)})") from error
    if found.state == "missing":
        return None
    try:
        attributes = json.loads(found.value)["attributes"]
        return {"settings": attributes["settings"], "facts": attributes["facts"]}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"workdir: {path}/zarr.json is damaged; remove {path} to begin anew") from error


def changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """How settings differ, for a message; empty where they do not.

    >>> changed({"seed": 0, "num_draws": 8}, {"seed": 1, "num_draws": 8})
    'seed was 0, is 1'
    """
    names = [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
    return "; ".join(f"{name} was {old.get(name)}, is {new.get(name)}" for name in names)


def write_whole(path: Path, data: bytes) -> None:
    """Writes a local file that is there whole or not at all."""
    part = path.with_name(f"{path.name}.part")
    part.write_bytes(data)
    part.replace(path)


def _damaged(path: str, error: Exception) -> str:
    return f"workdir: {path} is damaged ({_reason(error)}); remove the file named to have that block computed again"


def _reason(error: Exception) -> str:
    # tensorstore names files on the way to the cause, and appends "[name='value']" for programs
    text = re.sub(r" \[\w+='.*", "", " ".join(str(error).split()))
    return text if len(text) <= 300 else f"... {text[-300:]}"
