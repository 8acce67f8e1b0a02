"""Labelled images by name: the sets of the backdoor literature, and one's own folders, tars and arrays."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from madjax.data.digits import digits
from madjax.data.files import decode_image, list_image_files, read_image_files
from madjax.data.npz import npz_names, read_npz
from madjax.data.splits import balanced_subset, split_by_class
from madjax.interop.guard import shown

FILES = {
    "cifar10": "cifar10.npz",
    "gtsrb": "gtsrb32.npz",
    "mnist": "mnist.npz",
    "tiny_imagenet": "tiny_imagenet32.tar.xz",
}
ALIASES = (("train", "training"), ("validation", "val", "valid", "test"))


class ImageSet(NamedTuple):
    """Images with their classes.

    Attributes:
      images: uint8 `[n, height, width, channels]`, one channel or three.
      labels: int32 `[n]`.
      class_names: by label, the same for all splits of a set; None where the source does not tell.
      groups: int `[n]`, near-duplicates that no split may separate, as GTSRB's tracks; no group holds two classes.
    """

    images: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...] | None
    groups: np.ndarray | None


class _Source(NamedTuple):
    """A split whose labels are known and whose images are yet to be read."""

    labels: np.ndarray
    class_names: tuple[str, ...] | None
    groups: np.ndarray | None
    read: Callable[[np.ndarray], Iterable[tuple[int, str, np.ndarray]]]  # indices -> (index, name, image), any order


def load_images(
    name: str,
    split: str,
    *,
    data_dir: str | Path | None = None,
    size: int | None = None,
    max_examples: int | None = None,
) -> ImageSet:
    """Loads one split.

    Args:
      name: `digits` (halves: "train" and "test"), or one of `FILES`, looked for in `data_dir`, or a path:
        `.npz` with `x_train`, `y_train` and perhaps `track_train`, or with `x`, `y` for a single split "all" (also
        `image`, `label`, `group`; `classes` has the names); a folder of `<split>/<class>/<file>`; a tar of these.
        What is at none of these places is a TensorFlow data set, looked for in `data_dir/tfds`, `data_dir` and the
        default folder, to which it is downloaded.
      split: as the source calls it; where it has no such split, train and training mean the same, and so do
        validation, val, valid and test.
      data_dir: folder of data sets.
      size: height and width in pixels, to which other images are resized, bilinearly with antialiasing; None leaves
        them, and images of several sizes are then an error.
      max_examples: takes a subset of at most so many, balanced over classes and always the same; groups are kept whole.

    Raises:
      ValueError: in one line, with the argument or file that is wrong; nothing is ever unpickled or extracted.
    """
    for argument, value in (("size", size), ("max_examples", max_examples)):
        if value is not None and value < 1:
            raise ValueError(f"{argument}: got {value}, wanted a positive number")
    source = _open(name, split, None if data_dir is None else Path(data_dir))
    indices = np.arange(len(source.labels))
    if max_examples is not None:
        try:
            indices = balanced_subset(np.random.default_rng(0), source.labels, max_examples, source.groups)
        except ValueError as error:
            raise ValueError(f"max_examples: {str(error).partition(': ')[2]}") from None
    groups = None if source.groups is None else source.groups[indices]
    return ImageSet(_stack(source, indices, size), source.labels[indices], source.class_names, groups)


def _open(name: str, split: str, data_dir: Path | None) -> _Source:
    if name == "digits":
        images, labels = digits()
        # no official split: half and half, the same each time
        parts = split_by_class(np.random.default_rng(0), labels, (0.5, 0.5))
        part = np.sort(parts[("train", "test").index(_find_split(split, ("train", "test"), name))])
        return _from_arrays(name, images[part], labels[part], tuple("0123456789"), None)
    path = (data_dir / FILES[name] if data_dir else None) if name in FILES else Path(name)
    if path is None or not path.exists():
        return _open_tfds(name, split, data_dir, path)
    if path.suffix == ".npz":
        return _open_npz(path, split)
    return _open_files(path, split)


def _find_split(split: str, available: Collection[str], where: str | Path) -> str:
    for name in (split, *(alias for aliases in ALIASES if split in aliases for alias in aliases)):
        if name in available:
            return name
    raise ValueError(f"split: got {split!r}, wanted one of {where}: {shown(', '.join(sorted(available)))}")


def _open_npz(path: Path, split: str) -> _Source:
    stems = {"images": ("x", "image", "images"), "labels": ("y", "label", "labels"), "groups": ("track", "group")}
    parts = [key.partition("_") for key in npz_names("name", path)]
    splits = {suffix or "all" for stem, _, suffix in parts if stem in stems["images"]}
    split = _find_split(split, splits, path)
    suffix = "" if split == "all" else f"_{split}"
    keys = {what: [stem + suffix for stem in stems[what]] for what in stems}
    arrays = read_npz("name", path, {"classes", *(key for some in keys.values() for key in some)})
    images, labels, groups = (next((arrays[key] for key in some if key in arrays), None) for some in keys.values())
    class_names = tuple(map(str, arrays["classes"].ravel())) if "classes" in arrays else None
    return _from_arrays(f"{path}, split {shown(split)}", images, labels, class_names, groups)


def _from_arrays(where: str, images: Any, labels: Any, class_names: tuple[str, ...] | None, groups: Any) -> _Source:
    for what, array in {"images": images, "labels": labels}.items():
        if array is None:
            raise ValueError(f"{what}: none in {where}, wanted an array of them")
    if images.dtype != np.uint8:
        raise ValueError(f"images: {images.dtype} in {where}, wanted uint8 in 0..255")
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or images.shape[-1] not in (1, 3) or not images.size:
        raise ValueError(f"images: shape {images.shape} in {where}, wanted [n, height, width, 1 or 3]")
    for what, array in {"labels": labels, "groups": groups}.items():
        if array is not None and (array.shape != images.shape[:1] or array.dtype.kind not in "iu"):
            raise ValueError(f"{what}: {array.dtype} {array.shape} in {where}, wanted int ({len(images)},)")
    if groups is not None:  # a track's number may come again in another class
        pairs = np.stack([labels.astype(np.int64), groups.astype(np.int64)], 1)
        groups = np.unique(pairs, axis=0, return_inverse=True)[1].reshape(-1)
    read = lambda indices: ((i, f"{where}, image {i}", images[i]) for i in indices)  # noqa: E731
    return _Source(_check_labels(where, labels, class_names), class_names, groups, read)


def _check_labels(where: str, labels: np.ndarray, class_names: tuple[str, ...] | None) -> np.ndarray:
    stop = np.iinfo(np.int32).max if class_names is None else len(class_names)
    if labels.min() < 0 or labels.max() >= stop:
        raise ValueError(f"labels: {labels.min()}..{labels.max()} in {where}, wanted 0..{stop - 1}")
    return labels.astype(np.int32)


def _open_files(path: Path, split: str) -> _Source:
    names = list_image_files(path)
    class_names = tuple(sorted({name.split("/")[1] for name in names}))
    split = _find_split(split, {name.split("/")[0] for name in names}, path)
    names = [name for name in names if name.startswith(f"{split}/")]
    codes = {class_name: code for code, class_name in enumerate(class_names)}
    labels = np.array([codes[name.split("/")[1]] for name in names], np.int32)

    def read(indices: np.ndarray):
        wanted = {names[i]: i for i in indices}
        return ((wanted[name], shown(name), image) for name, image in read_image_files(path, wanted))

    return _Source(labels, class_names, None, read)


def _open_tfds(name: str, split: str, data_dir: Path | None, path: Path | None) -> _Source:
    import tensorflow_datasets as tfds  # slow to import

    builder = _prepared_builder(name, data_dir, path)
    features = builder.info.features
    if not {"image", "label"} <= set(features) or not isinstance(features["image"], tfds.features.Image):
        raise ValueError(f"name: {name!r} has the features {', '.join(features)}, wanted image and label")
    names = getattr(features["label"], "names", None)
    split = _find_split(split, builder.info.splits, name)
    try:
        source = builder.as_data_source(split=split, decoders={"image": tfds.decode.SkipDecoding()})
    except NotImplementedError:
        raise ValueError(f"name: {name!r} is prepared as {builder.info.file_format}, wanted array_record") from None

    def read(indices: np.ndarray):
        for i in indices:
            where = f"{name}, split {split}, image {i}"
            yield i, where, decode_image(source[int(i)]["image"], where)

    labels = np.array([item["label"] for item in source])
    class_names = tuple(names) if names else None
    return _Source(_check_labels(f"{name}, split {split}", labels, class_names), class_names, None, read)


def _prepared_builder(name: str, data_dir: Path | None, path: Path | None) -> Any:
    """Of the first folder where the data set is prepared, or downloaded to the default one."""
    import tensorflow_datasets as tfds

    folders = [] if data_dir is None else [data_dir / "tfds", data_dir]
    try:
        for folder in (*folders, None):
            builder = tfds.builder(name, data_dir=folder, file_format="array_record")
            if builder.is_prepared():
                return builder
        builder.download_and_prepare()
    except Exception as error:  # of nearly any kind: no such set, no network, a library that only preparing needs
        places = ", ".join(str(place) for place in (path, *folders) if place is not None) or "any path"
        raise ValueError(
            f"name: {name!r} is not at {places}, nor a TensorFlow data set that is prepared or can be downloaded "
            f"({str(error).strip().partition(chr(10))[0]}); wanted one of {', '.join(('digits', *FILES))}, or a path"
        ) from None
    return builder


def _stack(source: _Source, indices: np.ndarray, size: int | None) -> np.ndarray:
    """Images of the indices as one array, all of one size and with as many channels."""
    images: dict[int, np.ndarray] = {}
    first = ""
    shape: tuple[int, ...] = ()
    for index, name, image in source.read(indices):
        if size is not None and image.shape[:2] != (size, size):
            pixels = image[..., 0] if image.shape[-1] == 1 else image
            resized = np.asarray(Image.fromarray(pixels).resize((size, size), Image.Resampling.BILINEAR))
            image = resized.reshape(size, size, -1)
        first, shape = first or name, shape or image.shape[:2]
        if image.shape[:2] != shape:
            raise ValueError(
                f"size: {first} has height and width {shape} and {name} has {image.shape[:2]}, wanted one size"
            )
        images[int(index)] = image
    channels = max(image.shape[-1] for image in images.values())
    return np.stack([np.broadcast_to(images[int(index)], (*shape, channels)) for index in indices])
