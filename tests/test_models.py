import importlib.util
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from madjax import from_nnx
from madjax.interop.torch_checkpoint import load_torch_checkpoint
from madjax.interop.weights import load_weights
from madjax.models import MODELS, VGG19BN, build_model, from_torch, load_state_dict, to_arrays
from madjax.models.convolution import convolve
from madjax.models.layers import avg_pool, max_pool, relu

if importlib.util.find_spec("torch") is not None:
    import torch
    from torch import nn

    from experiments import torch_networks

NUMBERS = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}

needs_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")


def torch_vgg(channels, hidden):
    layers, c_in = [], channels
    for c_out in [64, 64, 0, 128, 128, 0, *[256] * 4, 0, *[512] * 4, 0, *[512] * 4, 0]:
        if c_out:
            layers += [nn.Conv2d(c_in, c_out, 3, 1, 1), nn.BatchNorm2d(c_out), nn.ReLU()]
            c_in = c_out
        else:
            layers.append(nn.MaxPool2d(2))
    net = nn.Sequential()
    net.features = nn.Sequential(*layers)
    if hidden:
        net.avgpool, net.flatten = nn.AdaptiveAvgPool2d(7), nn.Flatten()
        parts = [nn.Linear(25088, hidden), nn.ReLU(), nn.Dropout(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Dropout()]
        net.classifier = nn.Sequential(*parts, nn.Linear(hidden, 10))
    else:
        net.flatten, net.classifier = nn.Flatten(), nn.Linear(512, 10)
    return net


# name, torch's module, (size, channels)
PARITY = {
    "digits_cnn": (lambda: torch_networks.digits(1, 8), (8, 1)),
    "digits_cnn/odd": (lambda: torch_networks.digits(3, 29), (29, 3)),
    "badnets_cnn": (lambda: torch_networks.badnets(1, 28), (28, 1)),
    "badnets_cnn/64": (lambda: torch_networks.badnets(3, 64), (64, 3)),
    "resnet20": (lambda: torch_networks.Residual("resnet", (16, 32, 64), 3, 3), (32, 3)),
    "resnet56": (lambda: torch_networks.Residual("resnet", (16, 32, 64), 9, 1), (8, 1)),
    "wrn16_1": (lambda: torch_networks.Residual("wrn", (16, 32, 64), 2, 3), (32, 3)),
    "wrn10_4": (lambda: torch_networks.Residual("wrn", (64, 128, 256), 1, 1), (28, 1)),
    "preact_resnet18": (lambda: torch_networks.Residual("preact", (64, 128, 256, 512), 2, 3), (32, 3)),
    "vgg19_bn_linear": (lambda: torch_vgg(3, None), (32, 3)),
}


def torch_case(make, size, channels, num_images=4):
    """A module whose batch norms are of no special value, in eval mode; images NHWC, and its weights."""
    torch.manual_seed(0)
    net = make().eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
            nn.init.normal_(module.running_mean, 0, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
        elif isinstance(module, (nn.Conv2d, nn.Linear)):  # torch's own rule lets the signal fade with depth
            nn.init.kaiming_normal_(module.weight)
    weights = {name: tensor.numpy().copy() for name, tensor in net.state_dict().items()}
    return net, torch.rand(num_images, channels, size, size), weights


def nhwc(x):
    return jnp.asarray(x.permute(0, 2, 3, 1).numpy())


def torch_logits(net, x):
    with torch.no_grad():
        return net(x).numpy()


def calls(model, image):
    graphdef, state = nnx.split(model)
    return jax.jit(lambda state, image: nnx.merge(graphdef, state)(image))(state, image)


@needs_torch
@pytest.mark.parametrize("case", PARITY)
def test_logits_equal_torchs(case):
    make, (size, channels) = PARITY[case]
    net, x, weights = torch_case(make, size, channels)
    name, shape = case.split("/")[0], (size, size, channels)
    model = from_torch(name, {f"module.{k}": v for k, v in weights.items()}, shape)
    expected = torch_logits(net, x)
    logits = calls(model, nhwc(x))
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, expected, atol=1e-5 * max(10, np.abs(expected).max()))

    half = from_torch(name, weights, shape, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(half))} == {jnp.dtype("float32")}
    rough = calls(half, nhwc(x))
    assert rough.dtype == jnp.float32
    assert 0 < np.abs(rough - expected).max() < 0.05 * np.abs(expected).max()


