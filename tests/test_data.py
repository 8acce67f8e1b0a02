"""Images by name, folder, tar and array; what is refused; subsets and splits that keep groups whole; normalizations."""

import io
import os
import struct
import tarfile
import zipfile
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from madjax.data import (
    NORMALIZATIONS,
    Normalize,
    balanced_subset,
    digits,
    files,
    load_images,
    parse_normalization,
    split_by_class,
)
from madjax.data.npz import read_npz
from madjax.interop import guard


def png(seed=0, size=(4, 4), mode="RGB", kind="PNG"):
    """An encoded random image."""
    shape = (*size[::-1], 3) if mode == "RGB" else size[::-1]
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)).save(buffer, kind)
    return buffer.getvalue()


TREE = {
    f"{split}/{name}/{i}.png": png(zlib.crc32(f"{split}{name}{i}".encode()))
    for split, names in {"train": ("dog", "cat"), "val": ("cat", "eel")}.items()
    for name in names
    for i in range(3)
}


def write_folder(root, tree):
    for name, data in tree.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def member(name, kind=tarfile.REGTYPE, size=0, link=""):
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname = kind, size, link
    return info


def write_tar(path, tree, *members, mode="w"):
    with tarfile.open(path, mode) as tar:
        for name, data in tree.items():
            tar.addfile(member(name, size=len(data)), io.BytesIO(data))
        for info in members:
            tar.fileobj.write(info.tobuf())  # pyright: ignore
    return path


def refuses(message, *args, **kwargs):
    """The call fails with this message, in one line."""
    with pytest.raises(ValueError, match=message) as caught:
        load_images(*args, **kwargs)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- sources


def test_digits_have_two_fixed_halves():
    train, test = (load_images("digits", split) for split in ("train", "test"))
    images, labels = digits()
    both = np.concatenate([train.images, test.images])
    assert sorted(map(bytes, both)) == sorted(map(bytes, images))
    np.testing.assert_array_equal(np.bincount(train.labels) + np.bincount(test.labels), np.bincount(labels))
    assert abs(np.bincount(train.labels) - np.bincount(test.labels)).max() <= 1
    np.testing.assert_array_equal(train.images, load_images("digits", "training").images)
    refuses("split: got 'all', wanted one of digits: test, train", "digits", "all")


@pytest.mark.parametrize("kind", ["folder", "tar", "tar.gz", "tar.xz"])
def test_folder_and_tar_are_read_alike(tmp_path, kind):
    if kind == "folder":
        path = write_folder(tmp_path / "set", TREE)
        (path / "train" / "cat" / ".hidden").write_text("passed over")
    else:
        shuffled = {f"./{name}": TREE[name] for name in np.random.default_rng(0).permutation(list(TREE))}
        path = write_tar(tmp_path / f"set.{kind}", shuffled, mode="w:" + kind[4:])
    for split, labels in {"train": [0, 0, 0, 1, 1, 1], "test": [0, 0, 0, 2, 2, 2]}.items():
        loaded = load_images(str(path), split)
        assert loaded.class_names == ("cat", "dog", "eel")
        assert loaded.groups is None
        assert loaded.labels.dtype == np.int32
        np.testing.assert_array_equal(loaded.labels, labels)
        names = sorted(name for name in TREE if name.startswith({"test": "val"}.get(split, split)))
        expected = np.stack([np.asarray(Image.open(io.BytesIO(TREE[name]))) for name in names])
        np.testing.assert_array_equal(loaded.images, expected)


class FakeBuilder:
    """A prepared TensorFlow data set of encoded images."""

    def __init__(self, features, items, places=(None,)):
        self.features, self.items, self.places = features, items, places
        self.info, self.splits, self.file_format = self, {"train": None, "validation": None}, "tfrecord"

    def __call__(self, name, data_dir, file_format):
        self.data_dir = data_dir
        return self

    def is_prepared(self):
        return self.data_dir in self.places

    def download_and_prepare(self):
        raise ConnectionError("no network\nbut much advice")

    def as_data_source(self, split, decoders):
        if self.items is None:
            raise NotImplementedError
        assert split == "validation"
        assert isinstance(decoders["image"], tfds.decode.SkipDecoding)
        return self.items


