import importlib.util
import os
import pickle
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from madjax.interop.torch_checkpoint import load_torch_checkpoint
from madjax.models import BadNetsCNN, WideResNet
from madjax.models.convert import load_state_dict

needs_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")


class Runs:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("container", ["zip", "legacy"])
def test_a_pickle_that_runs_something_is_refused_and_runs_nothing(tmp_path, container):
    path, trace = tmp_path / "evil.pt", tmp_path / "ran"
    payload = pickle.dumps({"state_dict": Runs(trace)}, protocol=2)
    if container == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", payload)
    else:
        path.write_bytes(payload)
    with pytest.raises(
        ValueError, match=r"path: the checkpoint names posix\.system, which is refused; nothing was run"
    ):
        load_torch_checkpoint(path)
    assert not trace.exists()


def test_what_is_no_checkpoint(tmp_path):
    path = tmp_path / "x.pt"
    for content in (b"", b"hello", pickle.dumps({"a": 1})):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="path: "):
            load_torch_checkpoint(path)


@needs_torch
@pytest.mark.parametrize("new_format", [True, False])
def test_tensors_come_back_as_torch_wrote_them(tmp_path, new_format):
    import torch

    base = torch.randn(4, 6)
    saved = {
        "a": base, "t": base.t(), "part": base[1:3, ::2], "i": torch.arange(5), "h": torch.ones(2).half(),
        "s": torch.tensor(3.5), "list": [1, "x", (2.0, None)], "p": torch.nn.Parameter(torch.ones(3)),
    }  # fmt: skip
    torch.save(saved, tmp_path / "x.pt", _use_new_zipfile_serialization=new_format)
    loaded = load_torch_checkpoint(tmp_path / "x.pt")
    for name in ("a", "t", "part", "i", "h", "s", "p"):
        np.testing.assert_array_equal(loaded[name], saved[name].detach().numpy())
    assert loaded["list"] == saved["list"]
    whole = (tmp_path / "x.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) * 2 // 3])
    with pytest.raises(ValueError, match="path: "):
        load_torch_checkpoint(tmp_path / "cut.pt")


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
    from experiments import cases

    case = cases.load("wrn16_1", shared_data)
    images, labels = case.images[:400], case.labels[:400]
    predict = case.predict
    assert np.mean(predict(images) == labels) == pytest.approx(0.834, abs=0.06)
    others = labels != case.target
    assert np.mean(predict(case.attack.trigger(images[others])) == case.target) > 0.99
