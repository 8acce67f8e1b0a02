"""Reads torch checkpoints, zip and legacy format, without torch and without executing anything.

A checkpoint is a pickle, and a pickle is a program. Here its opcodes are run by a small machine of our own: it knows
containers, numbers, strings and the names with which torch and NumPy spell their arrays. A name is only ever a string
(`_Name`), a call only ever goes to a function of this module, and whatever else the program asks for ends the reading.
What is declared (sizes, shapes, counts) is compared with the bytes that are there before anything is allocated.
"""

from __future__ import annotations

import io
import math
import pickletools
import re
import struct
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn, cast

import ml_dtypes
import numpy as np

from madjax.interop.guard import check_text, shown

_LEGACY_MAGIC, _LEGACY_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
_DEPTH = 100
_FOLD = 8  # arrays that share bytes, copies and small objects may unfold to this many times the file
# what an item costs when a call copies it: at most _FOLD times the bytes that spell it
_COPY: dict[type, int] = {str: 1, bytes: 1, bytearray: 1, list: 16, tuple: 16, set: 16, frozenset: 16, dict: 16}
# what an opcode of a byte or two leaves in memory; honest ones come with some ten bytes of content
_OBJECT: dict[str, int] = {"EMPTY_SET": 256, "MEMOIZE": 32, "REDUCE": 64} | dict.fromkeys(
    ("EMPTY_LIST", "EMPTY_DICT", "LIST", "DICT", "FROZENSET", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "STACK_GLOBAL"), 64
)
_ARRAY = 256  # an array without its content
# a key is hashed and compared each time that it is used, and a pickle uses it again for two bytes
_KEY_LENGTH, _KEY_ITEMS, _TUPLE_KEYS = 4096, 16, 4096

_STORAGES: dict[str, Any] = {
    "torch.DoubleStorage": np.float64, "torch.FloatStorage": np.float32, "torch.HalfStorage": np.float16,
    "torch.BFloat16Storage": ml_dtypes.bfloat16, "torch.LongStorage": np.int64, "torch.IntStorage": np.int32,
    "torch.ShortStorage": np.int16, "torch.CharStorage": np.int8, "torch.ByteStorage": np.uint8,
    "torch.BoolStorage": np.bool_, "torch.storage.UntypedStorage": np.uint8, "torch.UntypedStorage": np.uint8,
}  # fmt: skip
_TORCH_DTYPES: dict[str, Any] = {
    f"torch.{name}": getattr(np, "bool_" if name == "bool" else name, None) or getattr(ml_dtypes, name)
    for name in (
        "bool", "uint8", "int8", "int16", "int32", "int64", "uint16", "uint32", "uint64", "float16", "float32",
        "float64", "bfloat16", "float8_e4m3fn", "float8_e5m2",
    )
}  # fmt: skip
_NUMPY_DTYPE = re.compile(r"b1|[iufc]\d{1,2}|[SU]\d{1,9}|O8?")
_FACTORIES = frozenset(f"builtins.{name}" for name in ("dict", "list", "set", "int", "float"))


class _Malformed(ValueError):
    """An error that is already told in one clear line."""


class _Name(str):
    """The dotted name of an allowed global; nothing is imported for it."""

    __slots__ = ()


class _Storage:
    """A storage that the pickle names, filled once its bytes have been read."""

    def __init__(self, kind: str, count: int):
        self.dtype, self.count = np.dtype(_STORAGES[kind]), count
        self.data: bytes | None = None

    def fill(self, key: str, data: bytes) -> None:
        if len(data) != self.count * self.dtype.itemsize:
            raise _Malformed(f"storage {key} of {self.count} {self.dtype} has {len(data)} bytes; the file is damaged")
        self.data = data

    @property
    def content(self) -> bytes:
        if self.data is None:
            raise _Malformed("a storage has no bytes; the file is cut off")
        return self.data


