"""Image files `<split>/<class>/<file>` in a folder or a tar, read as streams; what could do harm is refused by name."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Collection, Iterator
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from madjax.interop.guard import Refused, check_unfolded, shown

LIMIT = 2**26  # bytes of a file and pixels of an image: far above any data set's, far below what fills a memory
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # pillow's others call programs, or are no photographs


def list_image_files(path: Path) -> list[str]:
    """Sorted names `<split>/<class>/<file>` of the files in a folder or tar; names with a leading dot are passed over.

    Raises:
      ValueError: naming the first entry that is elsewhere, a link out of the folder, any link or device in a tar, too
        large, or an empty folder.
    """
    files: set[str] = set()
    folders: set[str] = set()
    for name, is_folder, _ in _entries(path):
        parts = PurePosixPath(name).parts
        if not parts or any(part.startswith(".") for part in parts):  # a tar may name its own folder, "./"
            continue
        if len(parts) > 2 if is_folder else len(parts) != 3:
            raise ValueError(f"name: {path} holds '{shown(name)}', wanted only <split>/<class>/<file>")
        if name in files:
            raise ValueError(f"name: {path} holds '{shown(name)}' twice, wanted it once")
        (folders if is_folder else files).add(name)
    if not files:
        raise ValueError(f"name: {path} holds no files, wanted <split>/<class>/<file>")
    empty = folders - {parent for name in files for parent in (name.rpartition("/")[0], name.partition("/")[0])}
    if empty:
        raise ValueError(f"name: {path} holds the empty folder '{shown(min(empty))}', wanted images in it")
    return sorted(files)


def read_image_files(path: Path, names: Collection[str]) -> Iterator[tuple[str, np.ndarray]]:
    """The named files as (name, uint8 `[height, width, 1 or 3]`), in one pass and in the order of the folder or tar.

    Raises:
      ValueError: for an image that `decode_image` refuses, or images that together are far larger than their files.
    """
    held, size = (0 if path.is_dir() else path.stat().st_size), 0
    for name, _, data in _entries(path, names):
        if data is not None:
            image = decode_image(data, f"{path}: {shown(name)}")
            held, size = held + (len(data) if path.is_dir() else 0), size + image.nbytes
            check_unfolded(f"name: {path}", size, held)
            yield name, image


def decode_image(data: bytes, name: str) -> np.ndarray:
    """An encoded image as uint8 `[height, width, 1 or 3]`: grey stays grey, everything else turns into RGB.

    Raises:
      ValueError: with the image's name, where it is broken, not 8 bits deep, or of more than `LIMIT` pixels.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > LIMIT:  # known from the header, before any pixel is decoded
                raise ValueError(f"{image.width}×{image.height} pixels, wanted at most {LIMIT} in all")
            if image.mode[0] in "IF":
                raise ValueError(f"mode {image.mode}, wanted 8 bits a channel")
            pixels = np.asarray(image.convert("L" if image.mode in ("1", "L") else "RGB"))
    except Exception as error:  # pillow's decoders raise nearly anything on broken files
        raise ValueError(f"image: {name} cannot be read: {shown(error)}") from None
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _entries(path: Path, wanted: Collection[str] = ()) -> Iterator[tuple[str, bool, bytes | None]]:
    """(name, whether it is a folder, the content if wanted) of everything in a folder or tar."""
    return _folder_entries(path, wanted) if path.is_dir() else _tar_entries(path, wanted)


def _folder_entries(root: Path, wanted: Collection[str]) -> Iterator[tuple[str, bool, bytes | None]]:
    inside = root.resolve()
    # links are followed: those that lead out are refused here, and loops are too deep for `list_image_files`
    for folder, subfolders, files in os.walk(root, followlinks=True):
        for entry in sorted((*subfolders, *files)):
            item = Path(folder, entry)
            name = item.relative_to(root).as_posix()
            if item.is_symlink() and not item.resolve().is_relative_to(inside):
                raise ValueError(f"name: {root} holds '{shown(name)}', a link out of it, wanted files inside")
            if item.is_dir():
                yield name, True, None
            elif item.is_file():
                _check_size(name, item.stat().st_size)
                yield name, False, item.read_bytes() if name in wanted else None
            else:
                raise ValueError(f"name: {root} holds '{shown(name)}', a broken link or a device, wanted files")


class _Member(tarfile.TarInfo):
    """Checks the sizes of extended headers too, which tarfile reads by itself."""

    @classmethod
    def frombuf(cls, buf, encoding, errors):
        member = super().frombuf(buf, encoding, errors)
        _check_size(member.name, member.size)
        return member


def _tar_entries(path: Path, wanted: Collection[str]) -> Iterator[tuple[str, bool, bytes | None]]:
    held, size = path.stat().st_size, 0
    try:
        with tarfile.open(path, "r|*", tarinfo=_Member) as tar:
            for member in tar:  # member after member: each is checked before its content is read or passed over
                name = PurePosixPath(member.name)
                if name.is_absolute() or ".." in name.parts:
                    raise Refused(f"name: {path} holds '{shown(member.name)}', wanted names inside the tar")
                if not (member.isreg() or member.isdir()):
                    raise Refused(f"name: {path} holds '{shown(member.name)}', a link or a device, wanted files")
                _check_size(member.name, member.size)
                size += member.size
                check_unfolded(f"name: {path}", size, held)
                content = tar.extractfile(member) if str(name) in wanted else None
                yield str(name), member.isdir(), content and content.read()
    except Refused:
        raise
    except Exception as error:  # tarfile and its decompressors raise nearly anything on broken files
        raise ValueError(f"name: {path} cannot be read as a tar: {shown(error)}") from None


def _check_size(name: str, size: int) -> None:
    if size > LIMIT:
        raise Refused(f"name: '{shown(name)}' has {size} bytes, wanted at most {LIMIT}")