def test_tensorflow_data_sets(monkeypatch, tmp_path):
    features = {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(names=["b", "a"])}
    items = [{"image": png(i, (4 + i, 4)), "label": i % 2} for i in range(4)]
    monkeypatch.setattr(tfds, "builder", FakeBuilder(features, items, (tmp_path / "tfds",)))
    loaded = load_images("some_set", "test", data_dir=tmp_path, size=4)
    assert loaded.images.shape == (4, 4, 4, 3)
    assert loaded.class_names == ("b", "a")
    np.testing.assert_array_equal(loaded.labels, [0, 1, 0, 1])
    np.testing.assert_array_equal(loaded.images[0], np.asarray(Image.open(io.BytesIO(items[0]["image"]))))
    refuses(
        r"size: some_set, split validation, image 0 has height and width \(4, 4\) and .* image 1 has \(4, 5\)",
        "some_set",
        "test",
        data_dir=tmp_path,
    )
    refuses("nor a TensorFlow data set .*no network\\); wanted one of digits, cifar10", "some_set", "test")
    monkeypatch.setattr(tfds, "builder", FakeBuilder({"text": None}, items))
    refuses("'some_set' has the features text, wanted image and label", "some_set", "test")
    monkeypatch.setattr(tfds, "builder", FakeBuilder(features, None))
    refuses("'some_set' is prepared as tfrecord, wanted array_record", "some_set", "test")
    monkeypatch.setattr(tfds, "builder", FakeBuilder(features, [{"image": png(), "label": -1}]))
    refuses("labels: -1..-1 in some_set, split validation, wanted 0..1", "some_set", "test")


def test_unknown_names_tell_where_they_were_looked_for(tmp_path):
    refuses(
        f"'gtsrb' is not at {tmp_path}/gtsrb32.npz, {tmp_path}/tfds, {tmp_path}, nor",
        "gtsrb",
        "test",
        data_dir=tmp_path,
    )
    refuses("'gtsrb' is not at any path", "gtsrb", "test")
    refuses("'nowhere/set.npz' is not at nowhere/set.npz", "nowhere/set.npz", "test")


# ---------------------------------------------------------------- arrays


def arrays(n=6, **changes):
    rng = np.random.default_rng(0)
    made = {"x_train": rng.integers(0, 256, (n, 4, 5)).astype(np.uint8), "y_train": np.arange(n) % 3}
    return {key: value for key, value in (made | changes).items() if value is not None}


def write_npz(path, made):
    np.savez(path, **made)
    return str(path)


