"""The ways to perturb a model, as settings: independent Gaussian draws, those of a tangent, and Langevin chains."""

from __future__ import annotations

import dataclasses
import re
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from madjax.sampling.chains import ChainDraws
from madjax.sampling.draws import Draws
from madjax.sampling.gaussian import Noise, diagonal_curvature, gaussian
from madjax.sampling.restrict import drawn_parameters, path_names
from madjax.sampling.scale import (
    MOVED,
    RETAINED,
    check_moved,
    choose_moving_scale,
    choose_scale,
    pilot_examples,
    surviving_share,
)
from madjax.sampling.sgld import rmsprop_sgld, sgld
from madjax.sampling.tangent import PASSES, TangentDraws
from madjax.sampling.target import Target
from madjax.types import Batch, LossFn, Params, num_examples


class Perturbed(NamedTuple):
    """Draws ready for a sweep.

    Attributes:
      draws: the draws.
      forwards: forward passes of one example spent before the sweep, or by the chains' own steps.
      scale: the scale of Gaussian draws, else None.
    """

    draws: Draws
    forwards: int
    scale: float | None


@dataclasses.dataclass(frozen=True)
class Gaussian:
    """Independent draws; see `madjax.sampling.gaussian`.

    Attributes:
      noise: "absolute", "relative" or "curvature".
      scale: None chooses it on the trusted examples, so that a share `retained` of their outputs survives, or, where
        `moved` is not 0, so that their log losses move by it.
      parameters: regular expression of the paths to draw; None for all trainable ones.
      antithetic: draws come in pairs that mirror each other at the trained parameters.
    """

    noise: Noise = "absolute"
    scale: float | None = None
    retained: float = RETAINED
    parameters: str | None = None
    antithetic: bool = False
    moved: float = 0.0

    def perturb(
        self,
        rng_key: jax.Array,
        loss_fn: LossFn,
        params: Params,
        trusted: Batch,
        sampling: Batch | None,
        num_draws: int,
    ) -> Perturbed:
        """`num_draws` draws around `params`. `sampling` is not used."""
        del sampling
        mask = _mask(loss_fn, params, self.parameters)
        curvature, forwards = None, 0
        if self.noise == "curvature":
            count = num_examples(trusted, "trusted")
            curvature = diagonal_curvature(loss_fn, params, trusted, batch_size=min(8, count))
            forwards = PASSES * count
        draws = gaussian(
            rng_key, params, 1.0, num_draws=num_draws, mask=mask, noise=self.noise, curvature=curvature,
            antithetic=self.antithetic,
        )  # fmt: skip
        scale = self.scale
        if scale is None:
            if self.moved:
                scale, passes = choose_moving_scale(loss_fn, draws, trusted, self.moved)
            else:
                scale, passes = choose_scale(loss_fn, draws, trusted, self.retained)
            forwards += passes
        elif surviving_share(loss_fn, draws.with_scale(scale, 4), pilot_examples(trusted)) == 0:
            raise ValueError(f"scale: {scale} changes every output on the trusted examples; lower it or leave it out")
        draws = draws.with_scale(scale)
        return Perturbed(draws, forwards, scale)


