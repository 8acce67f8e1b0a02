import collections
import importlib.util
import io
import json
import pickle
import shutil
import struct
import zlib
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from PIL import Image
from safetensors.numpy import save_file

from experiments import cases
from madjax.interop import guard
from madjax.interop.backdoorbench import load_backdoorbench
from madjax.interop.torch_checkpoint import load_torch_checkpoint
from madjax.interop.weights import load_weights
from madjax.models import BadNetsCNN, WideResNet
from madjax.models.convert import load_state_dict
from tests import test_payloads as payloads

needs_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")


def save(value, path, container, protocol=2):
    import torch

    torch.save(value, path, pickle_protocol=protocol, _use_new_zipfile_serialization=container == "zip")
    return path


def state_dict(container, path, prefix=""):
    """A checkpoint as torch wrote it, or without torch one made by hand; and the arrays in it."""
    weights = {"conv.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "conv.bias": np.ones(2, np.float32)}
    if importlib.util.find_spec("torch") is None:
        body = b"".join(payloads.text(prefix + name) + array(value) + b"s" for name, value in weights.items())
        return payloads.write_zip(path, b"\x80\x02}" + body + b"."), weights
    import torch

    return save({prefix + name: torch.tensor(value) for name, value in weights.items()}, path, container), weights


def array(value):
    return pickle.dumps(value, 2)[2:-1]


def assert_weights(loaded, expected):
    assert loaded.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(loaded[name], value)
        assert loaded[name].dtype == value.dtype


def test_what_is_no_checkpoint(tmp_path):
    path = tmp_path / "x.pt"
    with pytest.raises(ValueError, match=r"path: .* is no file"):
        load_torch_checkpoint(path)
    for content in (b"", b"hello", pickle.dumps({"a": 1}), b"PK\3\4"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="path: "):
            load_torch_checkpoint(path)


@needs_torch
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("container", ["zip", "legacy"])
def test_everything_comes_back_as_torch_wrote_it(tmp_path, container, protocol):
    import torch

    base = torch.randn(4, 6)
    tensors = {
        "a": base, "t": base.t(), "part": base[1:3, ::2], "shared": base[2:], "i": torch.arange(5),
        "h": torch.ones(2).half(), "s": torch.tensor(3.5), "none": torch.zeros(0, 3),
        "bool": torch.tensor([True, False]), "u8": torch.arange(3, dtype=torch.uint8), "double": torch.ones(2).double(),
        "u16": torch.tensor([1, 65535], dtype=torch.uint16), "wide": torch.ones(1).expand(3, 4),
        "p": torch.nn.Parameter(torch.ones(3)), "marked": torch.nn.Parameter(torch.ones(3)),
    }  # fmt: skip
    tensors["marked"].mark = "x"
    arrays = {
        "f": np.asfortranarray(np.arange(6.0).reshape(2, 3)), "c": np.arange(6).reshape(3, 2),
        "text": np.array(["a", "bcd"]), "bytes": np.array([b"x", b"yz"]), "empty": np.zeros((0, 3)), "0d": np.array(3),
        "big": np.arange(3, dtype=">i4"), "complex": np.array([1j]), "bools": np.array([True]),
        "objects": np.array([[1, "x"], [None, 2.5]], object),
    }  # fmt: skip
    plain = {
        "list": [1, "x", (2.0, None)], "int": 2**70, "bytes": b"\x00\xff", "bytearray": bytearray(b"\x01"),
        "set": {1, 2}, "frozenset": frozenset("a"), "np": np.float32(2.5), "np64": np.int64(3), "text": np.str_("x"),
        "default": collections.defaultdict(dict, a=1), "ordered": collections.OrderedDict(b=2), np.int64(7): "key",
        (1, "a"): "tuple",
    }  # fmt: skip
    own = {"device": torch.device("cuda:1"), "size": torch.Size((2, 3)), "dtype": torch.bfloat16, "np": np.float32}
    saved = {
        "tensors": tensors, "arrays": arrays, "plain": plain, "own": own, "bf": base.bfloat16(),
        "f8": base.to(torch.float8_e5m2), "storage": torch.arange(3).untyped_storage(),
        "module": torch.nn.BatchNorm2d(3).state_dict(),
    }  # fmt: skip
    loaded = load_torch_checkpoint(save(saved, tmp_path / "x.pt", container, protocol))
    assert_weights(loaded["tensors"], {name: tensor.detach().numpy() for name, tensor in tensors.items()})
    assert_weights(loaded["arrays"], arrays)
    assert np.shares_memory(loaded["tensors"]["a"], loaded["tensors"]["shared"])
    assert loaded["plain"] == plain
    assert [type(loaded["plain"][name]) for name in ("np", "np64", "ordered")] == [np.float32, np.int64, dict]
    assert loaded["own"] == {"device": "cuda:1", "size": (2, 3), "dtype": "torch.bfloat16", "np": "numpy.float32"}
    assert loaded["bf"].dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(loaded["bf"].astype(np.float32), saved["bf"].float().numpy())
    np.testing.assert_array_equal(loaded["f8"].astype(np.float32), saved["f8"].float().numpy())
    assert loaded["storage"].tobytes() == np.arange(3).tobytes()
    assert list(loaded["module"]) == list(saved["module"])


def test_a_checkpoint_of_early_torch(tmp_path):
    """As Python 2 and torch 0.3 wrote it: `_rebuild_tensor`, text that is bytes, `__builtin__`."""
    number, numbers = payloads.number, payloads.numbers
    arguments = payloads.storage(4), number(1), numbers(3), numbers(1)
    body = b"}U\x01w" + payloads.call("torch._utils._rebuild_tensor", *arguments) + b"s"
    body += b"U\x01s" + payloads.call("__builtin__.set", b"](K\x01K\x02e") + b"s"
    dtype = (
        payloads.call("numpy.dtype", b"U\x02i2", b"K\x00K\x01")
        + b"(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    )
    body += b"U\x01n" + payloads.ARRAY + b"(K\x01" + numbers(1) + dtype + b"\x89U\x02\x01\xfftb" + b"s"
    (tmp_path / "x.pth.tar").write_bytes(payloads.legacy(body + b".", [np.arange(4, dtype=np.float32)]))
    loaded = load_torch_checkpoint(tmp_path / "x.pth.tar")
    np.testing.assert_array_equal(loaded["w"], [1, 2, 3])
    np.testing.assert_array_equal(loaded["n"], np.array([0x01 - 0x100], np.int16))
    assert loaded["s"] == {1, 2}


@pytest.mark.parametrize("container", ["zip", "legacy"])
@pytest.mark.parametrize("key", ["", "state_dict", "model", "net", "model_state_dict", "weights", "something"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_the_weights_are_found_in_a_torch_checkpoint(tmp_path, container, key, prefix):
    path, expected = state_dict(container, tmp_path / "x.pt", prefix)
    if key:
        inner = {prefix + name: value for name, value in expected.items()}
        body = array({"epoch": 3, "optimizer": {"state": inner}, "args": {"lr": 0.1}, key: inner})
        payloads.write_zip(path, b"\x80\x02" + body + b".")
    assert_weights(load_weights(path), expected)


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ({"epoch": 3}, "wanted one dict of arrays in the checkpoint, got none$"),
        ([1], "got none$"),
        ({"model": {"a": np.ones(1)}, "net": {"a": np.ones(1)}}, "got model, net$"),
        ({"one": {"a": np.ones(1)}, "two": {"a": np.ones(1)}}, "got one, two$"),
        ({1: {"a": np.ones(1)}, "b": {"a": np.ones(1)}}, "got 1, b$"),
        ({"a\nb\x1b[31m": {"a": np.ones(1)}, "b" * 4000: {"a": np.ones(1)}}, r"got a\\nb\\x1b\[31m, b+\.\.\.$"),
        ({"module.a": np.ones(1), "a": np.ones(1)}, "differ only in a leading 'module.'"),
    ],
)
def test_no_single_dict_of_weights(tmp_path, value, problem):
    path = payloads.write_zip(tmp_path / "x.pt", pickle.dumps(value, 2))
    with pytest.raises(ValueError, match=f"^path: .*{problem}"):
        load_weights(path)


def test_safetensors_come_back(tmp_path):
    weights = {"a.b": np.arange(6, dtype=np.float32).reshape(2, 3), "h": np.ones(2, np.float16), "i": np.arange(3)}
    save_file(weights, tmp_path / "x.safetensors")
    assert_weights(load_weights(tmp_path / "x.safetensors"), weights)
    whole = (tmp_path / "x.safetensors").read_bytes()
    for damaged in (b"", whole[:40], whole[:-1], b"\xff" * 8 + whole[8:]):
        (tmp_path / "x.safetensors").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"path: .* cannot be read as safetensors"):
            load_weights(tmp_path / "x.safetensors")
    for dtype, size in {"F8_E4M3": 1, "F8_E8M0": 1, "F4": 2}.items():
        head = json.dumps({"a": {"dtype": dtype, "shape": [4 * size], "data_offsets": [0, 4]}}).encode()
        (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(head)) + head + bytes(4))
        with pytest.raises(ValueError, match=r"path: .* cannot be read as safetensors .*float"):
            load_weights(tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"path: .* is not there"):
        load_weights(tmp_path / "y.safetensors")


