import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from scipy import ndimage

from madjax.models import DigitsCNN, train, train_classifier
from madjax.models.augment import Augmentation, _rotate
from tests.conftest import to_unit


@pytest.fixture(scope="module")
def data():
    """Three classes that the mean brightness of the upper half tells apart, with noise."""
    rng = np.random.default_rng(0)
    labels = (np.arange(150) % 3).astype(np.int32)
    images = rng.integers(0, 80, (150, 8, 8, 1))
    images[:, :4] += (80 * labels)[:, None, None, None]
    return images.astype(np.uint8), labels


def fit(data, num_epochs=4, **settings):
    model = DigitsCNN(3, rngs=nnx.Rngs(0))
    loss = train_classifier(
        model, *data, rng_key=jax.random.key(0), num_epochs=num_epochs, preprocess=to_unit, batch_size=32,
        learning_rate=0.05, progress=False, **settings,
    )  # fmt: skip
    return model, loss


def test_it_learns(data):
    model, loss = fit(data)
    assert loss < 0.5
    assert np.mean(np.argmax(model(to_unit(data[0])), -1) == data[1]) > 0.95


def test_resumed_equals_straight(data, tmp_path, interrupt, monkeypatch):
    monkeypatch.setattr(train, "_KEEP_SECONDS", np.inf)
    straight, loss = fit(data, augmentation=Augmentation(1, True), workdir=tmp_path / "straight")
    assert not (tmp_path / "straight").exists()  # so short a training is not worth keeping
    interrupt(2, lambda: fit(data, augmentation=Augmentation(1, True), workdir=tmp_path / "resumed"))
    (tmp_path / "resumed" / "epoch-00002.part").mkdir()  # cut off while it was written
    monkeypatch.setattr(train, "_KEEP_SECONDS", 0)
    resumed, again = fit(data, augmentation=Augmentation(1, True), workdir=tmp_path / "resumed")
    assert again == loss
    jax.tree.map(np.testing.assert_array_equal, nnx.state(resumed), nnx.state(straight))
    assert len(list((tmp_path / "resumed").iterdir())) == 1
    with pytest.raises(ValueError, match=r"workdir: .* holds the training of another model"):
        train_classifier(
            DigitsCNN(4, rngs=nnx.Rngs(0)), *data, rng_key=jax.random.key(0), num_epochs=4, preprocess=to_unit,
            batch_size=32, workdir=tmp_path / "resumed",
        )  # fmt: skip


def test_images_of_every_epoch_anew(data, tmp_path, interrupt, monkeypatch):
    monkeypatch.setattr(train, "_KEEP_SECONDS", 0)
    images, labels = data
    epochs = []

    def anew(epoch):
        epochs.append(epoch)
        return images, (labels + epoch) % 3  # the last epoch is of the labels plus 3, which are the labels

    _, always = fit(data)
    _, loss = fit(data, anew=lambda epoch: data)
    assert loss == always
    straight, other = fit(data, anew=anew, workdir=tmp_path / "straight")
    assert epochs == [0, 1, 2, 3]
    assert other > always + 0.1
    interrupt(2, lambda: fit(data, anew=anew, workdir=tmp_path / "resumed"))
    resumed, again = fit(data, anew=anew, workdir=tmp_path / "resumed")
    assert again == other
    jax.tree.map(np.testing.assert_array_equal, nnx.state(resumed), nnx.state(straight))
    with pytest.raises(ValueError, match=r"anew: wanted shapes \(150, 8, 8, 1\), \(150,\) in epoch 0, got \[\(149, "):
        fit(data, anew=lambda epoch: (images[1:], labels[1:]))


def test_the_recipe_is_backdoorbenchs(data, monkeypatch):
    told = {}

    def spy(name):
        real = getattr(optax, name)

        def call(*values, **named):
            told[name] = (*values, named)
            return real(*values, **named)

        monkeypatch.setattr(train.optax, name, call)

    for name in ("cosine_decay_schedule", "sgd", "add_decayed_weights"):
        spy(name)
    model = DigitsCNN(3, rngs=nnx.Rngs(0))
    train_classifier(model, *data, rng_key=jax.random.key(0), num_epochs=2, preprocess=to_unit, progress=False)
    # 150 images make one batch of 128
    assert told["cosine_decay_schedule"] == (0.01, 2, {})
    assert told["sgd"][1:] == ({"momentum": 0.9},)
    assert told["add_decayed_weights"] == (5e-4, {})


def test_bad_input(data):
    with pytest.raises(ValueError, match="batch_size: 32 is more than the 20 images"):
        fit((data[0][:20], data[1][:20]))
    with pytest.raises(ValueError, match="labels: wanted one for each of 150 images, got 3"):
        fit((data[0], data[1][:3]))


def test_crop_and_flip_show_windows_of_the_image():
    images = np.random.default_rng(0).integers(1, 256, (40, 6, 5, 2)).astype(np.uint8)
    shown = np.asarray(Augmentation(crop=2)(jax.random.key(0), jnp.asarray(images)))
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)))
    windows = [padded[:, i : i + 6, j : j + 5] for i in range(5) for j in range(5)]
    which = np.array([[np.array_equal(window[n], shown[n]) for window in windows] for n in range(40)])
    assert which.any(1).all()
    assert len(np.unique(which.argmax(1))) > 10  # of 25 places
    flipped = np.asarray(Augmentation(crop=0, flip=True)(jax.random.key(0), jnp.asarray(images)))
    same = (flipped == images).all((1, 2, 3))
    assert 5 < same.sum() < 35
    np.testing.assert_array_equal(flipped[~same], images[~same][:, :, ::-1])


def test_rotation_against_scipy(monkeypatch):
    image = np.random.default_rng(0).integers(0, 256, (1, 9, 9, 1)).astype(np.float32)
    monkeypatch.setattr(jax.random, "uniform", lambda *_, **__: jnp.array([10.0]))
    turned = np.asarray(_rotate(jax.random.key(0), jnp.asarray(image), 10.0))[0, ..., 0]
    expected = ndimage.rotate(image[0, ..., 0], 10, reshape=False, order=1)
    inner = slice(2, -2)  # scipy treats the border otherwise
    difference = min(
        np.abs(turned[inner, inner] - other[inner, inner]).max()
        for other in (expected, ndimage.rotate(image[0, ..., 0], -10, reshape=False, order=1))
    )
    assert difference < 1e-2
