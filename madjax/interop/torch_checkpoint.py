"""Reads tensors out of PyTorch checkpoints, zip and legacy format, without torch and without executing anything.

A checkpoint is a pickle, and a pickle may call any function it names. Here only containers, numbers, strings and the
names with which torch spells a tensor are allowed; anything else is refused before it is called.
"""

from __future__ import annotations

import collections
import io
import pickle
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

_DTYPES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


class _Storage:
    """A storage named by the pickle, filled once its bytes have been read."""

    def __init__(self, dtype: Any, count: int):
        self.dtype, self.count = np.dtype(dtype), count
        self.values: np.ndarray | None = None

    def fill(self, data: bytes) -> None:
        if len(data) != self.count * self.dtype.itemsize:
            raise ValueError(f"path: a storage of {self.count} {self.dtype} has {len(data)} bytes; the file is cut off")
        self.values = np.frombuffer(data, self.dtype)


class _Tensor:
    def __init__(self, storage: _Storage, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *_: Any):
        self.storage, self.offset, self.shape, self.strides = storage, offset, tuple(shape), tuple(strides)

    def array(self) -> np.ndarray:
        values, size = self.storage.values, self.storage.dtype.itemsize
        assert values is not None
        if any(n < 0 for n in (self.offset, *self.shape, *self.strides)) or len(self.shape) != len(self.strides):
            raise ValueError(f"path: a tensor of shape {self.shape} and strides {self.strides} is malformed")
        last = self.offset + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))
        if 0 not in self.shape and last >= len(values):
            raise ValueError(f"path: a tensor of shape {self.shape} reaches beyond its storage")
        view = values[self.offset :]
        return np.lib.stride_tricks.as_strided(view, self.shape, [s * size for s in self.strides]).copy()


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: BinaryIO):
        super().__init__(file)
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _Tensor
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return _first
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        raise ValueError(f"path: the checkpoint names {module}.{name}, which is refused; nothing was run")

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _, count = pid[:5]
        if kind != "storage":
            raise ValueError(f"path: the checkpoint refers to a {kind!r}, wanted a storage")
        return self.storages.setdefault(str(key), _Storage(dtype, int(count)))


def _first(tensor: _Tensor, *_: Any) -> _Tensor:
    return tensor


def load_torch_checkpoint(path: str | Path) -> Any:
    """The object that `torch.save` wrote, with tensors as NumPy arrays.

    Raises:
      ValueError: no checkpoint, one that is cut off, or one that names anything but tensors and plain containers.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            value = _read_zip(file) if zipfile.is_zipfile(file) else _read_legacy(file)
    except (pickle.UnpicklingError, EOFError, zipfile.BadZipFile, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"path: {path} is no whole torch checkpoint ({error})") from error
    return _resolve(value)


def _read_zip(file: BinaryIO) -> Any:
    with zipfile.ZipFile(file) as archive:
        names = [name for name in archive.namelist() if name.endswith("data.pkl")]
        if len(names) != 1:
            raise ValueError(f"path: wanted one data.pkl in the archive, got {len(names)}")
        unpickler = _Unpickler(io.BytesIO(archive.read(names[0])))
        value = unpickler.load()
        for key, storage in unpickler.storages.items():
            entry = archive.getinfo(f"{names[0].removesuffix('data.pkl')}data/{key}")
            # checked before anything is unpacked
            if entry.file_size != storage.count * storage.dtype.itemsize:
                raise ValueError(f"path: storage {key} declares {entry.file_size} bytes, not what its tensor needs")
            storage.fill(archive.read(entry))
    return value


def _read_legacy(file: BinaryIO) -> Any:
    file.seek(0)
    if _Unpickler(file).load() != _LEGACY_MAGIC:
        raise ValueError("path: wanted a torch checkpoint, got a pickle of something else")
    _Unpickler(file).load()  # protocol version
    _Unpickler(file).load()  # sizes of the writer's integers
    unpickler = _Unpickler(file)
    value = unpickler.load()
    for key in _Unpickler(file).load():
        storage = unpickler.storages[str(key)]
        count = int.from_bytes(file.read(8), "little")
        if count != storage.count:
            raise ValueError(f"path: storage {key} holds {count} values, not {storage.count}; the file is damaged")
        storage.fill(file.read(count * storage.dtype.itemsize))
    return value


def _resolve(value: Any) -> Any:
    if isinstance(value, _Tensor):
        return value.array()
    if isinstance(value, dict):
        return type(value)((key, _resolve(item)) for key, item in value.items())
    if isinstance(value, list | tuple):
        return type(value)(_resolve(item) for item in value)
    return value