@pytest.mark.parametrize("pure", [True, False])
def test_the_state_of_an_nnx_model_comes_back(tmp_path, pure):
    model = nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
    state = nnx.to_pure_dict(nnx.state(model)) if pure else nnx.state(model)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "x", state)
    expected = {".".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(nnx.state(model))}
    assert "layers.0.kernel" in expected
    assert_weights(load_weights(tmp_path / "x"), expected)
    (tmp_path / "x" / "_METADATA").write_text("{")
    with pytest.raises(ValueError, match=r"path: .* is no whole orbax checkpoint"):
        load_weights(tmp_path / "x")


@needs_torch
@pytest.mark.parametrize(
    "name",
    [
        "abl_wrn16_1_grid_target0.tar", "badnets_cnn_cifar10_white5_target1.pth",
        "badnets_cnn_mnist_white5_target1.pth", "clean_resnet20_cifar10.th", "clean_resnet56_cifar10.th",
    ],
)  # fmt: skip
def test_published_checkpoints_equal_torchs(shared_data, name):
    import torch

    expected = torch.load(shared_data / "checkpoints" / name, map_location="cpu", weights_only=False)
    expected = {k.removeprefix("module."): v.numpy() for k, v in expected.get("state_dict", expected).items()}
    assert_weights(load_weights(shared_data / "checkpoints" / name), expected)