@needs_torch
@pytest.mark.parametrize("size", [32, 64, 70])
def test_the_classifier_of_torchvisions_vgg(size):
    """With a narrower hidden layer: 64×64 ends in 2×2, which 7×7 overlapping bins share."""
    net, x, weights = torch_case(lambda: torch_vgg(1, 48), size, 1, 2)
    model = nnx.eval_shape(lambda: VGG19BN((size, size, 1), hidden=48, rngs=nnx.Rngs(0)))
    model = load_state_dict(model, weights)
    model.eval()
    np.testing.assert_allclose(calls(model, nhwc(x)), torch_logits(net, x), atol=1e-4)


@needs_torch
@pytest.mark.parametrize("name", ["resnet20", "preact_resnet18", "wrn16_1"])
def test_running_statistics_follow_torchs(name):
    make, (size, channels) = PARITY[name]
    net, x, weights = torch_case(make, size, channels, 8)
    model = from_torch(name, weights, (size, size, channels))
    model.train()
    net.train()
    logits = model(nhwc(x))
    np.testing.assert_allclose(logits, torch_logits(net, x), atol=1e-3)
    updated = {k: v.numpy() for k, v in net.state_dict().items()}
    expected = from_torch(name, updated, (size, size, channels))
    before = from_torch(name, weights, (size, size, channels))
    stats, old, new = (nnx.to_flat_state(nnx.state(m, nnx.BatchStat)) for m in (model, before, expected))
    for (path, got), (_, old_value), (_, want) in zip(stats, old, new, strict=True):
        got, old_value, want = (np.asarray(v[...]) for v in (got, old_value, want))
        if path[-1] == "mean":
            np.testing.assert_allclose(got, want, atol=1e-4)
        else:
            # torch's running variance takes n / (n - 1) of the batch's own; n is least in the last stage
            n = 8 * (size // (8 if name == "preact_resnet18" else 4)) ** 2
            bound = (got - 0.9 * old_value) / (n - 1)
            assert np.all((want - got > -1e-4 * want) & (want - got < bound + 1e-4 * want))


@pytest.mark.parametrize("name", [*sorted(set(MODELS) - {"resnet44", "resnet56", "resnet110"}), "wrn10_2"])
def test_every_name_gives_logits(name):
    smallest = 32 if name.startswith("vgg") else 16 if name == "badnets_cnn" else 1
    for size, channels in ((8, 1), (28, 1), (32, 3), (64, 3)):

        def logits(shape=(size, size, channels)):
            model = build_model(name, 7, shape, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
            model.eval()
            return model(jnp.zeros((2, *shape)))

        if size < smallest:
            with pytest.raises(ValueError, match=rf"image_shape: .* at least {smallest}x{smallest}, got \({size}"):
                logits()
        else:
            out = nnx.eval_shape(logits)
            assert (out.shape, out.dtype) == ((2, 7), jnp.float32)


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("resnet20", 0.27), ("resnet32", 0.46), ("resnet44", 0.66), ("resnet56", 0.85), ("resnet110", 1.73),
        ("preact_resnet18", 11.17), ("wrn16_1", 0.18), ("wrn28_10", 36.48), ("vgg19_bn", 139.62),
        ("vgg19_bn_linear", 20.04),
    ],
)  # fmt: skip
def test_number_of_parameters(name, millions):
    """As the papers and the sources state them for 10 classes."""
    model = nnx.eval_shape(lambda: build_model(name, 10, (32, 32, 3), rngs=nnx.Rngs(0)))
    count = sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    assert count / 1e6 == pytest.approx(millions, abs=0.006)


