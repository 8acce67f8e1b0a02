"""Statistics of an example's gradient at the trained parameters, of the loss against the model's own output."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import softmax

from madjax.baselines.baseline import Anomaly, Observed, Statistic
from madjax.baselines.model import Layers, Model
from madjax.losses import Network
from madjax.types import Params


@dataclasses.dataclass(frozen=True)
class GradientNorm(Statistic):
    """Euclidean norm of the gradient (Lee and AlRegib 2020, arXiv 2008.08030, norms of gradients as uncertainty).

    Attributes:
      last_layer: take the gradient of the last linear layer alone, which a forward pass tells.
    """

    last_layer: bool = False

    @property
    def forwards(self) -> int:
        """A gradient counts as three."""
        return 1 if self.last_layer else 3

    def observe(self, model: Model, images: np.ndarray, trusted: np.ndarray) -> Observed:
        """Logits, and "norm" `[n]`."""
        if self.last_layer:
            observed = _last_gradients(model, images)
            return {"logits": observed["logits"], "norm": np.linalg.norm(observed["gradient"], axis=1)}
        return _by_example(model).read(_Norm(), images)

    def fit(self, trusted: Observed) -> Anomaly:
        """Nothing is fitted."""
        return lambda observed: observed["norm"]


@dataclasses.dataclass(frozen=True)
class GradientCosine(Statistic):
    """Minus the cosine between the gradient and the trusted examples' mean gradient: influence without curvature.

    Attributes:
      last_layer: as for `GradientNorm`.
    """

    last_layer: bool = False

    @property
    def forwards(self) -> int:
        """A gradient counts as three."""
        return 1 if self.last_layer else 3

    def observe(self, model: Model, images: np.ndarray, trusted: np.ndarray) -> Observed:
        """Logits, "norm" `[n]`, and inner products with every trusted gradient, "kernel" `[n, num_trusted]`.

        "place" numbers the rows, which for the trusted examples tells their columns.
        """
        own, reference = (
            _last_gradients(model, some) if self.last_layer else gradients(model, some) for some in (images, trusted)
        )
        # gradients that do not fit in memory lie on disk, and are multiplied piece by piece
        size = max(1, 2**26 // own["gradient"].shape[1])
        starts = range(0, len(images), size)
        kernel = [own["gradient"][i : i + size] @ reference["gradient"].T for i in starts]
        return {
            "logits": own["logits"],
            "norm": np.concatenate([np.linalg.norm(own["gradient"][i : i + size], axis=1) for i in starts]),
            "kernel": np.concatenate(kernel),
            "place": np.arange(len(images)),
        }

    def fit(self, trusted: Observed) -> Anomaly:
        """The mean gradient, as its inner products tell it.

        Raises:
          ValueError: where it is zero.
        """
        columns = trusted["place"]
        length = np.sqrt(trusted["kernel"][:, columns].mean(dtype=np.float64))
        if not length > 0:
            raise ValueError("trusted: the mean gradient is zero, wanted examples with a loss")

        def anomaly(observed: Observed) -> np.ndarray:
            product = observed["kernel"][:, columns].mean(axis=1, dtype=np.float64)
            # an example without a gradient goes with nothing
            return -product / np.maximum(observed["norm"] * length, 1e-30)

        return anomaly


@dataclasses.dataclass(frozen=True)
class Gradient:
    """Reads "logits", and "gradient" `[n, num_parameters]` of all trainable parameters end to end."""

    def __call__(self, network: Network, params: Params, image: jax.Array) -> dict[str, jax.Array]:
        """See `Reading`."""
        chosen, apply = trainable(network, params)

        def loss(chosen: list[jax.Array], one: jax.Array) -> tuple[jax.Array, jax.Array]:
            logits = apply(chosen, one[None])[0]
            return own_loss(logits), logits

        gradient, logits = jax.vmap(jax.grad(loss, has_aux=True), in_axes=(None, 0))(chosen, image)
        return {"logits": logits, "gradient": jnp.concatenate([g.reshape(len(image), -1) for g in gradient], axis=1)}


def trainable(
    network: Network, params: Params
) -> tuple[list[jax.Array], Callable[[list[jax.Array], jax.Array], jax.Array]]:
    """The trainable parameters, and float32 logits `[n, num_classes]` as a function of them and of images."""
    leaves, tree = jax.tree.flatten(params)
    is_trainable = jax.tree.leaves(network.is_trainable(params))

    def apply(chosen: list[jax.Array], image: jax.Array) -> jax.Array:
        given = iter(chosen)
        filled = [next(given) if may else leaf for leaf, may in zip(leaves, is_trainable, strict=True)]
        return network.apply(jax.tree.unflatten(tree, filled), image).astype(jnp.float32)

    return [leaf for leaf, may in zip(leaves, is_trainable, strict=True) if may], apply


def own_loss(logits: jax.Array) -> jax.Array:
    """Cross-entropy against the largest of the logits `[..., num_classes]`, in nats.

    By the odds of the others: p - 1 of a sure model would leave its gradient to rounding.
    """
    label = jnp.argmax(logits, axis=-1, keepdims=True)
    margins = logits - jnp.take_along_axis(logits, label, axis=-1)
    others = jnp.arange(logits.shape[-1]).reshape((1,) * (logits.ndim - 1) + (-1,)) != label
    return jnp.log1p(jnp.where(others, jnp.exp(margins), 0).sum(axis=-1))


@dataclasses.dataclass(frozen=True)
class _Norm:
    def __call__(self, network: Network, params: Params, image: jax.Array) -> dict[str, jax.Array]:
        observed = Gradient()(network, params, image)
        return {"logits": observed["logits"], "norm": jnp.linalg.norm(observed["gradient"], axis=1)}


def gradients(model: Model, images: np.ndarray) -> Observed:
    """What `Gradient` reads of all images."""
    return _by_example(model).read(Gradient(), images)


def _last_gradients(model: Model, images: np.ndarray) -> Observed:
    """Of the last layer's kernel and bias: the outer product of its input with the error of the probabilities."""
    layer = model.find(None, images)
    observed = model.read(Layers((layer,)), images)
    error = softmax(observed["logits"].astype(np.float64), axis=1)
    error[np.arange(len(error)), observed["logits"].argmax(axis=1)] -= 1
    inputs = np.concatenate([observed[layer], np.ones((len(error), 1), np.float32)], axis=1)
    return {"logits": observed["logits"], "gradient": (inputs[:, :, None] * error[:, None]).reshape(len(error), -1)}


def _by_example(model: Model) -> Model:
    """On a CPU gradients of one example after the other are faster: vmap makes grouped convolutions of them."""
    return dataclasses.replace(model, batch_size=1) if jax.default_backend() == "cpu" else model
