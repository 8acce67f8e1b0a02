"""From a Flax model to a `LossFn`: how surprised perturbed parameters are by what the trained model says.

`from_nnx` and `from_linen` return `(loss_fn, params)` of a classifier. The loss is the cross-entropy against
`batch["label"]`; `loss_fn.label(params, batch)` puts the model's own argmax there, since what is explained is the
output, right or wrong. `from_decoder` does so for a language model and its own completions.
Batch statistics are part of `params`, frozen unless a sampler asks for `loss_fn.drift`.
Nothing else in the package needs these classes: any function `(params, batch) -> float32 [n]` is a `LossFn`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any, Protocol
from unittest import mock

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from madjax.types import Batch, Params, Stage

# told the path of a submodule as its parameters have it (`block1/layers/0/conv`), the submodule, input and output
Watch = Callable[[str, Any, Any, Any], None]


class Network(Protocol):
    """A classifier without its parameters; hashable, and equal for models of one architecture."""

    def apply(self, params: Params, image: jax.Array) -> jax.Array:
        """Logits `[n, num_classes]` with batch statistics frozen."""
        ...

    def apply_train(self, params: Params, image: jax.Array) -> tuple[jax.Array, Params]:
        """Logits under the batch's own statistics, and parameters with the running statistics one step on."""
        ...

    def apply_watched(self, params: Params, image: jax.Array, watch: Watch) -> jax.Array:
        """What `apply` returns, while `watch` is told of every call of a submodule."""
        ...

    def is_trainable(self, params: Params) -> Any:
        """Pytree of bool like `params`."""
        ...


@dataclasses.dataclass(frozen=True)
class ClassificationLoss:
    """Cross-entropy of a classifier's logits, an example at a time.

    Two losses of models of one architecture compare equal, so a compiled sweep serves both.

    Attributes:
      module: the network without its parameters: `apply`, `apply_train` and `is_trainable`, see `Network`.
    """

    module: Network

    def is_trainable(self, params: Params) -> Any:
        """Pytree of bool like `params`: the leaves an optimizer would train."""
        return self.module.is_trainable(params)

    def __call__(self, params: Params, batch: Batch) -> jax.Array:
        """Float32 `[n]`: cross-entropy in nats against `batch["label"]`."""
        return _cross_entropy(self.module.apply(params, batch["image"]), batch["label"])

    def drift(self, params: Params, batch: Batch) -> tuple[jax.Array, Params]:
        """The loss under the batch's own statistics, and the parameters with their running statistics moved on."""
        logits, params = self.module.apply_train(params, batch["image"])
        return _cross_entropy(logits, batch["label"]), params

    def num_classes(self, params: Params, batch: Batch) -> int:
        """The number of logits."""
        return jax.eval_shape(self.module.apply, params, jax.tree.map(lambda x: x[:1], batch["image"])).shape[-1]

    def label(self, params: Params, batch: Batch, *, batch_size: int = 512) -> Batch:
        """The batch with `label` replaced by the model's own prediction, `batch_size` images at a time."""
        images = batch["image"]
        labels = [
            _argmax(self.module, params, images[start : start + batch_size])
            for start in range(0, images.shape[0], batch_size)
        ]
        return {**batch, "label": jnp.concatenate(labels)}


def _cross_entropy(logits: jax.Array, label: jax.Array) -> jax.Array:
    """Float32 `[...]`: -log p of the labels, in nats, to seven digits however small it is.

    The logarithm of the sum of exponentials less the label's logit would be rounded as the logits are, to some 1e-6,
    and all that the model is sure of would have the loss 0. With the label taken out of the sum, the loss is
    log(1 + exp(-margin)).
    """
    logits = logits.astype(jnp.float32)  # bfloat16 would round small losses to a handful of values
    own = jnp.take_along_axis(logits, label[..., None], axis=-1)
    is_own = jax.nn.one_hot(label, logits.shape[-1], dtype=bool)
    losses = jax.nn.softplus(jax.nn.logsumexp(jnp.where(is_own, -jnp.inf, logits - own), axis=-1))
    return jnp.where(jnp.isfinite(own[..., 0]), losses, jnp.nan)  # an infinite logit is a fault, not a certainty


@partial(jax.jit, static_argnums=0)
def _argmax(module: Network, params: Params, image: jax.Array) -> jax.Array:
    return jnp.argmax(module.apply(params, image), axis=-1).astype(jnp.int32)


