"""Reads attack results as BackdoorBench publishes them: the backdoored model and its poisoned test images.

The layout is that of https://github.com/SCLBD/BackdoorBench (`utils/save_load_attack.py`, `utils/bd_dataset_v2.py`).
"""

from __future__ import annotations

import io
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from madjax.interop.guard import check_unfolded, shown
from madjax.interop.torch_checkpoint import load_torch_checkpoint
from madjax.interop.weights import find_weights

_RESULT, _IMAGES = "attack_result.pt", "bd_test_dataset"
_MODES = {"L": 1, "RGB": 3}
_MOST_PIXELS = 2**22


class BackdoorBenchResult(NamedTuple):
    """A model and the poisoned test images of an attack on it, in the order of the test set they were made from.

    Attributes:
      model_name: as BackdoorBench calls it, `preactresnet18`.
      num_classes: number of classes.
      image_size: (height, width, channels) that the model takes, or None where the result does not tell.
      dataset: name of the clean data.
      weights: the model's, by torch's names.
      images: uint8 [n, height, width, channels], with the trigger.
      original_labels: int32 [n], before the attack changed them.
      indices: int32 [n], places in the clean test set.
    """

    model_name: str
    num_classes: int
    image_size: tuple[int, int, int] | None
    dataset: str
    weights: dict[str, np.ndarray]
    images: np.ndarray
    original_labels: np.ndarray
    indices: np.ndarray


def load_backdoorbench(path: str | Path) -> BackdoorBenchResult:
    """A downloaded attack result: nothing in it is executed, and no path in it is followed.

    Args:
      path: the folder with `attack_result.pt` and `bd_test_dataset/{original label}/{index}.png`, or that
        `attack_result.pt`.

    Raises:
      ValueError: what is missing, refused or damaged, with the file's place in the folder.
    """
    path = Path(path)
    folder = path.parent if path.name == _RESULT else path
    result = load_torch_checkpoint(_inside(folder, folder / _RESULT))
    if type(result) is not dict:
        raise ValueError(f"path: {_RESULT} is no attack result (it holds no dict)")
    try:
        fields = {name: result[name] for name in ("model_name", "num_classes", "clean_data", "model")}
    except KeyError as error:
        raise ValueError(f"path: {_RESULT} is no attack result ({error} is missing)") from error
    name, classes, dataset = fields["model_name"], fields["num_classes"], fields["clean_data"]
    if not (isinstance(name, str) and isinstance(dataset, str) and _is_count(classes)):
        raise ValueError(f"path: {_RESULT} has a malformed model_name, num_classes or clean_data")
    try:
        images, labels, indices = _read_images(folder, int(classes))
    except OSError as error:
        raise ValueError(f"path: {_IMAGES} cannot be read ({shown(error)})") from error
    return BackdoorBenchResult(
        name, int(classes), _image_size(result.get("img_size")), dataset, find_weights(fields["model"]),
        images, labels, indices,
    )  # fmt: skip


def _is_count(value: Any) -> bool:
    return isinstance(value, int | np.integer) and 0 < int(value) < 2**31


def _image_size(value: Any) -> tuple[int, int, int] | None:
    if value is None:
        return None
    if not isinstance(value, list | tuple) or len(value) != 3 or not all(map(_is_count, value)):
        raise ValueError(f"path: {_RESULT} has a malformed img_size, wanted height, width and channels")
    height, width, channels = map(int, value)
    return height, width, channels


def _read_images(folder: Path, classes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    files: dict[int, tuple[int, Path]] = {}
    for subfolder in _entries(folder, folder / _IMAGES):
        label = _number(folder, subfolder, subfolder.name)
        if label >= classes:
            raise ValueError(f"path: {_place(folder, subfolder)} is a label beyond the {classes} classes")
        for file in _entries(folder, subfolder):
            index = _number(folder, file, file.name.removesuffix(".png"))
            if index in files:
                raise ValueError(f"path: {_place(folder, file)} and {_place(folder, files[index][1])} share an index")
            files[index] = label, file
    images: list[np.ndarray] = []
    held = 0
    for _, (_, file) in sorted(files.items()):
        images.append(_read_png(folder, file, images[0].shape if images else None))
        held += file.stat().st_size
        check_unfolded(f"path: {_IMAGES}", len(images) * images[0].nbytes, held)
    labels = [label for _, (label, _) in sorted(files.items())]
    return np.stack(images), np.array(labels, np.int32), np.array(sorted(files), np.int32)


def _entries(folder: Path, subfolder: Path) -> list[Path]:
    entries = sorted(_inside(folder, subfolder).iterdir()) if subfolder.is_dir() else []
    if not entries:
        raise ValueError(f"path: {_place(folder, subfolder)} is no folder with files in it")
    return entries


def _number(folder: Path, file: Path, text: str) -> int:
    # one spelling for each number: int() also takes signs, blanks, underscores and other scripts' digits
    if not (text.isascii() and text.isdigit() and len(text) < 10 and str(int(text)) == text):
        raise ValueError(f"path: {_place(folder, file)} is not named by a number")
    return int(text)


def _read_png(folder: Path, file: Path, shape: tuple[int, ...] | None) -> np.ndarray:
    place = _place(folder, file)
    if not _inside(folder, file).is_file() or file.suffix != ".png":
        raise ValueError(f"path: {place} is no PNG file")
    data = file.read_bytes()
    if len(data) < 24 or not data.startswith(b"\x89PNG\r\n\x1a\n"):
        raise ValueError(f"path: {place} is no PNG file")
    # the size stands in the header, and is judged before anything is decoded
    width, height = struct.unpack(">II", data[16:24])
    if width * height > _MOST_PIXELS or (shape is not None and (height, width) != shape[:2]):
        wanted = f"at most {_MOST_PIXELS} pixels" if shape is None else f"{shape[1]} x {shape[0]} as the first one"
        raise ValueError(f"path: {place} declares {width} x {height} pixels, wanted {wanted}")
    try:
        Image.open(io.BytesIO(data), formats=["PNG"]).verify()  # checksums, and that the end is there
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            mode, array = image.mode, np.asarray(image)
    except (OSError, SyntaxError, ValueError, struct.error) as error:  # what pillow raises, by the kind of damage
        raise ValueError(f"path: {place} is a damaged PNG file ({shown(error)})") from error
    if mode not in _MODES:
        raise ValueError(f"path: {place} is of mode {mode}, wanted grey or RGB")
    array = array.reshape(height, width, _MODES[mode])
    if shape is not None and array.shape != shape:
        raise ValueError(f"path: {place} has shape {array.shape}, wanted {shape} as the first one")
    return array


def _inside(folder: Path, file: Path) -> Path:
    if not file.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"path: {_place(folder, file)} leads out of the folder")
    return file


def _place(folder: Path, file: Path) -> str:
    return shown(file.relative_to(folder).as_posix())
