"""Statistics of a decoder's hidden states, for completions, which have no class.

States are the residual stream behind every even layer, reduced to one vector a sequence; each layer is scored by
itself, and the score is the mean over layers, as in the protocol of language models trained to hide from such detectors
(Bailey et al. 2024, arXiv 2412.09565).
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from madjax.baselines.baseline import Anomaly, Observed, Statistic
from madjax.baselines.gram import median_bounds, outside, row_sums
from madjax.baselines.mahalanobis import Mahalanobis
from madjax.baselines.model import Model
from madjax.baselines.ted import distances_to, judged_by_components
from madjax.baselines.vae import VAE
from madjax.losses import sequence_positions
from madjax.types import Batch, Params

Place = Literal["last", "prompt", "completion"]


@dataclasses.dataclass(frozen=True)
class HiddenStates:
    """Reads `{"layer002": [n, size], ...}`, float32, of a batch of `SequenceLoss`.

    Attributes:
      place: the "last" token of the prompt, the mean over the "prompt", or over the "completion".
    """

    place: Place

    def __call__(self, graphdef: Any, params: Params, batch: Batch) -> dict[str, jax.Array]:
        """See `madjax.baselines.model.Reading`."""
        return read_states(nnx.merge(graphdef, params), batch, (self.place,))[1][self.place]


def read_states(
    model: Any, batch: Batch, places: tuple[Place, ...]
) -> tuple[jax.Array, dict[Place, dict[str, jax.Array]]]:
    """What one forward pass of a decoder tells: states after the last norm, and what `HiddenStates` reads at places.

    Returns:
      `[n, prompt_size + size, features]`, of prompts and completions end to end; by place
      `{"layer002": [n, features]}`, so that the order of names, in which JAX puts them, is that of the layers.
    """
    positions, is_target = sequence_positions(batch)
    tokens, size = jnp.concatenate([batch["prompt"], batch["completion"]], axis=1), batch["prompt"].shape[1]
    counted = {"prompt": (slice(size), positions[:, :size] >= 0), "completion": (slice(size, None), is_target)}
    states: dict[Place, dict[str, jax.Array]] = {place: {} for place in places}

    def reduced(state: jax.Array, place: Place) -> jax.Array:
        if place == "last":
            return state[:, size - 1]  # prompts are padded on the left
        part, counts = counted[place]
        weights = (counts / jnp.maximum(counts.sum(1, keepdims=True), 1))[..., None]
        return (state[:, part] * weights).sum(1)

    def watch(index: int, state: jax.Array) -> None:
        if index % 2 == 1:  # the second layer is the first even one
            for place in places:
                states[place][f"layer{index + 1:03}"] = reduced(state.astype(jnp.float32), place)

    hidden, _ = model.hidden(tokens, positions, model.empty_cache(*tokens.shape), watch)
    return hidden, states


@dataclasses.dataclass(frozen=True)
class _OfHiddenStates(Statistic):
    """Attributes:
    place: see `HiddenStates`.
    """

    place: Place

    def observe(self, model: Model, examples: Any, trusted: Any) -> Observed:
        """Hidden states by layer."""
        return model.read(HiddenStates(self.place), examples)


@dataclasses.dataclass(frozen=True)
class Hidden(_OfHiddenStates):
    """A statistic of features, for one class, on every layer.

    Attributes:
      statistic: of what `madjax.baselines.features.OfFeatures` observes.
    """

    statistic: Statistic

    def fit(self, trusted: Observed) -> Anomaly:
        """Fits each layer."""
        anomalies = {name: self.statistic.fit(_one_class(states)) for name, states in trusted.items()}
        return lambda observed: np.mean([anomalies[name](_one_class(observed[name])) for name in anomalies], axis=0)


@dataclasses.dataclass(frozen=True)
class HiddenBeatrix(_OfHiddenStates):
    """How far row sums of the Gram matrices of a state leave their median ± 10 median absolute deviations.

    Beatrix's orders and bounds; of the matrices of one vector its row sums alone are kept, as the whole of them would
    take megabytes a layer and example.
    """

    def fit(self, trusted: Observed) -> Anomaly:
        """Fits the bounds of every entry."""
        bounds: dict[str, dict[int | None, Any]] = {
            name: {None: median_bounds(_row_sums(states))} for name, states in trusted.items()
        }

        def anomaly(observed: Observed) -> np.ndarray:
            layers = [outside(_row_sums(observed[name]), np.zeros(len(observed[name]), int), bounds[name])
                      / (8 * observed[name].shape[1]) for name in bounds]  # fmt: skip
            return np.mean(layers, axis=0)

        return anomaly


@dataclasses.dataclass(frozen=True)
class HiddenTED(_OfHiddenStates):
    """How unusual the ranks are that the nearest trusted example of one layer has in the next.

    Without classes: the published statistic asks for the nearest of the predicted class. Judged as there.
    """

    def fit(self, trusted: Observed) -> Anomaly:
        """Fits the components on the ranks of the trusted examples, each left out of its own."""
        names = list(trusted)
        if len(names) < 2:
            raise ValueError(f"model: wanted four layers at least, of which two are even, got {', '.join(names)}")

        def ranks(observed: Observed, *, own: bool) -> np.ndarray:
            distances = [distances_to(observed[name], trusted[name], own=own) for name in names]
            before = [d.argmin(axis=1) for d in distances[:-1]]
            return np.stack(
                [(d < d[np.arange(len(d)), near][:, None]).sum(axis=1)
                 for d, near in zip(distances[1:], before, strict=True)], axis=1,
            ).astype(np.float64)  # fmt: skip

        judge = judged_by_components(ranks(trusted, own=True))
        return lambda observed: judge(ranks(observed, own=False))


def _one_class(states: np.ndarray) -> Observed:
    return {"logits": np.zeros((len(states), 1), np.float32), "features": states}


def _row_sums(states: np.ndarray) -> np.ndarray:
    return np.asarray(row_sums(jnp.asarray(states)[:, None]))


_STATISTICS = {
    "mahalanobis": lambda place: Hidden(place, Mahalanobis()),
    "vae": lambda place: Hidden(place, VAE()),
    "ted": HiddenTED,
    "beatrix": HiddenBeatrix,
}
_PLACES: tuple[Place, ...] = ("last", "prompt", "completion")

HIDDEN: dict[str, Statistic] = {
    f"{name}_{place}": make(place) for name, make in _STATISTICS.items() for place in _PLACES
}