def test_what_build_model_refuses():
    for name, shape, num_classes, message in [
        ("resnet18", (32, 32, 3), 10, r"name: no model 'resnet18'; known are badnets_cnn, .* of two digits each"),
        ("wrn60004_1", (32, 32, 3), 10, "name: no model 'wrn60004_1'; .*"),
        ("wrn16_100", (32, 32, 3), 10, "name: no model 'wrn16_100'; .*"),
        ("wrn" + "9" * 5000 + "_1\n", (32, 32, 3), 10, r"name: no model 'wrn9{194}\.\.\.'; .*"),
        ("wrn17_1", (32, 32, 3), 10, r"depth: wanted 6n \+ 4 with n >= 1, got 17"),
        ("wrn16_0", (32, 32, 3), 10, "width: wanted at least 1, got 0"),
        ("resnet20", (32, 32), 10, r"image_shape: wanted \(height, width, channels\), got \(32, 32\)"),
        ("resnet20", (32, 32, 3), 0, "num_classes: wanted at least 1, got 0"),
    ]:
        with pytest.raises(ValueError, match=f"^{message}$"):
            build_model(name, num_classes, shape, rngs=nnx.Rngs(0))


def as_torch(model):
    """The weights of a model under torch's names, where its own are torch's."""
    leaves = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
    weights = {}
    for (*module, leaf), variable in nnx.to_flat_state(nnx.state(model)):
        array = np.asarray(variable[...])
        if leaf == "kernel":
            array = array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T
        weights[".".join(map(str, (*module, leaves[leaf])))] = array
    return weights


def test_a_loaded_and_a_new_model_are_of_one_architecture():
    """So that a compiled sweep serves both."""
    shape = (8, 8, 1)
    new = build_model("digits_cnn", 7, shape, rngs=nnx.Rngs(1))
    new.eval()
    # the classes are the head's; the order of the names does not matter
    weights = dict(sorted(as_torch(new).items()))
    loaded, half = (from_torch("digits_cnn", weights, shape, dtype=dtype) for dtype in (None, jnp.bfloat16))
    assert from_nnx(loaded)[0] == from_nnx(new)[0] != from_nnx(half)[0]
    jax.tree.map(np.testing.assert_array_equal, nnx.state(loaded), nnx.state(new))


def test_what_from_torch_refuses():
    def zeros(name):
        model = nnx.eval_shape(lambda: build_model(name, 10, (32, 32, 3), rngs=nnx.Rngs(0)))
        return as_torch(jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), model))

    weights = zeros("resnet20")

    def refused(name="resnet20", weights=weights, shape=(32, 32, 3), **kwargs):
        with pytest.raises(ValueError, match=r"^weights: ") as error:
            from_torch(name, weights, shape, **kwargs)
        assert "\n" not in str(error.value)
        return str(error.value)

    # grey images for a colour model, and another number of classes
    wanted = "weights: do not fit ResNet: conv1.weight has shape (16, 3, 3, 3), wanted (16, 1, 3, 3)"
    assert refused(shape=(32, 32, 1)) == wanted
    assert refused(num_classes=43) == (
        "weights: do not fit ResNet: linear.bias has shape (10,), wanted (43,); "
        "linear.weight has shape (10, 64), wanted (43, 64)"
    )
    # another architecture: deeper, and of another kind
    message = refused("resnet32")
    assert message.startswith("weights: do not fit ResNet: layer1.3.bn1.bias is missing; ")
    assert message.count("missing") == 60
    message = refused("preact_resnet18")
    for part in (
        "layer1.0.bn1.bias has shape (16,), wanted (64,)",
        "layer1.2.bn1.bias has no place",
        "layer2.0.shortcut",
    ):
        assert part in message
    # what the naming that fits best lacks
    wrn = zeros("wrn16_1")
    lacking = {k: v for k, v in wrn.items() if k != "block2.0.shortcut.weight"}
    assert refused("wrn16_1", lacking) == "weights: do not fit WideResNet: block2.0.shortcut.weight is missing"
    # names of the file come short and on one line
    message = refused(weights={"a\nerror: all is well\x1b[31m": np.ones(3), "b" * 10**5: np.ones(2)} | weights)
    assert message == (
        "weights: do not fit ResNet: a\\nerror: all is well\\x1b[31m has no place in the model; "
        f"{'b' * 197}... has no place in the model"
    )
    assert r"got none at a\nb, " in refused(weights={"a\nb": "x", "b" * 10**5: None})
    # a whole checkpoint instead of its state dict; nothing
    assert refused(weights={"epoch": 3, "state_dict": weights}) == (
        "weights: wanted a flat dict of arrays, got none at state_dict"
    )
    assert "conv1.weight is missing" in refused(weights={})


