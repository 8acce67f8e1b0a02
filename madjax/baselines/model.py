"""A model as the baselines read it: logits, inputs and outputs of any layer, or anything else of each example.

The model is not edited. Layers are found by path, for instance `block3/layers/0/conv1`; `PATH:input` is what that layer
was called with. A layer that is called more than once shows its last call.
"""

from __future__ import annotations

import dataclasses
import difflib
import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from madjax.losses import ClassificationLoss, Network, SequenceLoss
from madjax.sampling.diagnostics import ensure_finite
from madjax.sampling.restrict import path_names
from madjax.types import Params, num_examples

# what is read of all images is kept on disk instead of in memory from so many bytes an array on
MAX_BYTES_IN_MEMORY = 2**30

# (network, params, images) -> pytree of arrays [n, ...]; hashable, and equal where it computes the same. Of a language
# model it is given the graphdef and a batch of `SequenceLoss`.
Reading = Callable[[Any, Params, Any], Any]


@dataclasses.dataclass(frozen=True)
class Model:
    """A model, read `batch_size` images at a time by one compiled program.

    Attributes:
      loss_fn, params: from `from_nnx`, `from_linen` or `from_decoder`.
    """

    loss_fn: ClassificationLoss | SequenceLoss
    params: Params
    batch_size: int = 256

    def __post_init__(self):
        if not (isinstance(self.loss_fn, SequenceLoss) or hasattr(self.network, "apply_watched")):
            raise ValueError(
                "loss_fn: wanted one of from_nnx, from_linen or from_decoder, whose layers can be read, got "
                f"{self.loss_fn!r}"
            )

    @property
    def network(self) -> Any:
        """What a `Reading` is given: the `Network` of a classifier, the graphdef of a decoder."""
        return getattr(self.loss_fn, "graphdef" if isinstance(self.loss_fn, SequenceLoss) else "module", None)

    def read(self, reading: Reading, examples: Any) -> Any:
        """What `reading` makes of all examples, on the host; arrays too large for memory lie in a temporary file.

        Args:
          examples: images, or a batch of `SequenceLoss`.

        Raises:
          FloatingPointError: where it is not finite.
        """
        count, result = num_examples(examples), None
        for start in range(0, count, self.batch_size):
            block = jax.tree.map(lambda leaf, i=start: np.asarray(leaf[i : i + self.batch_size]), examples)
            size = num_examples(block)
            if size < self.batch_size < count:  # so that one program serves all
                more = self.batch_size - size
                block = jax.tree.map(lambda leaf, n=more: np.concatenate([leaf, np.repeat(leaf[:1], n, axis=0)]), block)
            values = jax.device_get(_read(reading, self.network, self.params, jax.tree.map(jnp.asarray, block)))
            result = jax.tree.map(partial(_allocate, count), values) if result is None else result
            for whole, part in zip(jax.tree.leaves(result), jax.tree.leaves(values), strict=True):
                ensure_finite(part[:size], "what was read of the model")
                whole[start : start + size] = part[:size]
        return result

    def layers(self, images: np.ndarray) -> dict[str, tuple[int, ...]]:
        """The shape, for one image, of what can be read by path, in the order of the calls."""
        return self._shapes(images)[0]

    def outputs(self, images: np.ndarray) -> tuple[str, ...]:
        """The layers whose output can be read."""
        return tuple(name for name in self.layers(images) if not name.endswith(":input"))

    def head(self, images: np.ndarray) -> str:
        """The path of the last linear layer.

        Raises:
          ValueError: where the model has none.
        """
        _, head = self._shapes(images)
        if head is None:
            raise ValueError("layer: the model has no linear layer whose input could be the default; name one")
        return head

    def head_weights(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The last linear layer's kernel, float64 `[num_features, num_classes]`, and bias `[num_classes]`."""
        leaves, head = zip(path_names(self.params), jax.tree.leaves(self.params), strict=True), self.head(images)
        found = {
            kind: np.asarray(leaf, np.float64)
            for name, leaf in leaves
            for kind in ("kernel", "bias")
            if f"/{name}".endswith(f"/{head}/{kind}")
        }
        return found["kernel"], found.get("bias", np.zeros(found["kernel"].shape[1]))

    def find(self, layer: str | None, images: np.ndarray) -> str:
        """The layer to read: `layer` itself, or the input of the last linear one.

        Raises:
          ValueError: where there is no such layer; the message lists those of similar name.
        """
        if layer is None:
            return f"{self.head(images)}:input"
        known = self.layers(images)
        if layer not in known:
            near = difflib.get_close_matches(layer, known, n=5, cutoff=0.4) or list(known)
            raise ValueError(f"layer: the model has no {layer!r}; near are {', '.join(near)}")
        return layer

    def _shapes(self, images: np.ndarray) -> tuple[dict[str, tuple[int, ...]], str | None]:
        """What `layers` and `head` tell."""
        found = []

        def watch(params: Params, image: jax.Array) -> None:
            _, arrays, head = _watch(self.network, params, image)
            found.append(({name: array.shape[1:] for name, array in arrays.items()}, head))

        # two, so that an array of one row is not taken for one of one image
        jax.eval_shape(watch, self.params, jax.ShapeDtypeStruct((2, *images.shape[1:]), images.dtype))
        return found[-1]


def mean_over_positions(array: jax.Array) -> jax.Array:
    """`[n, ..., channels]` -> float32 `[n, channels]`."""
    return array.astype(jnp.float32).mean(axis=tuple(range(1, array.ndim - 1)))


@dataclasses.dataclass(frozen=True)
class Layers:
    """Reads "logits" and, by their names, `layers` as `[n, num_features]`, float32.

    Attributes:
      reduce: turns the values of a layer, `[n, ..., channels]`, into `[n, num_features]`.
    """

    layers: tuple[str, ...] = ()
    reduce: Callable[[jax.Array], jax.Array] = mean_over_positions

    def __call__(self, network: Network, params: Params, image: jax.Array) -> dict[str, jax.Array]:
        """See `Reading`."""
        logits, arrays, _ = _watch(network, params, image)
        return {"logits": logits.astype(jnp.float32)} | {name: self.reduce(arrays[name]) for name in self.layers}


def _watch(network: Network, params: Params, image: jax.Array) -> tuple[jax.Array, dict[str, jax.Array], str | None]:
    """Logits, what can be read by path, and the path of the last linear layer. What is not used costs nothing."""
    arrays, linear = {}, []

    def watch(path: str, module: Any, input: Any, output: Any) -> None:
        if isinstance(module, nnx.Linear | flax.linen.Dense):
            linear.append(path)
        for name, array in ((f"{path}:input", input), (path, output)):
            if isinstance(array, jax.Array) and array.ndim >= 2 and len(array) == len(image):
                arrays[name] = array

    logits = network.apply_watched(params, image, watch)
    return logits, arrays, linear[-1] if linear else None


@partial(jax.jit, static_argnums=(0, 1))
def _read(reading: Reading, network: Any, params: Params, examples: Any) -> Any:
    return reading(network, params, examples)


def _allocate(count: int, block: np.ndarray) -> np.ndarray:
    shape = (count, *block.shape[1:])
    if np.prod(shape) * block.itemsize <= MAX_BYTES_IN_MEMORY:
        return np.empty(shape, block.dtype)
    with tempfile.TemporaryFile() as file:  # the map keeps it alive
        return np.memmap(file, block.dtype, "w+", shape=shape)