def test_npz(tmp_path):
    made = arrays(track_train=np.array([0, 0, 0, 0, 1, 0]), classes=np.array(["a", "b", "c"]))
    loaded = load_images(write_npz(tmp_path / "set.npz", made), "train")
    np.testing.assert_array_equal(loaded.images, made["x_train"][..., None])
    np.testing.assert_array_equal(loaded.labels, made["y_train"])
    np.testing.assert_array_equal(loaded.groups, [0, 1, 3, 0, 2, 3])  # a track's number is told apart by class
    assert loaded.class_names == ("a", "b", "c")
    pool = {"image": made["x_train"], "label": made["y_train"], "group": np.arange(6)}
    loaded = load_images(write_npz(tmp_path / "pool.npz", pool), "all")
    np.testing.assert_array_equal(loaded.images, made["x_train"][..., None])
    np.testing.assert_array_equal(np.unique(loaded.groups), np.arange(6))
    assert load_images(write_npz(tmp_path / "mnist.npz", made), "train").images.shape == (6, 4, 5, 1)
    assert load_images("mnist", "train", data_dir=tmp_path).images.shape == (6, 4, 5, 1)
    refuses("split: got 'test', wanted one of .*pool.npz: all", str(tmp_path / "pool.npz"), "test")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x_train": np.zeros((6, 4, 4, 3), np.float32)}, "images: float32 in .*, wanted uint8 in 0..255"),
        ({"x_train": np.zeros((6, 4, 4, 2), np.uint8)}, r"images: shape \(6, 4, 4, 2\) in .*, wanted \[n, height"),
        ({"x_train": np.zeros((0, 4, 4, 3), np.uint8)}, r"images: shape \(0, 4, 4, 3\)"),
        ({"x_train": np.array([{}] * 6)}, "name: cannot read .*set.npz as npz .x_train.npy holds neither numbers nor"),
        ({"x_train": np.zeros(6, [("a", "u1")])}, "name: cannot read .*set.npz as npz .x_train.npy holds neither"),
        ({"y_train": None}, "labels: none in"),
        ({"x_train": None, "x_": np.zeros(3)}, "split: got 'train', wanted one of .*: all"),
        ({"y_train": np.arange(5)}, r"labels: int64 \(5,\) in .*, wanted int \(6,\)"),
        ({"y_train": np.arange(6.0)}, r"labels: float64 \(6,\)"),
        ({"y_train": np.arange(6) - 1}, "labels: -1..4 in .*, wanted 0.."),
        ({"y_train": np.arange(6) + 2**40}, "labels: 1099511627776..1099511627781"),
        ({"classes": np.array(["a", "b"])}, "labels: 0..2 in .*, wanted 0..1"),
        ({"classes": np.array("a")}, "labels: 0..2 in .*, wanted 0..0"),
        (
            {"classes": np.frombuffer(b"\xff" * 12, "U1")},
            "name: cannot read .*set.npz as npz .text of <U1 holds what is",
        ),
        ({"track_train": np.arange(5)}, r"groups: int64 \(5,\)"),
    ],
)
def test_wrong_arrays_are_refused(tmp_path, changes, message):
    refuses(message, write_npz(tmp_path / "set.npz", arrays(**changes)), "train")


def test_broken_npz_is_refused(tmp_path):
    (tmp_path / "text.npz").write_text("no archive")
    refuses("^name: cannot read .*text.npz as npz .File is not a zip file", str(tmp_path / "text.npz"), "train")
    good = bytearray((tmp_path / write_npz(tmp_path / "set.npz", arrays())).read_bytes())
    good[200] ^= 255
    (tmp_path / "bad.npz").write_bytes(good)
    refuses("^name: cannot read .*bad.npz as npz .*CRC", str(tmp_path / "bad.npz"), "train")


def npy(shape, data=b"", dtype="|u1"):
    """A .npy with a header of our own."""
    head = f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head + data