@pytest.fixture(scope="module")
def cifar10(shared_data):
    import tensorflow_datasets as tfds

    source = tfds.data_source("cifar10", data_dir=str(shared_data / "tfds"), split="test")
    items = [source[i] for i in range(1000)]
    return np.stack([item["image"] for item in items]), np.array([item["label"] for item in items])


IMAGENET = np.array([0.485, 0.456, 0.406], np.float32), np.array([0.229, 0.224, 0.225], np.float32)


@pytest.mark.parametrize(
    ("file", "name", "normalization", "num_images", "accuracy"),
    [
        ("clean_resnet20_cifar10.th", "resnet20", IMAGENET, 1000, 0.9173),
        ("clean_resnet56_cifar10.th", "resnet56", IMAGENET, 400, 0.9339),
        ("abl_wrn16_1_grid_target0.tar", "wrn16_1", (0, 1), 1000, 0.834),
        ("badnets_cnn_cifar10_white5_target1.pth", "badnets_cnn", (0.5, 0.5), 1000, 0.507),
    ],
)
def test_published_checkpoints_classify(shared_data, cifar10, file, name, normalization, num_images, accuracy):
    """Accuracy on the first test images, as their pages state it on all 10,000."""
    checkpoint = load_torch_checkpoint(Path(shared_data) / "checkpoints" / file)
    images, labels = (array[:num_images] for array in cifar10)
    model = from_torch(name, checkpoint.get("state_dict", checkpoint), (32, 32, 3))
    mean, std = normalization
    logits = calls(model, ((images / 255 - mean) / std).astype(np.float32))
    assert np.mean(np.argmax(logits, axis=1) == labels) == pytest.approx(accuracy, abs=0.025)


# torch's module, (size, channels)
PUBLISHED = {
    "clean_resnet20_cifar10.th": ("resnet20", lambda: torch_networks.Residual("resnet", (16, 32, 64), 3, 3), (32, 3)),
    "clean_resnet56_cifar10.th": ("resnet56", lambda: torch_networks.Residual("resnet", (16, 32, 64), 9, 3), (32, 3)),
    "abl_wrn16_1_grid_target0.tar": ("wrn16_1", lambda: torch_networks.Residual("wrn", (16, 32, 64), 2, 3), (32, 3)),
    "badnets_cnn_cifar10_white5_target1.pth": ("badnets_cnn", lambda: torch_networks.badnets(3, 32), (32, 3)),
    "badnets_cnn_mnist_white5_target1.pth": ("badnets_cnn", lambda: torch_networks.badnets(1, 28), (28, 1)),
}


