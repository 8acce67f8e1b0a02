"""A user's own loader, as `madjax-score --loss_fn=tests.own_model:load` calls it."""

from madjax import from_nnx
from madjax.interop.weights import load_weights
from madjax.models import from_torch


def load(checkpoint):
    model = from_torch("badnets_cnn", load_weights(checkpoint), (28, 28, 1))
    return from_nnx(model, preprocess=lambda image: image.astype("float32") / 255)
