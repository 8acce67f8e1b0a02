"""Correlations of channels, Gram matrices of high order: of one layer (Beatrix) and of all (Gram)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from madjax.baselines.baseline import Anomaly, Observed, Statistic, predicted
from madjax.baselines.model import Layers, Model

_ORDERS = tuple(range(1, 9))
_EPSILON = 1e-6


@dataclasses.dataclass(frozen=True)
class Beatrix(Statistic):
    """How far a Gram matrix leaves its class's median ± 10 median absolute deviations (Ma et al. 2023, 2209.11715).

    Orders 1 to 8, as published; classes are the model's own predictions. An example of a class that no trusted one has
    is held against all of them.

    Attributes:
      layer: None for the last whose output has positions and at most 256 channels: as published for a PreActResNet18,
        whose last stage gets 256. The Gram matrices of 256 channels take a megabyte an image.
    """

    layer: str | None = None

    def observe(self, model: Model, images: np.ndarray, trusted: np.ndarray) -> Observed:
        """Logits, and upper triangles of the Gram matrices of all orders, "grams" `[n, num_orders · c (c + 1) / 2]`."""
        shapes = model.layers(images)
        fitting = [name for name in model.outputs(images) if len(shapes[name]) > 1 and shapes[name][-1] <= 256]
        chosen = fitting[-1] if self.layer is None and fitting else self.layer
        layer = model.find(chosen, images)
        observed = model.read(Layers((layer,), upper_triangles), images)
        return {"logits": observed["logits"], "grams": observed[layer]}

    def fit(self, trusted: Observed) -> Anomaly:
        """Fits the range of every entry in every class."""
        bounds = _by_class(trusted["grams"], predicted(trusted), median_bounds)
        # the published figure counts the entries of a whole matrix, half of them
        size = trusted["grams"].shape[1] / len(_ORDERS)
        channels = (np.sqrt(8 * size + 1) - 1) / 2
        return lambda observed: (
            outside(observed["grams"], predicted(observed), bounds) / (channels**2 / 2) / len(_ORDERS)
        )


@dataclasses.dataclass(frozen=True)
class Gram(Statistic):
    """How far row sums of Gram matrices leave their class's range, in all layers (Sastry and Oore 2020, 1912.12510).

    The deviation of a layer counts in units of its mean over a tenth of the trusted examples, which do not take part in
    the ranges.
    """

    def observe(self, model: Model, images: np.ndarray, trusted: np.ndarray) -> Observed:
        """Logits, and for every layer's output "grams" `[n, num_orders · c]`."""
        layers = model.outputs(images)
        observed = model.read(Layers(layers, row_sums), images)
        return {"logits": observed["logits"], "grams": {name: observed[name] for name in layers}}

    def fit(self, trusted: Observed) -> Anomaly:
        """Fits the ranges, and each layer's unit."""
        classes = predicted(trusted)
        aside = np.arange(len(classes)) % 10 == 9 if len(classes) >= 20 else np.zeros(len(classes), bool)
        layers = []
        for name, grams in trusted["grams"].items():
            bounds = _by_class(grams[~aside], classes[~aside], lambda values: (values.min(axis=0), values.max(axis=0)))
            judged = aside if aside.any() else ~aside
            mean = outside(grams[judged], classes[judged], bounds).mean()
            layers.append((name, bounds, mean + _EPSILON))

        def anomaly(observed: Observed) -> np.ndarray:
            own = predicted(observed)
            return sum(
                (outside(observed["grams"][name], own, bounds) / mean for name, bounds, mean in layers),
                np.zeros(len(own)),
            )

        return anomaly


def median_bounds(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Median ± 10 median absolute deviations of each column."""
    median = np.median(values, axis=0)
    mad = np.median(np.abs(values - median), axis=0)
    return median - 10 * mad, median + 10 * mad


def upper_triangles(array: jax.Array) -> jax.Array:
    """`[n, ..., c]` -> float32 `[n, num_orders · c (c + 1) / 2]`."""
    rows, columns = np.triu_indices(array.shape[-1])
    return _roots(array, lambda gram: gram[:, rows, columns])


def row_sums(array: jax.Array) -> jax.Array:
    """`[n, ..., c]` -> float32 `[n, num_orders · c]`; the root is taken of the sum, as published."""
    return _roots(array, lambda gram: gram.sum(axis=2))


def _roots(array: jax.Array, entries: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Entries of the Gram matrices of all orders, and of each the root of its order, `[n, num_orders · entries]`."""
    x = array.astype(jnp.float32).reshape(len(array), -1, array.shape[-1])
    # powers of 16 would leave the range of float32
    largest = jnp.maximum(jnp.abs(x).max(axis=(1, 2), keepdims=True), 1e-20)
    size, negative = jnp.abs(x / largest), x < 0

    def of_order(order: jax.Array) -> jax.Array:
        power = size**order * jnp.where(negative & (order % 2 == 1), -1, 1)
        some = entries(jnp.einsum("npc,npd->ncd", power, power))
        return jnp.sign(some) * jnp.abs(some) ** (1 / order) * jnp.square(largest[:, :, 0])

    # one after the other, and compiled once
    roots = jax.lax.map(of_order, jnp.asarray(_ORDERS, jnp.float32))
    return jnp.moveaxis(roots, 0, 1).reshape(len(x), -1)


def _by_class(values: np.ndarray, classes: np.ndarray, bounds: Any) -> dict[int | None, Any]:
    """Bounds by class, and over all under None."""
    return {None: bounds(values)} | {int(label): bounds(values[classes == label]) for label in np.unique(classes)}


def outside(values: np.ndarray, classes: np.ndarray, bounds: dict[int | None, Any]) -> np.ndarray:
    """Float64 `[n]`: how far values lie outside of their bounds, relative to them, summed over entries."""
    result = np.zeros(len(values))
    for label in np.unique(classes):
        own = classes == label
        low, high = bounds.get(int(label), bounds[None])
        below = np.maximum(low - values[own], 0) / np.abs(low + _EPSILON)
        above = np.maximum(values[own] - high, 0) / np.abs(high + _EPSILON)
        result[own] = (below + above).sum(axis=1, dtype=np.float64)
    return result