class _Tensor:
    """A tensor whose storage may not have been read yet."""

    def __init__(self, storage: _Storage, offset: int, shape: Any, strides: Any, dtype: Any = None):
        if not isinstance(storage, _Storage) or not all(map(_is_shape, (shape, strides, (offset,)))):
            raise _Malformed("a tensor has no storage, or malformed shape, strides or offset")
        self.storage, self.offset, self.shape, self.strides = storage, offset, shape, strides
        self.dtype = np.dtype(dtype or storage.dtype)

    def array(self) -> np.ndarray:
        """A read-only view of the storage: tensors that share bytes go on sharing them."""
        if 0 in self.shape:
            return np.zeros(self.shape, self.dtype)
        size = self.dtype.itemsize
        last = self.offset + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))
        if (last + 1) * size > len(self.storage.content):
            raise _Malformed(f"a tensor of shape {_shown(self.shape)} reaches beyond its storage")
        strides = [s * size for s in self.strides]
        return np.ndarray(self.shape, self.dtype, self.storage.content, self.offset * size, strides)


class _DType:
    """`numpy.dtype` of numbers, text or objects; structured and dated ones are refused."""

    def __init__(self, text: str, *_: Any):
        if not isinstance(text, str) or not _NUMPY_DTYPE.fullmatch(text):
            raise _Malformed(f"the NumPy dtype {_shown(text)} is refused")
        self.value = np.dtype(text)

    def build(self, state: Any) -> None:
        _version, order, subdtype, names, fields, *_ = state
        if (subdtype, names, fields) != (None, None, None) or order not in ("<", ">", "=", "|"):
            raise _Malformed("a structured NumPy dtype is refused")
        self.value = self.value if order == "|" else self.value.newbyteorder(order)


class _Array:
    """`numpy.ndarray`, its state given by BUILD; an object array holds a list of what is allowed elsewhere."""

    def __init__(self) -> None:
        self.shape: tuple[int, ...] | None = None
        self.content: Any = b""

    def build(self, state: Any) -> None:
        _version, self.shape, dtype, self.fortran, self.content = state
        self.dtype = dtype.value
        if isinstance(self.content, str):  # bytes of Python 2
            self.content = self.content.encode("latin1")
        wanted = list if self.dtype.hasobject else (bytes, bytearray)
        if not isinstance(self.content, wanted) or not _is_shape(self.shape):
            raise _Malformed(f"a NumPy array of {self.dtype} has malformed shape or content")

    def array(self, finish: Callable[[Any], Any]) -> np.ndarray:
        if self.shape is None:
            raise _Malformed("a NumPy array has no content")
        if math.prod(self.shape) * (1 if self.dtype.hasobject else self.dtype.itemsize) != len(self.content):
            raise _Malformed(f"a NumPy array of shape {_shown(self.shape)} does not have the bytes for it")
        if self.dtype.hasobject:
            flat = np.fromiter(finish(self.content), dtype=object, count=len(self.content))
        elif self.content:
            flat = np.frombuffer(memoryview(self.content).toreadonly(), self.dtype)
            check_text(flat)
        else:
            flat = np.zeros(0, self.dtype)
        return flat.reshape(self.shape, order="F" if self.fortran else "C")


def _is_shape(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) <= 64 and all(isinstance(n, int) and 0 <= n < 2**63 for n in value)


def _is_plain(value: Any) -> bool:
    """Whether it is hashed and compared in no time, and shares its hash with few others."""
    if isinstance(value, str | bytes):  # the hash of these nobody can foresee
        return len(value) <= _KEY_LENGTH
    if isinstance(value, int):  # hashed modulo 2**61 - 1, so that only longer ones can share a hash by the thousand
        return -(2**63) <= value < 2**64
    if isinstance(value, np.integer | np.floating | np.bool_):  # long doubles are hashed as the double next to them
        return value.itemsize <= 8
    return value is None or isinstance(value, float)


def _defaultdict(factory: Any = None) -> dict[Any, Any]:
    if factory is not None and not (isinstance(factory, _Name) and factory in _FACTORIES):
        raise _Malformed(f"a defaultdict of {_shown(factory)} is refused")
    return {}