@dataclasses.dataclass(frozen=True)
class Langevin:
    """Chains of stochastic gradient Langevin dynamics; the defaults are the paper's.

    Attributes:
      kernel: "rmsprop_sgld" or "sgld".
      step_size, nbeta, localization: ε, nβ and γ of `madjax.sampling.sgld`.
      num_chains, num_burnin_steps, num_steps_between_draws, batch_size: see `ChainDraws`.
      drift: the batch statistics move, as in the paper's code.
      parameters: regular expression of the paths to move; None for all trainable ones.
    """

    kernel: Literal["rmsprop_sgld", "sgld"] = "rmsprop_sgld"
    step_size: float = 1e-6
    nbeta: float = 100.0
    localization: float = 1e4
    num_chains: int = 1
    num_burnin_steps: int = 250
    num_steps_between_draws: int = 1
    batch_size: int = 256
    drift: bool = False
    parameters: str | None = None

    def perturb(
        self,
        rng_key: jax.Array,
        loss_fn: LossFn,
        params: Params,
        trusted: Batch,
        sampling: Batch | None,
        num_draws: int,
    ) -> Perturbed:
        """`num_draws` draws in all, over `num_chains` chains that train on `sampling` with true labels."""
        del trusted
        if sampling is None:
            raise ValueError("sampling: chains need examples with true labels to train on, apart from the trusted ones")
        kernels = {"rmsprop_sgld": rmsprop_sgld, "sgld": sgld}
        if self.kernel not in kernels:
            raise ValueError(f"kernel: wanted one of {', '.join(kernels)}, got {self.kernel!r}")
        mask = _mask(loss_fn, params, self.parameters)
        draws = ChainDraws(
            rng_key,
            kernels[self.kernel](loss_fn, mask, drift=self.drift),
            Target(params, self.nbeta, self.localization),
            sampling,
            num_draws=num_draws,
            num_chains=self.num_chains,
            num_burnin_steps=self.num_burnin_steps,
            num_steps_between_draws=self.num_steps_between_draws,
            step_size=self.step_size,
            batch_size=self.batch_size,
            drawn=None if self.drift else tuple(jax.tree.leaves(mask)),
        )
        steps = self.num_chains * self.num_burnin_steps + num_draws * self.num_steps_between_draws
        return Perturbed(draws, PASSES * steps * min(self.batch_size, num_examples(sampling)), None)


@dataclasses.dataclass(frozen=True)
class Tangent:
    """Small draws whose losses are told from gradients, and which move each example alike; `madjax.sampling.tangent`.

    Attributes:
      moved: by how much each log loss moves.
      parameters: regular expression of the paths to draw; None for `tangent_parameters`.
    """

    moved: float = MOVED
    parameters: str | None = None

    def perturb(
        self,
        rng_key: jax.Array,
        loss_fn: LossFn,
        params: Params,
        trusted: Batch,
        sampling: Batch | None,
        num_draws: int,
    ) -> Perturbed:
        """`num_draws` of each tensor around `params`; nothing is chosen on `trusted`, and `sampling` is not used."""
        del trusted, sampling
        check_moved(self.moved)
        pattern = tangent_parameters(params) if self.parameters is None else self.parameters
        drawn = tuple(jax.tree.leaves(_mask(loss_fn, params, pattern)))
        return Perturbed(TangentDraws(rng_key, params, jnp.float32(self.moved), drawn, num_draws), 0, None)


Perturbation = Gaussian | Tangent | Langevin

# the matrices of layers; and of a decoder, those that put what a token was told by others into its state
_KERNELS, _ATTENTION_OUTPUTS = "kernel$", "attention/o/kernel$"


def tangent_parameters(params: Params) -> str:
    """The pattern of the tensors whose gradients tell most: what attention puts out, where there is such, or kernels.

    An answer is decided by what attention brings to its token, a trigger's news among them; the gradient there is of
    what was brought and of what it did. `docs/choosing-the-scale.md` has the figures.
    """
    return _ATTENTION_OUTPUTS if any(re.search(_ATTENTION_OUTPUTS, name) for name in path_names(params)) else _KERNELS


def _mask(loss_fn: LossFn, params: Params, pattern: str | None):
    is_trainable = getattr(loss_fn, "is_trainable", None)
    return drawn_parameters(params, pattern, None if is_trainable is None else is_trainable(params))


def check_labels(labels: np.ndarray, num_classes: int, name: str) -> None:
    """Raises ValueError unless every label is a class."""
    wrong = (labels < 0) | (labels >= num_classes)
    if wrong.any():
        index = int(np.argmax(wrong))
        raise ValueError(f"{name}: wanted labels from 0 to {num_classes - 1}, got {labels[index]} at index {index}")