@needs_torch
@pytest.mark.parametrize("file", PUBLISHED)
def test_logits_of_published_weights_equal_torchs(shared_data, file):
    if not (path := shared_data / "checkpoints" / file).exists():
        pytest.skip(f"{file} is not in {path.parent}")
    name, make, (size, channels) = PUBLISHED[file]
    weights = load_weights(path)
    net = make().eval()
    net.load_state_dict({key: torch.tensor(value) for key, value in weights.items()})
    torch.manual_seed(0)
    x = torch.rand(16, channels, size, size)
    model = from_torch(name, weights, (size, size, channels))
    np.testing.assert_allclose(calls(model, nhwc(x)), torch_logits(net, x), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["badnets_cnn", "wrn10_1"])
def test_a_models_own_names_are_taken_too(name):
    """As flax keeps them: what an orbax folder of the model's state holds."""
    model = build_model(name, 7, (32, 32, 3), rngs=nnx.Rngs(3))
    again = from_torch(name, to_arrays(nnx.state(model)), (32, 32, 3))
    jax.tree.map(np.testing.assert_array_equal, nnx.state(again), nnx.state(model))
    with pytest.raises(ValueError, match=r"weights: do not fit .*is missing"):
        from_torch("resnet20", to_arrays(nnx.state(model)), (32, 32, 3))


@pytest.mark.parametrize(("size", "channels", "window"), [((8, 7), 3, 3), ((6, 9), 1, 5)])
@pytest.mark.parametrize("padding", ["SAME", "VALID", [(1, 1), (1, 1)]])
def test_a_sum_of_shifted_images_is_a_convolution(size, channels, window, padding):
    keys = jax.random.split(jax.random.key(0))
    x = jax.random.normal(keys[0], (2, *size, channels))
    kernels = jax.random.normal(keys[1], (4, window, window, channels, 5))

    def sums(conv, dtype, x, kernel):
        y = conv(x.astype(dtype), kernel.astype(dtype), (1, 1), padding, **NUMBERS)
        return jnp.sum(jnp.sin(y.astype(jnp.float32))), y

    for dtype, rtol in ((jnp.float32, 1e-4), (jnp.bfloat16, 3e-2)):
        found, wanted = (
            jax.vmap(jax.value_and_grad(partial(sums, conv, dtype), (0, 1), has_aux=True), (None, 0))(x, kernels)
            for conv in (convolve, jax.lax.conv_general_dilated)
        )
        assert found[0][1].dtype == dtype
        jax.tree.map(partial(np.testing.assert_allclose, rtol=rtol, atol=20 * rtol), found, wanted)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("argument", ["image", "kernel", "both"])
def test_forward_and_second_derivatives_of_a_sum_of_shifted_images(order, argument):
    keys, shapes = jax.random.split(jax.random.key(0), 4), [(2, 6, 6, 3), (3, 3, 3, 4)] * 2
    x, kernel, along_x, along_kernel = map(jax.random.normal, keys, shapes)
    at = {"image": (x,), "kernel": (kernel,), "both": (x, kernel)}[argument]
    along = {"image": (along_x,), "kernel": (along_kernel,), "both": (along_x, along_kernel)}[argument]

    def product(conv):
        def loss(*at):
            pair = {"image": (*at, kernel), "kernel": (x, *at), "both": at}[argument]
            return jnp.sum(jnp.sin(conv(*pair, (1, 1), "SAME", **NUMBERS)))

        return jax.jvp(loss if order == 1 else jax.grad(loss), at, along)[1]

    np.testing.assert_allclose(product(convolve), product(jax.lax.conv_general_dilated), rtol=1e-4, atol=1e-3)


def test_images_that_nobody_derives_by_cost_a_sum_of_shifted_images_nothing():
    x, kernel = jnp.zeros((1, 8, 8, 3)), jnp.zeros((3, 3, 3, 4))

    def convolutions(loss, *at):
        found = jax.make_jaxpr(jax.grad(loss))(*at).jaxpr
        return sum(equation.primitive.name == "conv_general_dilated" for equation in found.eqns)

    assert convolutions(lambda kernel: jnp.sum(convolve(x, kernel, (1, 1), "SAME", **NUMBERS)), kernel) == 1
    assert convolutions(lambda x: jnp.sum(convolve(x, kernel, (1, 1), "SAME", **NUMBERS)), x) == 1