def _encode(text: str, encoding: str) -> bytes:
    if encoding not in ("latin1", "latin-1"):
        raise _Malformed(f"bytes in the encoding {_shown(encoding)} are refused")
    return text.encode("latin1")


def _bytearray(content: Any = b"", encoding: str = "latin1") -> bytearray:
    # never bytearray(count), which allocates what the pickle asks for
    return bytearray(content if isinstance(content, bytes) else _encode(content, encoding))


def _reconstruct(kind: Any, *_: Any) -> _Array:
    if not isinstance(kind, _Name) or kind != "numpy.ndarray":
        raise _Malformed(f"NumPy's _reconstruct is asked for {_shown(kind)}, wanted numpy.ndarray")
    return _Array()


def _frombuffer(content: Any, dtype: _DType, shape: Any, order: str) -> _Array:
    array = _Array()
    array.build((1, shape, dtype, order == "F", content))
    return array


def _scalar(dtype: _DType, content: Any) -> np.generic:
    content = content.encode("latin1") if isinstance(content, str) else content
    if dtype.value.hasobject or not isinstance(content, bytes) or len(content) != dtype.value.itemsize:
        raise _Malformed(f"a NumPy scalar of {dtype.value} is malformed")
    array = np.frombuffer(content, dtype.value)
    check_text(array)
    return array[0]


def _device(kind: str, index: int | None = None) -> str:
    return _expect(kind, str) if index is None else f"{_expect(kind, str)}:{_expect(index, int)}"


def _parameter(tensor: Any, *_: Any) -> _Tensor:
    if not isinstance(tensor, _Tensor):
        raise _Malformed("a parameter is no tensor")
    return tensor


def _tensor_of_dtype(
    storage: Any, offset: Any, shape: Any, strides: Any, _grad: Any, _hooks: Any, dtype: Any, *_: Any
) -> _Tensor:
    if not isinstance(dtype, _Name):  # what else is looked up would be hashed
        raise _Malformed(f"a tensor of {_shown(dtype)} is refused")
    return _Tensor(storage, offset, shape, strides, _TORCH_DTYPES[dtype])


_KEYED = (dict, set, frozenset)  # the machine checks their keys
_CALLS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": dict,
    "collections.defaultdict": _defaultdict,
    "builtins.set": set,
    "builtins.frozenset": frozenset,
    "builtins.bytearray": _bytearray,
    "builtins.bytes": lambda: b"",
    "_codecs.encode": _encode,  # how protocol 2 spells bytes
    "torch.Size": lambda sizes=(): tuple(sizes),
    "torch.device": _device,
    "torch._utils._rebuild_tensor": _Tensor,
    "torch._utils._rebuild_tensor_v2": lambda storage, offset, shape, strides, *_: _Tensor(
        storage, offset, shape, strides
    ),
    "torch._utils._rebuild_tensor_v3": _tensor_of_dtype,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "numpy.dtype": _DType,
    **{
        f"numpy.{core}.{name}": function
        for core in ("core", "_core")
        for name, function in {
            "multiarray._reconstruct": _reconstruct,
            "multiarray.scalar": _scalar,
            "numeric._frombuffer": _frombuffer,
        }.items()
    },
}
_NAMES = {
    *_CALLS, *_STORAGES, *_TORCH_DTYPES, *_FACTORIES, "numpy.ndarray",
    *(f"numpy.{np.dtype(code).name}" for code in "?bhilqBHILQefd"),
}  # fmt: skip
_LITERALS = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING",
    "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES",
    "BINBYTES8", "BYTEARRAY8",
}  # fmt: skip
_FRESH: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False,
    "EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "EMPTY_DICT": dict, "EMPTY_SET": set,
}  # fmt: skip
# how many values an opcode takes from the stack, or that it takes those above the last mark
_TAKES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "APPEND": 1, "SETITEM": 2}
_TAKES_TO_MARK = {"TUPLE", "LIST", "DICT", "FROZENSET", "APPENDS", "SETITEMS", "ADDITEMS", "POP_MARK"}