IMAGES = {(0, 3): 1, (2, 0): 2, (2, 11): 3}  # (original label, index) and grey value; label 1 is the target


def attack_result(folder, *, shape=(6, 5, 3), **changes):
    """A download as BackdoorBench lays it out, with paths in it that lead elsewhere."""
    for (label, index), value in IMAGES.items():
        (folder / "bd_test_dataset" / str(label)).mkdir(parents=True, exist_ok=True)
        image = np.full(shape if shape[2] > 1 else shape[:2], value, np.uint8)
        Image.fromarray(image).save(folder / "bd_test_dataset" / str(label) / f"{index}.png")
    elsewhere = "/etc"
    result = {
        "model_name": "preactresnet18", "num_classes": 10, "model": {"module.conv.weight": np.ones((2, 3), np.float32)},
        "data_path": elsewhere, "img_size": list(shape), "clean_data": "cifar10", "bd_train": None,
        "bd_test": {
            "bd_data_container": {
                "save_folder_path": elsewhere, "save_file_format": ".png",
                "data_dict": {np.int64(3): {"path": f"{elsewhere}/passwd", "other_info": [1, 0]}},
            },
            "getitem_all": True, "getitem_all_switch": False, "original_index_array": np.arange(12),
            "poison_indicator": np.ones(12), "save_folder_path": elsewhere,
        },
        **changes,
    }  # fmt: skip
    result = {name: value for name, value in result.items() if value != "gone"}
    payloads.write_zip(folder / "attack_result.pt", pickle.dumps(result, 2))
    return folder