def write_zip(path, members, change=lambda entry: None):
    """A compressed npz, its directory changed."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
        for entry in archive.filelist:
            change(entry)
    return path


MEMBERS = {
    "more images than bytes": (npy((10**10, 32, 32, 3)), r"x.npy declares uint8 \(10000000000, 32, 32, 3\) and has 0"),
    "fewer values than bytes": (npy((2, 3), bytes(7)), r"x.npy declares uint8 \(2, 3\) and has 7 bytes"),
    "text of no length": (npy((10**9,), b"", "<U0"), "x.npy declares <U0"),
    "a negative shape": (npy((-1, -6), bytes(6)), "."),
    "a shape beyond 64 bits": (npy((0, 2**63)), "."),
    "a shape of many digits": (npy("9" * 5000), "."),
    "a nested shape": (npy("(" * 5000), "."),
    "an unknown dtype": (npy((1,), b"a", "nonsense"), "."),
    "no array": (b"text", "."),
    "nothing": (b"", "."),
}


@pytest.mark.parametrize("kind", MEMBERS)
def test_npz_members_are_refused_before_they_take_memory(tmp_path, kind):
    data, message = MEMBERS[kind]
    with pytest.raises(ValueError, match=rf"^here: cannot read .*x\.npz as npz \({message}") as caught:
        read_npz("here", write_zip(tmp_path / "x.npz", {"x.npy": data}))
    assert len(str(caught.value)) < 500
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda entry: setattr(entry, "flag_bits", 1), "encrypted"),
        (lambda entry: setattr(entry, "compress_type", 97), "compression"),
        (lambda entry: setattr(entry, "compress_type", zipfile.ZIP_LZMA), "."),
        (lambda entry: setattr(entry, "file_size", 2**29), "it unfolds from .* bytes to 536870912, wanted at most 256"),
        (lambda entry: setattr(entry, "header_offset", 2**31), "."),
    ],
)
def test_the_directory_of_an_npz(tmp_path, change, message):
    path = write_zip(tmp_path / "x.npz", {"x.npy": npy((999,), bytes(range(256)) * 3 + bytes(231))}, change)
    with pytest.raises(ValueError, match=rf"^here: cannot read .*x\.npz as npz \(.*{message}"):
        read_npz("here", path)


def test_npz_that_is_none(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros(3))
    (tmp_path / "x.npy").rename(tmp_path / "x.npz")
    path = write_zip(tmp_path / "y.npz", {"x.npy": npy((999,), bytes(999))})
    damaged = bytearray(path.read_bytes())
    damaged[35:50] = b"\xff" * 15
    (tmp_path / "y.npz").write_bytes(damaged)
    for name in ("x.npz", "y.npz", "nothing.npz", "."):
        with pytest.raises(ValueError, match=r"^here: cannot read .* as npz \(.") as caught:
            read_npz("here", tmp_path / name)
        assert "\n" not in str(caught.value)


def test_all_arrays_of_an_npz_or_some(tmp_path):
    made = {
        "a": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "b": np.array(["x", "yz"], ">U2"),
        "c": np.zeros((0, 3)),
    }
    np.savez_compressed(tmp_path / "x.npz", **made)
    loaded = read_npz("here", tmp_path / "x.npz")
    assert loaded.keys() == made.keys()
    for name, array in made.items():
        np.testing.assert_array_equal(loaded[name], array)
        assert loaded[name].dtype == array.dtype
    assert list(read_npz("here", tmp_path / "x.npz", {"b", "d"})) == ["b"]


def test_names_in_files_come_short_and_on_one_line(tmp_path):
    evil = "x\nerror: all is well\x1b[31m"
    made = {f"x_{evil}": np.zeros((2, 4, 4), np.uint8), f"x_{'y' * 999}": np.zeros((2, 4, 4), np.uint8)}
    escaped = r"x\\nerror: all is well\\x1b\[31m"
    refuses(rf"wanted one of .*: {escaped}, y+\.\.\.$", write_npz(tmp_path / "x.npz", made), "train")
    refuses(rf"labels: none in .*, split {escaped}, wanted", write_npz(tmp_path / "x.npz", made), evil)
    refuses(f"'{escaped}', wanted only", str(write_folder(tmp_path / "a", {evil: b""})), "train")
    tree = {f"train/cat/{evil}.png": b"no image"}
    refuses(rf"train/cat/{escaped}\.png cannot be read", str(write_tar(tmp_path / "b.tar", tree)), "train")
    tree = {f"train/cat/{evil}.png": png(), "train/cat/y.png": png(0, (5, 6))}
    refuses(rf"size: train/cat/{escaped}\.png has", str(write_folder(tmp_path / "c", tree)), "train")
    refuses(r"'y{197}\.\.\.', wanted only", str(write_tar(tmp_path / "d.tar", {"y" * 9999: b""})), "train")


# ---------------------------------------------------------------- what is refused in folders and tars


@pytest.mark.parametrize(
    ("info", "message"),
    [
        (member("/train/cat/evil.png"), "'/train/cat/evil.png', wanted names inside"),
        (member("train/cat/../../../evil.png"), "evil.png', wanted names inside"),
        (member("train/cat/evil.png", tarfile.SYMTYPE, link="/etc/passwd"), "evil.png', a link or a device"),
        (member("train/cat/evil.png", tarfile.LNKTYPE, link="train/cat/0.png"), "evil.png', a link or a device"),
        (member("train/cat/evil.png", tarfile.FIFOTYPE), "evil.png', a link or a device"),
        (member("train/cat/evil.png", tarfile.CHRTYPE), "evil.png', a link or a device"),
        (member("train/cat/evil.png", size=2**26 + 1), "evil.png' has 67108865 bytes, wanted at most 67108864"),
        (member("x", tarfile.XHDTYPE, size=2**30), "'x' has 1073741824 bytes, wanted at most"),
        (member("train/cat/0.png"), "'train/cat/0.png' twice, wanted it once"),
        (member("train/evil.png"), "'train/evil.png', wanted only <split>/<class>/<file>"),
        (member("train/cat/more", tarfile.DIRTYPE), "'train/cat/more', wanted only"),
        (member("train/gnu", tarfile.DIRTYPE), "the empty folder 'train/gnu'"),
        (member("other", tarfile.DIRTYPE), "the empty folder 'other'"),
    ],
)
def test_hostile_tar_members_are_refused_by_name(tmp_path, info, message):
    path = write_tar(tmp_path / "set.tar", TREE, info)
    refuses(f"^name: (?!.*cannot be read).*{message}", str(path), "train")
    assert sorted(tmp_path.rglob("*")) == [path]


def test_folders_refuse_links_that_leave(tmp_path):
    outside = write_folder(tmp_path / "outside", {"secret/0.png": png()})
    root = write_folder(tmp_path / "set", TREE)
    link = root / "train" / "cat" / "link.png"
    link.symlink_to("0.png")
    assert len(load_images(str(root), "train").images) == 7
    for target, message in {
        outside / "secret/0.png": "'train/cat/link.png', a link out of it",
        outside / "secret": "'train/cat/link.png', a link out of it",
        root / "train": "'train/cat/link.png', wanted only",
        root / "nothing": "'train/cat/link.png', a broken link or a device",
    }.items():
        link.unlink()
        link.symlink_to(target)
        refuses(message, str(root), "train")
    link.unlink()
    os.mkfifo(link)
    refuses("'train/cat/link.png', a broken link or a device", str(root), "train")


def test_large_files_and_images_are_refused(tmp_path, monkeypatch):
    root = write_folder(tmp_path, {"train/cat/0.png": png()})
    monkeypatch.setattr(files, "LIMIT", 15)
    refuses("'train/cat/0.png' has .* bytes, wanted at most 15", str(root), "train")
    with pytest.raises(ValueError, match="image: it cannot be read: 4×4 pixels, wanted at most 15 in all"):
        files.decode_image(png(), "it")


def test_images_that_are_far_larger_than_their_files(tmp_path, monkeypatch):
    monkeypatch.setattr(guard, "_FLOOR", 0)
    tree = {f"train/cat/{i}.png": blank_png((128, 128)) for i in range(3)}
    held = sum(map(len, tree.values()))
    folder, tar = write_folder(tmp_path / "set", tree), write_tar(tmp_path / "set.tar", tree)
    packed = write_tar(tmp_path / "set.tar.xz", {f"train/cat/{i}.bmp": bytes(2**16) for i in range(3)}, mode="w:xz")
    assert len(load_images(str(folder), "train").images) == 3
    refuses("^name: .*set.tar.xz unfolds from .* bytes to", str(packed), "train")
    monkeypatch.setattr(guard, "_FOLD", 2)
    refuses(f"^name: .*set unfolds from {held // 3} bytes to 16384", str(folder), "train")
    refuses("^name: .*set.tar unfolds from .* bytes to 32768", str(tar), "train")


def blank_png(size):
    buffer = io.BytesIO()
    Image.new("L", size).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("sparse", [{"GNU.sparse.map": "1,a"}, {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}])
def test_a_tar_with_a_malformed_map(tmp_path, sparse):
    info = member("train/cat/0.png", size=4)
    info.pax_headers = sparse
    with tarfile.open(tmp_path / "set.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(info, io.BytesIO(b"text"))
    refuses("^name: .*set.tar cannot be read as a tar: .", str(tmp_path / "set.tar"), "train")


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (
            {"train/cat/1.png": png(0, (5, 6))},
            r"train/cat/0.png has height and width \(4, 4\) and .*1.png has \(6, 5\)",
        ),
        ({"train/cat/1.png": b"no image"}, "train/cat/1.png cannot be read: cannot identify"),
        ({"train/cat/1.png": png()[:60]}, "train/cat/1.png cannot be read: "),
        ({"train/cat/1.jpg": png(0, (64, 64), kind="JPEG")[:900]}, "train/cat/1.jpg cannot be read: .*truncated"),
        (
            {"train/cat/1.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\n"},
            "train/cat/1.eps cannot be read: cannot identify",
        ),
        ({"README": b"text"}, "'README', wanted only <split>/<class>/<file>"),
    ],
)
def test_files_that_are_no_equal_images_are_refused(tmp_path, tree, message):
    tree = {"train/cat/0.png": png()} | tree
    refuses(message, str(write_folder(tmp_path / "set", tree)), "train")
    refuses(message, str(write_tar(tmp_path / "set.tar", tree)), "train")


def test_empty_sources_and_missing_splits_are_refused(tmp_path):
    (tmp_path / "set").mkdir()
    refuses("set holds no files", str(tmp_path / "set"), "train")
    refuses("set.tar holds no files", str(write_tar(tmp_path / "set.tar", {})), "train")
    write_folder(tmp_path / "set", TREE)
    refuses("split: got 'extra', wanted one of .*set: train, val", str(tmp_path / "set"), "extra")
    (tmp_path / "set" / "train" / "gnu").mkdir()
    refuses("the empty folder 'train/gnu'", str(tmp_path / "set"), "train")
    (tmp_path / "text.tar").write_text("no tar")
    refuses("text.tar cannot be read as a tar", str(tmp_path / "text.tar"), "train")
    cut = write_tar(tmp_path / "cut.tar.xz", TREE, mode="w:xz").read_bytes()[:-200]
    (tmp_path / "cut.tar.xz").write_bytes(cut)
    refuses("cut.tar.xz cannot be read as a tar", str(tmp_path / "cut.tar.xz"), "train")


def test_images_are_resized_and_grey_ones_turn_to_colour_beside_others(tmp_path):
    tree = {"train/a/0.png": png(0, (8, 8), "L"), "train/a/1.png": png(1), "train/a/2.png": png(2, (3, 9))}
    loaded = load_images(str(write_folder(tmp_path, tree)), "train", size=4).images
    assert loaded.shape == (3, 4, 4, 3)
    grey = Image.open(io.BytesIO(tree["train/a/0.png"])).resize((4, 4), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(loaded[0], np.repeat(np.asarray(grey)[..., None], 3, 2))
    np.testing.assert_array_equal(loaded[1], np.asarray(Image.open(io.BytesIO(tree["train/a/1.png"]))))
    assert load_images("digits", "test", size=10, max_examples=3).images.shape == (3, 10, 10, 1)
    refuses("size: got 0, wanted a positive number", "digits", "test", size=0)


# ---------------------------------------------------------------- subsets and splits


def tracks(rng, classes=5):
    """Labels and groups of 4 to 12 tracks a class with 5 to 30 examples each, in random order."""
    sizes = rng.integers(5, 31, (classes, 12)) * (np.arange(12) < rng.integers(4, 13, (classes, 1)))
    groups = rng.permutation(np.repeat(np.arange(sizes.size), sizes.ravel()))
    return groups // 12, groups


def test_subsets_are_balanced_and_always_the_same(tmp_path):
    one, two = (load_images("digits", "train", max_examples=203) for _ in range(2))
    assert sorted(np.bincount(one.labels)) == [20] * 7 + [21] * 3
    np.testing.assert_array_equal(one.images, two.images)
    labels = np.repeat([0, 1, 2], [2, 50, 50])  # what a small class lacks, the others give
    part = balanced_subset(np.random.default_rng(0), labels, 22)
    np.testing.assert_array_equal(np.bincount(labels[part]), [2, 10, 10])
    assert len(load_images("digits", "train", max_examples=10**6).images) == 898
    refuses("max_examples: got 0, wanted a positive number", "digits", "test", max_examples=0)
    path = write_npz(tmp_path / "set.npz", arrays(track_train=np.zeros(6, int)))
    refuses("max_examples: got 1, wanted at least 2, the smallest group", path, "train", max_examples=1)


def test_subsets_take_groups_whole():
    for seed in range(20):
        rng = np.random.default_rng(seed)
        labels, groups = tracks(rng)
        part = balanced_subset(rng, labels, 150, groups)
        assert 150 - 5 < len(part) <= 150 or len(part) == len(labels)
        for group in np.unique(groups[part]):
            assert (groups[part] == group).sum() == (groups == group).sum()
        assert np.ptp(np.bincount(labels[part])) <= 60


def test_split_without_groups_is_as_it_was():
    rng, labels = np.random.default_rng(3), np.random.default_rng(0).integers(0, 7, 500)
    parts = split_by_class(np.random.default_rng(3), labels, (0.3, 0.5))
    expected = [[], []]
    for label in range(7):
        members = rng.permutation(np.flatnonzero(labels == label))
        stops = np.rint(np.cumsum([0.0, 0.3, 0.5]) * len(members)).astype(int)
        expected[0].append(members[: stops[1]])
        expected[1].append(members[stops[1] : stops[2]])
    for part, pieces in zip(parts, expected, strict=True):
        np.testing.assert_array_equal(part, rng.permutation(np.concatenate(pieces)))
    # groups of one example are no groups, but for ties
    alone = split_by_class(np.random.default_rng(3), labels, (0.3, 0.5), np.arange(500))
    np.testing.assert_allclose([len(part) for part in alone], [len(part) for part in parts], atol=7)


def test_split_never_separates_a_group():
    shares = (0.4, 0.05, 0.3)
    for seed in range(50):
        rng = np.random.default_rng(seed)
        labels, groups = tracks(rng)
        parts = split_by_class(rng, labels, shares, groups)
        owners = [set(groups[part]) for part in parts]
        assert sum(map(len, owners)) == len(set().union(*owners))
        for part, owner, share in zip(parts, owners, shares, strict=True):
            assert len(np.unique(part)) == len(part) == np.isin(groups, list(owner)).sum()
            # an edge is at most half a group off, and a part has two
            wanted = share * np.bincount(labels)
            assert (abs(np.bincount(labels[part], minlength=5) - wanted) <= 31).all()


def test_ties_between_groups_favour_no_part():
    labels, groups = np.repeat(np.arange(200), 9), np.arange(1800) // 3  # three groups a class: halves need a coin
    first, second = split_by_class(np.random.default_rng(0), labels, (0.5, 0.5), groups)
    assert len(first) + len(second) == 1800
    assert abs(len(first) - 900) < 150


def test_groups_of_several_classes_are_refused():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="groups: group 7 holds several classes, wanted one class a group"):
        split_by_class(rng, np.array([0, 1, 1]), (0.5,), np.array([7, 7, 8]))
    with pytest.raises(ValueError, match=r"groups: got shape \(2,\), wanted that of the labels, \(3,\)"):
        balanced_subset(rng, np.array([0, 1, 1]), 2, np.array([7, 7]))


# ---------------------------------------------------------------- normalization


@pytest.mark.parametrize("name", NORMALIZATIONS)
def test_normalizations_run_compiled(name):
    normalize = parse_normalization(name)
    images = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3)).astype(np.uint8)
    made = jax.jit(normalize)(images)
    assert made.dtype == jnp.float32
    expected = (images / 255 - np.array(normalize.mean)) / np.array(normalize.std)
    np.testing.assert_allclose(made, expected, atol=1e-5)
    np.testing.assert_allclose(normalize(images[0]), expected[0], atol=1e-5)
    assert hash(normalize) == hash(parse_normalization(name))


def test_normalizations_of_ones_own():
    assert parse_normalization("0.1,0.2,0.3/1,2,3") == Normalize((0.1, 0.2, 0.3), (1.0, 2.0, 3.0))
    assert parse_normalization("0.5/1,2,3")(np.zeros((1, 2, 2, 3), np.uint8)).shape == (1, 2, 2, 3)
    assert parse_normalization("0.5/0.5")(np.zeros((1, 2, 2, 1), np.uint8)).shape == (1, 2, 2, 1)
    with pytest.raises(ValueError, match=r"images: got shape \(1, 2, 2, 1\), wanted 3 channels last"):
        parse_normalization("cifar10")(np.zeros((1, 2, 2, 1), np.uint8))
    assert parse_normalization("0.5/0.5")(np.full((1, 2, 2, 1), 255, np.float32)).max() == 1
    with pytest.raises(ValueError, match="images: got float16, wanted uint8, or float32"):
        parse_normalization("none")(np.zeros((1, 2, 2, 1), np.float16))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cifar", "normalization: got 'cifar', wanted one of none, symmetric"),
        ("1,2,3", "normalization: got '1,2,3'"),
        ("1/2/3", "normalization: got"),
        ("0,a/1", "normalization: got"),
        ("/", "normalization: got"),
        ("0/0", "std: got .* wanted finite positive"),
        ("nan/1", "mean: got .* wanted finite"),
        ("0,0,0/1,1", "std: got 2 numbers, wanted 1 or 3"),
    ],
)
def test_wrong_normalizations_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_normalization(text)


# ---------------------------------------------------------------- the real sets


def test_cifar10(shared_data):
    loaded = load_images("cifar10", "test", data_dir=shared_data)
    assert loaded.images.shape == (10_000, 32, 32, 3)
    assert loaded.class_names is not None
    assert loaded.class_names[:2] == ("airplane", "automobile")
    assert (np.bincount(loaded.labels) == 1000).all()
    mean, std = NORMALIZATIONS["cifar10"]  # of the training split
    np.testing.assert_allclose((loaded.images / 255).mean((0, 1, 2)), mean, atol=0.005)
    np.testing.assert_allclose((loaded.images / 255).std((0, 1, 2)), std, atol=0.005)
    one = next(iter(tfds.data_source("cifar10", data_dir=str(shared_data / "tfds"), split="test")))
    np.testing.assert_array_equal(loaded.images[0], one["image"])
    assert loaded.labels[0] == one["label"]


def test_mnist(shared_data):
    assert load_images("mnist", "train", data_dir=shared_data).images.shape == (60_000, 28, 28, 1)
    assert load_images("mnist", "test", data_dir=shared_data, size=32, max_examples=50).images.shape == (50, 32, 32, 1)


def test_gtsrb(shared_data):
    train, test = (load_images("gtsrb", split, data_dir=shared_data) for split in ("train", "test"))
    assert train.images.shape == (11_339, 32, 32, 3)
    assert test.images.shape == (5_000, 32, 32, 3)
    assert set(train.labels) == set(test.labels) == set(range(43))
    assert test.groups is None
    assert train.groups is not None
    assert len(np.unique(train.groups)) == 378
    assert np.bincount(train.groups).max() == 30
    parts = split_by_class(np.random.default_rng(0), train.labels, (0.5, 0.2, 0.3), train.groups)
    owners = [set(train.groups[part]) for part in parts]
    assert sum(map(len, owners)) == 378
    assert not owners[0] & owners[1] | owners[0] & owners[2] | owners[1] & owners[2]
    np.testing.assert_allclose([len(part) / 11_339 for part in parts], (0.5, 0.2, 0.3), atol=0.03)
    few = load_images("gtsrb", "train", data_dir=shared_data, max_examples=43 * 60)
    assert (np.bincount(few.labels) >= 30).all()
    assert (np.bincount(few.labels) <= 90).all()


def test_tiny_imagenet(shared_data):
    loaded = load_images("tiny_imagenet", "test", data_dir=shared_data, max_examples=2000)
    assert loaded.images.shape == (2000, 32, 32, 3)
    assert (np.bincount(loaded.labels) == 10).all()
    assert loaded.class_names is not None
    assert len(loaded.class_names) == 200
    mean, std = NORMALIZATIONS["tiny_imagenet"]
    np.testing.assert_allclose((loaded.images / 255).mean((0, 1, 2)), mean, atol=0.02)
    np.testing.assert_allclose((loaded.images / 255).std((0, 1, 2)), std, atol=0.05)