def load_torch_checkpoint(path: str | Path) -> Any:
    """The object that `torch.save` wrote.

    Tensors, parameters, storages and NumPy arrays come as NumPy arrays, read-only because tensors that share bytes go
    on sharing them (bfloat16 and float8 by `ml_dtypes`); OrderedDict and defaultdict as dict, torch.Size as tuple,
    torch.device and the names of types as text. Attributes of containers (`_metadata`) are dropped.

    Raises:
      ValueError: no checkpoint, one that is damaged, cut off or big-endian, one that unfolds to far more than its
        size, or one that names or calls anything but arrays and plain containers: told with the name and the byte of
        the pickle (`data.pkl` in a zip archive, else the file) where it stands.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"path: {path} is no file, wanted a torch checkpoint")
    try:
        data = path.read_bytes()
        return _read_zip(data) if data.startswith(b"PK\3\4") else _read_legacy(data)
    except _Malformed as error:
        raise ValueError(f"path: {error}") from None
    except MemoryError:
        raise ValueError(f"path: {path} takes more memory than there is") from None
    except (
        ValueError, LookupError, TypeError, AttributeError, ArithmeticError, EOFError, OSError, struct.error,
        RuntimeError, zipfile.BadZipFile,
    ) as error:  # fmt: skip
        raise ValueError(f"path: {path} is no whole torch checkpoint ({_shown(error)})") from error


def _read_zip(data: bytes) -> Any:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        if len(entries) != len(archive.infolist()):
            raise _Malformed("the archive has two entries of one name")
        # torch stores without compression, so no honest archive declares more than it holds
        if any(entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 for entry in entries.values()):
            raise _Malformed("the archive has compressed or encrypted entries, wanted stored ones")
        if (declared := sum(entry.file_size for entry in entries.values())) > len(data):
            raise _Malformed(f"the archive declares {declared} bytes and has {len(data)}")
        names = [name for name in entries if name.rpartition("/")[2] == "data.pkl"]
        if len(names) != 1:
            raise _Malformed(f"wanted one data.pkl in the archive, got {len(names)}")
        root = names[0].removesuffix("data.pkl")
        if f"{root}byteorder" in entries and archive.read(f"{root}byteorder") != b"little":
            raise _Malformed("the checkpoint is big-endian, wanted little-endian")
        machine = _Machine(len(data))
        value = machine.run(io.BytesIO(archive.read(names[0])))
        for key, storage in machine.storages.items():
            storage.fill(_shown(key), archive.read(f"{root}data/{key}"))
    return machine.finish(value)


def _read_legacy(data: bytes) -> Any:
    file, machine = io.BytesIO(data), _Machine(len(data))
    if machine.run(file) != _LEGACY_MAGIC or machine.run(file) != _LEGACY_PROTOCOL:
        raise _Malformed("wanted a torch checkpoint, got a pickle of something else")
    if not machine.run(file)["little_endian"]:
        raise _Malformed("the checkpoint is big-endian, wanted little-endian")
    value = machine.run(file)
    keys = [str(machine.key(key)) for key in machine.run(file)]
    if len(set(keys)) != len(keys):
        raise _Malformed("the checkpoint lists a storage twice")
    for key in keys:
        storage, count = machine.storages[key], int.from_bytes(file.read(8), "little")
        if count != storage.count:
            raise _Malformed(f"storage {_shown(key)} holds {count} values, not {storage.count}; the file is damaged")
        storage.fill(_shown(key), file.read(count * storage.dtype.itemsize))
    return machine.finish(value)


class _Machine:
    """Runs pickles of one file of `size` bytes; `finish` turns what they left into arrays."""

    def __init__(self, size: int):
        self.storages: dict[str, _Storage] = {}
        self.room = _FOLD * max(size, 2**20)
        self.tuple_keys = 0
        self.done: dict[int, Any] = {}

    def run(self, file: io.BytesIO) -> Any:
        stack: list[Any] = []
        marks: list[list[Any]] = []  # the stacks below each mark
        memo: dict[int, Any] = {}  # a dict, as an index may be anything up to 2**32

        for opcode, arg, at in cast(Any, pickletools.genops(file)):
            name = opcode.name
            self._spend(_OBJECT.get(name, 0))
            items = [stack.pop() for _ in range(_TAKES.get(name, 0))][::-1]
            if name in _TAKES_TO_MARK:
                items, stack = stack, marks.pop()
            match name:
                case _ if name in _LITERALS:
                    stack.append(arg)
                case _ if name in _FRESH:
                    stack.append(_FRESH[name]())
                case "PROTO" | "FRAME" | "POP_MARK":
                    pass
                case "STOP":
                    return stack.pop()
                case "MARK":
                    if len(marks) > 3 * _DEPTH:  # a level of an honest pickle takes at most two
                        _refuse(f"is nested deeper than {_DEPTH} levels", at)
                    marks.append(stack)
                    stack = []
                case "POP":
                    stack.pop()
                case "DUP":
                    stack.append(stack[-1])
                case "PUT" | "BINPUT" | "LONG_BINPUT":
                    memo[arg] = stack[-1]
                case "MEMOIZE":
                    memo[len(memo)] = stack[-1]
                case "GET" | "BINGET" | "LONG_BINGET":
                    stack.append(memo[arg])
                case "TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3":
                    stack.append(tuple(items))
                case "LIST":
                    stack.append(items)
                case "FROZENSET":
                    stack.append(frozenset(map(self.key, items)))
                case "DICT":
                    stack.append(self._dict(_pairs(items)))
                case "APPEND" | "APPENDS":
                    _expect(stack[-1], list).extend(items)
                case "SETITEM" | "SETITEMS":
                    _expect(stack[-1], dict).update(self._dict(_pairs(items)))
                case "ADDITEMS":
                    _expect(stack[-1], set).update(map(self.key, items))
                case "GLOBAL":
                    stack.append(_allowed(arg.replace(" ", "."), at))
                case "STACK_GLOBAL":
                    attribute, module = stack.pop(), stack.pop()
                    stack.append(_allowed(f"{_text(module)}.{_text(attribute)}", at))
                case "REDUCE":
                    arguments, function = _expect(stack.pop(), tuple), stack.pop()
                    stack.append(self._call(function, arguments, at))
                case "BUILD":
                    state, target = stack.pop(), stack[-1]
                    if isinstance(target, _Array | _DType):
                        # text in a state is encoded, and a state is used again for two bytes as arguments are
                        self._spend(len(state) + sum(len(item) for item in state if isinstance(item, str)))
                        target.build(state)
                    elif type(target) is not dict:  # a dict's attributes are dropped
                        _refuse(f"sets the state of a {type(target).__name__.strip('_')}", at)
                case "BINPERSID":
                    stack.append(self._storage(stack.pop(), at))
                case "INST":
                    _refuse(f"names {_shown(arg.replace(' ', '.'))}", at)
                case _:  # OBJ, NEWOBJ, the registry of extensions, buffers outside the pickle, ...
                    _refuse(f"uses the opcode {name}", at)
        raise _Malformed("the pickle has no end")

    def finish(self, value: Any, depth: int = 0) -> Any:
        """The value with arrays in it; what the pickle shares stays shared, so that no file grows without bound."""
        if depth > _DEPTH:
            raise _Malformed(f"the checkpoint is nested deeper than {_DEPTH} levels, or contains itself")
        if isinstance(value, _Name):
            return str(value)
        if isinstance(value, str | bytes | bytearray | int | float | np.generic | set | frozenset | None):
            return value
        if id(value) not in self.done:
            self.done[id(value)] = self._finish(value, lambda item: self.finish(item, depth + 1))
        return self.done[id(value)]

    def _finish(self, value: Any, finish: Callable[[Any], Any]) -> Any:
        match value:
            case dict():
                return {key: finish(item) for key, item in value.items()}
            case list() | tuple():
                return type(value)([finish(item) for item in value])
            case _Tensor():
                self._spend(_ARRAY + math.prod(value.shape) * value.dtype.itemsize)
                return value.array()
            case _Storage():
                return np.frombuffer(value.content, value.dtype)
            case _Array():
                # objects are copied, and text is looked through
                size = value.dtype.itemsize if type(value.content) is list else 1
                self._spend(_ARRAY + len(value.content) * size)
                return value.array(finish)
            case _DType():
                return value.value
        raise _Malformed(f"the checkpoint holds a {type(value).__name__.strip('_')}")

    def _call(self, function: Any, arguments: tuple[Any, ...], at: int) -> Any:
        if not isinstance(function, _Name) or function not in _CALLS:
            _refuse(f"calls {_shown(function)}", at)
        # a pickle that spells a text or a list once may ask for many copies of it
        self._spend(len(arguments) + sum(len(item) * _COPY[type(item)] for item in arguments if type(item) in _COPY))
        make = _CALLS[function]
        if make not in _KEYED:
            return make(*arguments)
        (items,) = arguments or ((),)
        return self._dict(items) if make is dict else make(map(self.key, items))

    def key(self, value: Any) -> Any:
        """A dict key or set member: no deep tuple, whose hash would overflow the stack of C, and no slow one."""
        if isinstance(value, tuple):
            # hashes of tuples can be made alike, and n of one hash are compared n**2 times
            self.tuple_keys += 1
            if self.tuple_keys > _TUPLE_KEYS:
                raise _Malformed(f"more than {_TUPLE_KEYS} tuples stand as dict keys or set members")
            plain = len(value) <= _KEY_ITEMS and all(map(_is_plain, value))
        else:
            plain = _is_plain(value)
        if not plain:
            kind = type(value).__name__.strip("_")
            raise _Malformed(f"a {kind} stands as a dict key or set member, wanted short text or a number of 64 bits")
        return value

    def _dict(self, items: Iterable[Any]) -> dict[Any, Any]:
        return {self.key(key): value for key, value in items}

    def _storage(self, pid: Any, at: int) -> _Storage:
        if not isinstance(pid, tuple) or len(pid) not in (5, 6) or pid[0] != "storage" or pid[5:] not in ((), (None,)):
            _refuse("refers to something that is no whole storage", at)
        _, kind, key, _, count = pid[:5]
        if not isinstance(kind, _Name) or kind not in _STORAGES:
            _refuse(f"wants a storage of {_shown(kind)}", at)
        if not isinstance(count, int) or count < 0 or not isinstance(key, str | int):
            _refuse("declares a malformed storage", at)
        self.key(key)
        storage = self.storages.setdefault(str(key), _Storage(kind, count))
        if (storage.dtype, storage.count) != (np.dtype(_STORAGES[kind]), count):
            raise _Malformed(f"storage {_shown(key)} is declared twice, and differently")
        return storage

    def _spend(self, size: int) -> None:
        self.room -= size
        if self.room < 0:
            raise _Malformed(f"the checkpoint unfolds to more than {_FOLD} times its size; the file is damaged")


def _allowed(name: str, at: int) -> _Name:
    known = f"builtins.{name.removeprefix('__builtin__.')}" if name.startswith("__builtin__.") else name
    if known not in _NAMES:
        _refuse(f"names {_shown(name)}", at)
    return _Name(known)


def _refuse(what: str, at: int) -> NoReturn:
    raise _Malformed(f"the checkpoint {what} at byte {at}, which is refused; nothing was run")


def _expect(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise _Malformed(f"the pickle has a {type(value).__name__.strip('_')} where a {kind.__name__} belongs")
    return value


def _pairs(items: list[Any]) -> Iterable[tuple[Any, Any]]:
    return zip(items[::2], items[1::2], strict=True)


def _shown(value: Any) -> str:
    return shown(value if isinstance(value, Exception) else _text(value))


def _text(value: Any) -> str:
    if isinstance(value, str | int):
        return str(value)
    # repr of what a pickle nested would recurse
    flat = isinstance(value, tuple) and all(isinstance(item, int) for item in value)
    return f"({', '.join(map(str, value))})" if flat else f"a {type(value).__name__.strip('_')}"
