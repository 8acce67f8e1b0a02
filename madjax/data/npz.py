"""Arrays from `.npz` files: nothing is unpickled, and nothing is allocated that the file cannot hold."""

from __future__ import annotations

import math
import struct
import zipfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from madjax.interop.guard import check_text, check_unfolded, shown


def npz_names(argument: str, path: str | Path) -> list[str]:
    """Names of the arrays.

    Raises:
      ValueError: in one line with `argument` and `path`, where it is no npz.
    """
    with _members(argument, path) as (_, members):
        return list(members)


def read_npz(
    argument: str, path: str | Path, names: Collection[str] | None = None, *, mapped: bool = False
) -> dict[str, np.ndarray]:
    """The arrays by name; if `names` is given, those of them that are there.

    Args:
      mapped: leave numbers that are not compressed in the file, and read of them what is looked at.

    Raises:
      ValueError: in one line with `argument` and `path`, where the file is no npz, is damaged, encrypted, holds Python
        objects or declares far more than it holds.
    """
    with _members(argument, path) as (archive, members):
        return {
            name: _array(archive, member, mapped) for name, member in members.items() if names is None or name in names
        }


@contextmanager
def _members(argument: str, path: str | Path) -> Iterator[tuple[zipfile.ZipFile, dict[str, zipfile.ZipInfo]]]:
    try:
        with zipfile.ZipFile(path) as archive:
            # what is read from a member ends where the directory says, whatever its data unfold to
            check_unfolded("it", sum(member.file_size for member in archive.infolist()), Path(path).stat().st_size)
            yield archive, {member.filename.removesuffix(".npy"): member for member in archive.infolist()}
    except Exception as error:  # zipfile, its decompressors and NumPy's parser of headers raise nearly anything
        raise ValueError(f"{argument}: cannot read {path} as npz ({shown(error)})") from error


def _array(archive: zipfile.ZipFile, member: zipfile.ZipInfo, mapped: bool) -> np.ndarray:
    with archive.open(member) as file:
        old = np.lib.format.read_magic(file) == (1, 0)
        read_header = np.lib.format.read_array_header_1_0 if old else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read_header(file)
        header = file.tell()
        left = member.file_size - header
    if dtype.hasobject or dtype.kind == "V":
        raise ValueError(f"{shown(member.filename)} holds neither numbers nor text")
    # told before NumPy allocates what the header asks for
    if not dtype.itemsize or math.prod(shape) * dtype.itemsize != left:
        raise ValueError(f"{shown(member.filename)} declares {shown(f'{dtype} {shape}')} and has {left} bytes")
    if mapped and member.compress_type == zipfile.ZIP_STORED and dtype.kind in "biuf" and left:
        start = _data_start(archive, member) + header
        return np.memmap(archive.filename, dtype, "r", start, shape, "F" if fortran else "C")  # pyright: ignore
    with archive.open(member) as file:
        array = np.lib.format.read_array(file, allow_pickle=False)
    check_text(array)
    return array


def _data_start(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> int:
    """Where a member's bytes begin: behind its own header, whose last two fields are the lengths of what follows."""
    with open(str(archive.filename), "rb") as file:
        file.seek(member.header_offset)
        name, extra = struct.unpack("<26x2H", file.read(30))
    return member.header_offset + 30 + name + extra