@pytest.mark.parametrize("shape", [(6, 5, 3), (6, 5, 1)])
@pytest.mark.parametrize("whole", [True, False])
def test_an_attack_result_of_backdoorbench(tmp_path, shape, whole):
    folder = attack_result(tmp_path, shape=shape)
    result = load_backdoorbench(folder if whole else folder / "attack_result.pt")
    assert result[:4] == ("preactresnet18", 10, shape, "cifar10")
    assert_weights(result.weights, {"conv.weight": np.ones((2, 3), np.float32)})
    np.testing.assert_array_equal(result.indices, [0, 3, 11])
    np.testing.assert_array_equal(result.original_labels, [2, 0, 2])
    assert result.images.shape == (3, *shape)
    np.testing.assert_array_equal(result.images[:, 0, 0, 0], [2, 1, 3])
    assert (result.images.dtype, result.indices.dtype, result.original_labels.dtype) == (np.uint8, np.int32, np.int32)


@needs_torch
def test_an_attack_result_that_torch_wrote(tmp_path):
    import torch

    folder = attack_result(tmp_path)
    loaded = torch.load(save({"x": 1}, tmp_path / "y.pt", "zip"))
    assert loaded == {"x": 1}
    model = torch.nn.DataParallel(torch.nn.BatchNorm1d(3)).state_dict()
    result = {"model_name": "vgg19", "num_classes": 10, "model": model, "clean_data": "gtsrb", "bd_test": np.arange(3)}
    save(result, folder / "attack_result.pt", "zip")
    result = load_backdoorbench(folder)
    assert (result.model_name, result.image_size, result.dataset) == ("vgg19", None, "gtsrb")
    assert_weights(result.weights, {name.removeprefix("module."): value.numpy() for name, value in model.items()})


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"model_name": "gone"}, "attack_result.pt is no attack result .'model_name' is missing"),
        ({"model": "gone"}, "attack_result.pt is no attack result .'model' is missing"),
        ({"num_classes": 2**31}, "malformed model_name, num_classes or clean_data"),
        ({"num_classes": -1}, "malformed model_name, num_classes or clean_data"),
        ({"clean_data": 3}, "malformed model_name, num_classes or clean_data"),
        ({"img_size": [32, 32]}, "malformed img_size"),
        ({"img_size": "abc"}, "malformed img_size"),
        ({"num_classes": 2}, "bd_test_dataset/2 is a label beyond the 2 classes"),
        ({"model": {"a": "x"}}, "wanted one dict of arrays"),
    ],
)
def test_a_malformed_attack_result(tmp_path, changes, problem):
    with pytest.raises(ValueError, match=f"^path: .*{problem}"):
        load_backdoorbench(attack_result(tmp_path, **changes))


@pytest.mark.parametrize("value", [np.zeros(3), np.float64(2), [1], "model_name"])
def test_an_attack_result_of_another_kind(tmp_path, value):
    payloads.write_zip(attack_result(tmp_path) / "attack_result.pt", pickle.dumps(value, 2))
    with pytest.raises(ValueError, match=r"^path: attack_result.pt is no attack result \(it holds no dict\)$"):
        load_backdoorbench(tmp_path)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"clean_data": "/etc/secret.npz"}, "the data set of .* is '/etc/secret.npz', wanted one of cifar10, cifar100"),
        ({"clean_data": "huggingface:evil/ds"}, "the data set of .* is 'huggingface:evil/ds', wanted"),
        ({"clean_data": "a\nb\x1b[31m"}, r"the data set of .* is 'a\\nb\\x1b\[31m', wanted"),
        ({"model_name": "wrn60004_1"}, "the model of .* is 'wrn60004_1', wanted one of .*preact_resnet18"),
    ],
)
def test_an_attack_result_chooses_among_known_names(tmp_path, monkeypatch, changes, problem):
    monkeypatch.setattr(cases, "load_images", None)
    with pytest.raises(ValueError, match=f"^backdoorbench: {problem}"):
        cases.backdoorbench_case(attack_result(tmp_path, **changes), None, 0, None)