def from_nnx(
    model: nnx.Module, *, preprocess: Callable[[jax.Array], jax.Array] | None = None
) -> tuple[ClassificationLoss, Params]:
    """The loss and the parameters of an NNX classifier `model(image) -> logits`. The model itself is left as it was.

    Args:
      preprocess: applied to `batch["image"]` inside the compiled program, for instance a normalization of uint8 images.
    """
    graphdef, rng_state, params = nnx.split(model, nnx.RngState, ...)
    module = _NNXModule(graphdef, rng_state, preprocess)
    return ClassificationLoss(module), params


def from_linen(
    module: flax.linen.Module,
    variables: Mapping[str, Any],
    *,
    eval_kwargs: Mapping[str, Any] | None = None,
    train_kwargs: Mapping[str, Any] | None = None,
    preprocess: Callable[[jax.Array], jax.Array] | None = None,
) -> tuple[ClassificationLoss, Params]:
    """The loss and the parameters of a Linen classifier.

    Args:
      variables: what `module.init` returned, trained: `{"params": ..., "batch_stats": ...}`.
      eval_kwargs: what `module.apply` needs for frozen statistics, for instance `{"train": False}`.
      train_kwargs: what it needs for the batch's own statistics; only drifting statistics use it.
      preprocess: as for `from_nnx`.
    """
    linen = _LinenModule(module, tuple((eval_kwargs or {}).items()), tuple((train_kwargs or {}).items()), preprocess)
    return ClassificationLoss(linen), dict(variables)


@dataclasses.dataclass(frozen=True)
class _NNXModule:
    graphdef: nnx.GraphDef
    rng_state: nnx.State = dataclasses.field(compare=False)
    preprocess: Callable[[jax.Array], jax.Array] | None

    def _merge(self, params: Params, use_running_average: bool) -> Any:
        model = nnx.merge(self.graphdef, self.rng_state, params)
        model.eval()  # dropout stays off in both modes: only the statistics may drift
        # a model without batch statistics has no such attribute to set
        model.set_attributes(use_running_average=use_running_average, raise_if_not_found=False)
        return model

    def _logits(self, model: Any, image: jax.Array) -> jax.Array:
        return model(image if self.preprocess is None else self.preprocess(image))

    def apply(self, params: Params, image: jax.Array) -> jax.Array:
        return self._logits(self._merge(params, use_running_average=True), image)

    def apply_watched(self, params: Params, image: jax.Array, watch: Watch) -> jax.Array:
        model = self._merge(params, use_running_average=True)
        modules = [(path, module) for path, module in nnx.iter_modules(model) if path and callable(module)]
        paths = {id(module): "/".join(map(str, path)) for path, module in modules}

        def watched(call: Callable[..., Any]) -> Callable[..., Any]:
            def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
                output = call(self, *args, **kwargs)
                if id(self) in paths:
                    watch(paths[id(self)], self, args[0] if args else None, output)
                return output

            return __call__

        with ExitStack() as patches:  # Python looks calls up in the class
            for kind in {type(module) for _, module in modules}:
                patches.enter_context(mock.patch.object(kind, "__call__", watched(kind.__call__)))
            return self._logits(model, image)

    def apply_train(self, params: Params, image: jax.Array) -> tuple[jax.Array, Params]:
        model = self._merge(params, use_running_average=False)
        logits = self._logits(model, image)
        _, _, params = nnx.split(model, nnx.RngState, ...)
        return logits, params

    def is_trainable(self, params: Params) -> Any:
        return nnx.map_state(lambda _, variable: variable.replace(isinstance(variable, nnx.Param)), params)