@pytest.mark.parametrize("strides", [(1, 1), (2, 2), (1, 2)])
@pytest.mark.parametrize("padding", ["SAME", "VALID", [(1, 1), (0, 2)]])
@pytest.mark.parametrize("window", [(3, 3), (5, 2), (1, 1)])
def test_the_gradient_of_one_image_is_that_of_a_convolution(strides, padding, window):
    keys = jax.random.split(jax.random.key(0))
    images, kernel = jax.random.normal(keys[0], (3, 1, 9, 8, 10)), jax.random.normal(keys[1], (*window, 10, 5))

    def gradients(conv):
        def loss(x, kernel):
            return jnp.sum(jnp.sin(conv(x, kernel, strides, padding, **NUMBERS)))

        return jax.jit(jax.vmap(jax.grad(loss, (0, 1)), (0, None)))(images, kernel)

    found, wanted = gradients(convolve), gradients(jax.lax.conv_general_dilated)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), found, wanted)


def test_the_gradient_of_one_image_by_a_large_kernel_is_no_convolution():
    def convolutions(num_images):
        x, kernel = jnp.zeros((num_images, 8, 8, 16)), jnp.zeros((3, 3, 16, 4))
        gradient = jax.grad(lambda kernel: jnp.sum(convolve(x, kernel, (1, 1), "SAME", **NUMBERS)))
        return str(jax.make_jaxpr(gradient)(kernel)).count("conv_general_dilated[")

    assert [convolutions(num_images) for num_images in (1, 2)] == [1, 2]  # its value is one, too


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_relu_is_that_of_nnx(dtype):
    x = jnp.array([-jnp.inf, -1.5, -0.0, 0.0, 2.5, jnp.inf, jnp.nan], dtype)
    for function in (relu, jax.jit(relu)):
        np.testing.assert_array_equal(function(x).astype(jnp.float32), nnx.relu(x).astype(jnp.float32))
        assert function(x).dtype == dtype
    gradients = [jax.grad(lambda x, f=f: jnp.sum(f(x).astype(jnp.float32)))(x[:-1]) for f in (relu, nnx.relu)]
    np.testing.assert_array_equal(*gradients)


def test_only_on_a_cpu_and_of_few_products_images_are_shifted(monkeypatch):
    def primitives(channels, strides, **settings):
        x, kernel = jnp.zeros((2, 8, 8, channels)), jnp.zeros((3, 3, channels, 4))
        jaxpr = jax.make_jaxpr(lambda x, kernel: convolve(x, kernel, strides, "SAME", **NUMBERS, **settings))(x, kernel)
        return {equation.primitive.name for equation in jaxpr.eqns}

    assert primitives(3, (1, 1)) == {"custom_jvp_call"}
    assert primitives(4, (1, 1)) == primitives(3, (2, 2)) == {"conv_general_dilated"}
    assert primitives(3, (1, 1), lhs_dilation=(1, 1), rhs_dilation=(1, 1)) == {"custom_jvp_call"}
    assert primitives(3, (1, 1), rhs_dilation=(2, 2)) == {"conv_general_dilated"}
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert primitives(3, (1, 1)) == {"conv_general_dilated"}


@pytest.mark.parametrize("size", [(8, 8), (7, 10)])
@pytest.mark.parametrize(("ours", "theirs"), [(max_pool, nnx.max_pool), (avg_pool, nnx.avg_pool)])
def test_pooling_is_that_of_nnx(size, ours, theirs):
    x = jax.random.normal(jax.random.key(0), (2, *size, 3))

    def pooled(pool):
        return jax.value_and_grad(lambda x: jnp.sum(jnp.sin(pool(x))))(x)

    reference = pooled(lambda x: theirs(x, (2, 2), strides=(2, 2)))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5), pooled(ours), reference)