@pytest.mark.parametrize(("dataset", "known_as"), [("tiny", "tiny_imagenet"), ("gtsrb", "gtsrb")])
def test_backdoorbenchs_names_are_known(tmp_path, monkeypatch, dataset, known_as):
    def load_images(name, split, data_dir):
        raise InterruptedError(name)

    monkeypatch.setattr(cases, "load_images", load_images)
    with pytest.raises(InterruptedError, match=known_as):
        cases.backdoorbench_case(attack_result(tmp_path, clean_data=dataset), None, 0, None)


def png(width, height, mode="RGB"):
    file = io.BytesIO()
    Image.new(mode, (width, height)).save(file, "PNG")
    return file.getvalue()


def header(width, height):
    """A PNG that declares its size and holds nothing."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))


@pytest.mark.parametrize(
    ("file", "content", "problem"),
    [
        ("2/11.png", b"", "bd_test_dataset/2/11.png is no PNG file"),
        ("2/11.png", png(5, 6)[:60], "bd_test_dataset/2/11.png is a damaged PNG file"),
        ("2/11.png", png(5, 6).replace(b"IDAT", b"IDAX"), "bd_test_dataset/2/11.png is a damaged PNG file"),
        ("2/11.png", png(6, 5), "bd_test_dataset/2/11.png declares 6 x 5 pixels, wanted 5 x 6 as the first one"),
        ("2/11.png", png(5, 6, "L"), r"bd_test_dataset/2/11.png has shape \(6, 5, 1\), wanted \(6, 5, 3\)"),
        ("2/0.png", png(5, 6, "RGBA"), "bd_test_dataset/2/0.png is of mode RGBA, wanted grey or RGB"),
        ("2/0.png", png(5, 6, "P"), "bd_test_dataset/2/0.png is of mode P, wanted grey or RGB"),
        ("2/0.png", header(10**5, 10**5), "bd_test_dataset/2/0.png declares 100000 x 100000 pixels, wanted at most"),
        ("2/0.png", header(5, 6), "bd_test_dataset/2/0.png is a damaged PNG file"),
        ("2/a.png", png(5, 6), "bd_test_dataset/2/a.png is not named by a number"),
        ("2/-1.png", png(5, 6), "bd_test_dataset/2/-1.png is not named by a number"),
        ("2/01.png", png(5, 6), "bd_test_dataset/2/01.png is not named by a number"),
        ("2/1_0.png", png(5, 6), "bd_test_dataset/2/1_0.png is not named by a number"),
        ("2/٣.png", png(5, 6), "is not named by a number"),
        ("2/9999999999.png", png(5, 6), "bd_test_dataset/2/9999999999.png is not named by a number"),
        ("2/5.jpg", png(5, 6), "bd_test_dataset/2/5.jpg is not named by a number"),
        ("2/7", png(5, 6), "bd_test_dataset/2/7 is no PNG file"),
        ("cat/7.png", png(5, 6), "bd_test_dataset/cat is not named by a number"),
        ("10/7.png", png(5, 6), "bd_test_dataset/10 is a label beyond the 10 classes"),
        ("0/11.png", png(5, 6), "bd_test_dataset/2/11.png and bd_test_dataset/0/11.png share an index"),
        ("4", b"", "bd_test_dataset/4 is no folder with files in it"),
        ("5/7.png/x", b"", "bd_test_dataset/5/7.png is no PNG file"),
    ],
)
def test_a_malformed_image(tmp_path, file, content, problem):
    path = attack_result(tmp_path) / "bd_test_dataset" / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^path: {problem}" if problem.startswith("bd") else problem):
        load_backdoorbench(tmp_path)


def test_images_that_are_far_larger_than_their_files(tmp_path, monkeypatch):
    folder = attack_result(tmp_path)
    monkeypatch.setattr(guard, "_FLOOR", 0)
    assert len(load_backdoorbench(folder).images) == 3
    monkeypatch.setattr(guard, "_FOLD", 1)
    with pytest.raises(ValueError, match=r"^path: bd_test_dataset unfolds from 75 bytes to 90, wanted at most"):
        load_backdoorbench(folder)


def test_an_image_that_may_not_be_read(tmp_path, monkeypatch):
    folder, read_bytes = attack_result(tmp_path), Path.read_bytes

    def refuse(path):
        if path.suffix == ".png":
            raise PermissionError("no")
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(ValueError, match=r"^path: bd_test_dataset cannot be read \(no\)$"):
        load_backdoorbench(folder)


def test_missing_and_empty_folders(tmp_path):
    with pytest.raises(ValueError, match=r"path: .* is no file"):
        load_backdoorbench(tmp_path)
    folder = attack_result(tmp_path / "x")
    (folder / "bd_test_dataset" / "7").mkdir()
    with pytest.raises(ValueError, match="path: bd_test_dataset/7 is no folder with files in it"):
        load_backdoorbench(folder)
    shutil.rmtree(folder / "bd_test_dataset")
    with pytest.raises(ValueError, match="path: bd_test_dataset is no folder with files in it"):
        load_backdoorbench(folder)


@pytest.mark.parametrize(
    "place", ["bd_test_dataset/2/0.png", "bd_test_dataset/2", "bd_test_dataset", "attack_result.pt"]
)
def test_no_link_leads_out_of_the_folder(tmp_path, place):
    folder, outside = attack_result(tmp_path / "in"), attack_result(tmp_path / "out")
    assert len(load_backdoorbench(folder).images) == 3
    (folder / place).rename(tmp_path / "moved")
    (folder / place).symlink_to(outside / place)
    with pytest.raises(ValueError, match=f"path: {place} leads out of the folder"):
        load_backdoorbench(folder)


@needs_torch
def test_the_badnets_network_equals_torch():
    import torch
    from torch import nn

    torch.manual_seed(0)
    parts = [nn.Conv2d(3, 16, 5), nn.Conv2d(16, 32, 5), nn.Linear(800, 512), nn.Linear(512, 10)]
    x = torch.rand(5, 3, 32, 32)
    y = nn.functional.avg_pool2d(parts[0](x).relu(), 2)
    y = nn.functional.avg_pool2d(parts[1](y).relu(), 2).flatten(1)
    expected = parts[3](parts[2](y).relu())
    names = ("conv1", "conv2", "fc1", "fc2")
    state = {
        f"{n}.{k}": v.detach().numpy() for n, m in zip(names, parts, strict=True) for k, v in m.state_dict().items()
    }
    model = load_state_dict(BadNetsCNN((32, 32, 3), rngs=nnx.Rngs(0)), state)
    np.testing.assert_allclose(model(jnp.asarray(x.permute(0, 2, 3, 1).numpy())), expected.detach().numpy(), atol=1e-5)


def test_what_does_not_fit_is_listed():
    with pytest.raises(ValueError, match=r"conv1.weight is missing.*extra.weight has no place in the model"):
        load_state_dict(WideResNet(10, 1, rngs=nnx.Rngs(0)), {"extra.weight": np.zeros(2)})


def test_the_published_wrn_classifies(shared_data):
    """Clean accuracy and attack success of a public backdoored checkpoint, as its page states them."""
    case = cases.PUBLISHED["wrn16_1"](shared_data)
    counted = cases.count_examples(case, np.arange(0), np.arange(400))
    assert counted.accuracy == pytest.approx(0.834, abs=0.06)
    assert counted.asr > 0.99