@dataclasses.dataclass(frozen=True)
class _LinenModule:
    module: flax.linen.Module
    eval_kwargs: tuple[tuple[str, Any], ...]
    train_kwargs: tuple[tuple[str, Any], ...]
    preprocess: Callable[[jax.Array], jax.Array] | None

    def _input(self, image: jax.Array) -> jax.Array:
        return image if self.preprocess is None else self.preprocess(image)

    def apply(self, params: Params, image: jax.Array) -> jax.Array:
        return self.module.apply(params, self._input(image), **dict(self.eval_kwargs))  # pyright: ignore[reportReturnType]

    def apply_watched(self, params: Params, image: jax.Array, watch: Watch) -> jax.Array:
        def watched(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
            output = call(*args, **kwargs)
            if context.method_name == "__call__" and context.module.path:
                watch("/".join(context.module.path), context.module, args[0] if args else None, output)
            return output

        with flax.linen.intercept_methods(watched):
            return self.apply(params, image)

    def apply_train(self, params: Params, image: jax.Array) -> tuple[jax.Array, Params]:
        logits, updated = self.module.apply(
            params, self._input(image), **dict(self.train_kwargs), mutable=["batch_stats"]
        )
        return logits, {**params, **updated}

    def is_trainable(self, params: Params) -> Any:
        return {
            collection: jax.tree.map(lambda _, trainable=collection == "params": trainable, tree)
            for collection, tree in params.items()
        }


@dataclasses.dataclass(frozen=True)
class SequenceLoss:
    """Mean negative log-likelihood of a completion's tokens, given its prompt, a sequence at a time.

    A batch holds `prompt` int32 `[n, prompt_size]`, padded on the left, and `completion` int32 `[n, size]`, padded on
    the right, with `prompt_length` and `completion_length` int32 `[n]`. What is explained is the model's own
    completion, which is generated once (`madjax.models.generate.complete`) and has no class.

    Attributes:
      graphdef: the decoder without its parameters: `model(tokens, positions, last=...)` -> logits of the last tokens.
    """

    graphdef: Any

    def is_trainable(self, params: Params) -> Any:
        """Pytree of bool like `params`: all of them."""
        return jax.tree.map(lambda _: True, params)

    def __call__(self, params: Params, batch: Batch) -> jax.Array:
        """Float32 `[n]`: nats a token."""
        return self.of_tokens(self.tokens(params, batch), batch)

    def tokens(self, params: Params, batch: Batch) -> jax.Array:
        """Float32 `[n, size]`: nats of each token of the completion, 0 behind its end."""
        model, (tokens, positions) = nnx.merge(self.graphdef, params), _told_by(batch)
        return _of_completion(model(tokens, positions, last=batch["completion"].shape[1]), batch)

    def of_tokens(self, losses: jax.Array, batch: Batch) -> jax.Array:
        """`[n, size]` of `tokens` -> `[n]`."""
        return losses.sum(-1) / jnp.maximum(batch["completion_length"], 1)

    def stages(self, params: Params) -> list[Stage] | None:
        """The loss in parts, a layer each, where the model has `stages` as `madjax.models.decoder.Decoder`."""
        return _stages(self.graphdef, params, self.of_tokens)

    def cut(self, examples: Batch, batch_size: int) -> tuple[list[Batch], np.ndarray]:
        """Batches for `stages`: of prompts alike in length, so that little is computed for padding.

        The tokens that all prompts begin with, such as a system prompt, stand apart as `shared` int32 `[n, shared]`,
        whose rows are equal. The rest of a batch is as long as its longest needs, to an eighth of the longest of all,
        so that there are eight lengths at most. The last batch repeats the longest example until it is full.

        Returns:
          The batches, and where each example stands in them, end to end.
        """
        prompts, lengths = np.asarray(examples["prompt"]), np.asarray(examples["prompt_length"])
        count, size = prompts.shape
        shared = _shared(prompts, lengths)
        step = -(-(size - len(shared)) // 8)
        order = np.argsort(lengths, kind="stable")
        batches = []
        for chosen in np.pad(order, (0, -count % batch_size), mode="edge").reshape(-1, batch_size):
            batch = jax.tree.map(lambda leaf: leaf[chosen], examples)  # noqa: B023
            kept = -(-(lengths[chosen].max() - len(shared)) // step) * step
            batch["prompt"] = prompts[chosen][:, max(len(shared), size - kept) :]
            batches.append({**batch, "shared": np.tile(shared, (batch_size, 1))})
        return batches, np.argsort(order)


def _shared(prompts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The tokens that all prompts begin with, but for the last token of the shortest; in fours, so that few programs
    serve all; none of a few prompts, which are alike by chance.
    """
    if len(prompts) < 8:
        return np.zeros(0, prompts.dtype)
    first = prompts.shape[1] - lengths[:, None] + np.arange(lengths.min() - 1)
    tokens = np.take_along_axis(prompts, first, axis=1)
    differs = (tokens != tokens[0]).any(0)
    count = int(differs.argmax()) if differs.any() else len(differs)
    return tokens[0, : count // 4 * 4]


@dataclasses.dataclass(frozen=True)
class TokenLoss:
    """Negative log-likelihood of every token of a completion by itself: `SequenceLoss.tokens` as a loss."""

    loss_fn: SequenceLoss

    def __call__(self, params: Params, batch: Batch) -> jax.Array:
        """Float32 `[n, size]`, in nats, 0 behind a completion's end."""
        return self.loss_fn.tokens(params, batch)

    def stages(self, params: Params) -> list[Stage] | None:
        """As `SequenceLoss.stages`."""
        return _stages(self.loss_fn.graphdef, params, _each)

    def cut(self, examples: Batch, batch_size: int) -> tuple[list[Batch], np.ndarray]:
        """As `SequenceLoss.cut`."""
        return self.loss_fn.cut(examples, batch_size)


@dataclasses.dataclass(frozen=True)
class OneTokenLoss:
    """Negative log-likelihood of one token of a completion: of that at `batch["token"]`, int32 `[n]`."""

    loss_fn: SequenceLoss

    def __call__(self, params: Params, batch: Batch) -> jax.Array:
        """Float32 `[n]`, in nats."""
        return _asked_for(self.loss_fn.tokens(params, batch), batch)

    def stages(self, params: Params) -> list[Stage] | None:
        """As `SequenceLoss.stages`."""
        return _stages(self.loss_fn.graphdef, params, _asked_for)

    def cut(self, examples: Batch, batch_size: int) -> tuple[list[Batch], np.ndarray]:
        """As `SequenceLoss.cut`."""
        return self.loss_fn.cut(examples, batch_size)


def _each(losses: jax.Array, batch: Batch) -> jax.Array:
    del batch
    return losses


def _asked_for(losses: jax.Array, batch: Batch) -> jax.Array:
    return jnp.take_along_axis(losses, batch["token"][:, None], axis=1)[:, 0]


def _told_by(batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Tokens and positions that the model is given: all but the last, which is told by those before it."""
    tokens = jnp.concatenate([batch["prompt"], batch["completion"]], axis=1)
    return tokens[:, :-1], sequence_positions(batch)[0][:, :-1]


def _of_completion(logits: jax.Array, batch: Batch) -> jax.Array:
    is_target = sequence_positions(batch)[1]
    return jnp.where(is_target, _cross_entropy(logits, batch["completion"]), 0.0)


def _stages(graphdef: Any, params: Params, of_tokens: Callable[[jax.Array, Batch], jax.Array]) -> list[Stage] | None:
    leaves, structure = jax.tree.flatten(params)
    model = nnx.merge(graphdef, structure.unflatten(range(len(leaves))))
    if not hasattr(model, "stages"):
        return None
    parts = [(nnx.split(modules), run) for modules, run in model.stages()]
    last = len(parts) - 1
    return [
        Stage(numbers, _Stage(graphdef, run, i == 0, of_tokens if i == last else None))
        for i, ((graphdef, numbers), run) in enumerate(parts)
    ]


@dataclasses.dataclass(frozen=True)
class _Stage:
    """A stage of a decoder, see `madjax.types.Stage`: of a batch, then of its states with the batch."""

    graphdef: Any
    run_modules: Callable[[Any, Any, Any], Any]
    is_first: bool
    of_tokens: Callable[[jax.Array, Batch], jax.Array] | None

    def __call__(self, params: Params, state: Any) -> Any:
        batch = state if self.is_first else state[1]
        shared, (tokens, positions) = batch["shared"][:1], _told_by(batch)
        x = (shared, tokens) if self.is_first else state[0]
        if self.of_tokens is not None:
            x = x[0], x[1][:, -batch["completion"].shape[1] :]
        before = jnp.arange(shared.shape[1], dtype=jnp.int32)[None]
        x = self.run_modules(nnx.merge(self.graphdef, params), x, (before, positions))
        return (x, batch) if self.of_tokens is None else self.of_tokens(_of_completion(x, batch), batch)


def sequence_positions(batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Of prompts and completions end to end.

    Returns:
      Positions int32 `[n, prompt_size + size]`, -1 for padding; bool `[n, size]`: tokens of the completion.
    """
    prompt_size, size = batch["prompt"].shape[1], batch["completion"].shape[1]
    place, after = jnp.arange(prompt_size)[None], jnp.arange(size)[None]
    lengths = batch["prompt_length"][:, None]
    is_target = after < batch["completion_length"][:, None]
    # of prompts whose beginning stands apart, see `SequenceLoss.cut`
    first = batch["shared"].shape[1] if "shared" in batch else 0
    before = place - prompt_size + lengths
    before = jnp.where(before < first, -1, before)
    return jnp.concatenate([before, jnp.where(is_target, lengths + after, -1)], axis=1).astype(jnp.int32), is_target


def from_decoder(model: nnx.Module) -> tuple[SequenceLoss, Params]:
    """The loss and the parameters of a language model `model(tokens, positions, *, last) -> logits`.

    Tokens and positions are int32 `[n, length]`, positions -1 for padding; logits `[n, last, vocab_size]` are those
    behind the `last` last tokens. `madjax.models.decoder.Decoder` is one.
    """
    graphdef, params = nnx.split(model)
    return SequenceLoss(graphdef), params
