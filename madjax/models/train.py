"""Trains a classifier: optax SGD with momentum, cosine schedule and weight decay, data and augmentation on the device.

The defaults are BackdoorBench's recipe (Wu et al. 2022, arXiv 2206.12654), but for the number of epochs (100 there).
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

from madjax import checkpoint
from madjax.models.augment import Augmentation

# writing a language model and its moments takes as long as a short epoch on an accelerator
_KEEP_SECONDS = 30.0


def train_classifier(
    model: nnx.Module,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    rng_key: jax.Array,
    num_epochs: int,
    preprocess: Callable[[jax.Array], jax.Array],
    augmentation: Augmentation | None = None,
    learning_rate: float = 0.01,
    batch_size: int = 128,
    weight_decay: float = 5e-4,
    anew: Callable[[int], tuple[np.ndarray, np.ndarray]] | None = None,
    workdir: str | Path | None = None,
    progress: bool = True,
) -> float:
    """Trains `model` in place on `images` (uint8 `[n, ...]`) and returns the mean loss (nats) of the last epoch.

    The last, smaller batch of an epoch is dropped, so that one program serves all steps.

    Args:
      preprocess: uint8 images -> the model's input, inside the compiled step.
      anew: epoch -> its images and labels, as many and of the same shape, where they are not the same in all.
      workdir: where the state is kept after an epoch, every half minute at most; a second call with it goes on after
        the last one kept and ends where an uninterrupted one would.

    Raises:
      ValueError: fewer images than a batch, images and labels of different number, or of another one anew.
      FloatingPointError: the loss is not finite.
    """
    if len(images) != len(labels):
        raise ValueError(f"labels: wanted one for each of {len(images)} images, got {len(labels)}")
    num_batches = len(images) // batch_size
    if num_batches < 1:
        raise ValueError(f"batch_size: {batch_size} is more than the {len(images)} images")
    schedule = optax.cosine_decay_schedule(learning_rate, num_epochs * num_batches)
    optimizer = optax.chain(optax.add_decayed_weights(weight_decay), optax.sgd(schedule, momentum=0.9))
    model.train()
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    @partial(jax.jit, donate_argnums=0)
    def step(state: Any, images: jax.Array, labels: jax.Array, index: jax.Array, rng_key: jax.Array) -> Any:
        params, rest, momentum = state
        batch = images[index]
        if augmentation is not None:
            batch = augmentation(rng_key, batch)

        def mean_loss(params: Any) -> Any:
            model = nnx.merge(graphdef, params, rest, copy=True)
            logits = model(preprocess(batch))
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels[index]).mean()
            return loss, nnx.state(model, nnx.Not(nnx.Param))

        (loss, rest), gradient = jax.value_and_grad(mean_loss, has_aux=True)(params)
        updates, momentum = optimizer.update(gradient, momentum, params)
        return (optax.apply_updates(params, updates), rest, momentum), loss

    there = _on_device(images, labels)

    def before_epoch(epoch: int) -> None:
        nonlocal there
        if anew is not None:
            of_epoch = anew(epoch)
            shapes = [array.shape for array in of_epoch]
            if shapes != [images.shape, labels.shape]:
                raise ValueError(f"anew: wanted shapes {images.shape}, {labels.shape} in epoch {epoch}, got {shapes}")
            there = _on_device(*of_epoch)

    mean, state = run_epochs(
        lambda state, index, key: step(state, *there, index, key),
        (params, rest, optimizer.init(params)),
        len(images),
        rng_key=rng_key,
        num_epochs=num_epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        workdir=workdir,
        progress=progress,
        before_epoch=before_epoch,
    )
    nnx.update(model, *state[:2])
    model.eval()
    return mean


def run_epochs(
    step: Callable[[Any, jax.Array, jax.Array], tuple[Any, jax.Array]],
    state: Any,
    num_examples: int,
    *,
    rng_key: jax.Array,
    num_epochs: int,
    batch_size: int,
    learning_rate: float,
    workdir: str | Path | None,
    progress: bool,
    before_epoch: Callable[[int], None] = lambda epoch: None,
    after_epoch: Callable[[Any], Any] = lambda state: state,
) -> tuple[float, Any]:
    """Passes all examples, shuffled, through `step` in every epoch; the last, smaller batch is dropped.

    Args:
      step: (state, indices of the batch, key) -> (state, loss); its first argument may be donated.
      learning_rate: for the error where the loss is not finite.
      workdir: see `train_classifier`.
      before_epoch: called with the number of every epoch that is trained.
      after_epoch: state -> what the next epoch begins with.

    Returns:
      The mean loss of the last epoch, and the state after it.
    """
    # copies, since a step may give its argument's memory to its result
    state = jax.tree.map(jnp.array, state)
    first, mean, state = _resume(workdir, state)
    # a loop on the host over one compiled step: convolution gradients inside lax.scan are slow on the CPU
    bar = tqdm(
        range(first, num_epochs), desc="train", unit="epoch", initial=first, total=num_epochs, disable=not progress
    )
    kept = time.monotonic()
    for epoch in bar:
        before_epoch(epoch)
        epoch_key = jax.random.fold_in(rng_key, epoch)
        order = jax.random.permutation(epoch_key, num_examples)
        losses = []
        for i in range(num_examples // batch_size):
            index = jax.lax.dynamic_slice_in_dim(order, i * batch_size, batch_size)
            state, loss = step(state, index, jax.random.fold_in(epoch_key, i))
            losses.append(loss)
        mean = float(jnp.mean(jnp.stack(losses)))
        if not np.isfinite(mean):
            raise FloatingPointError(f"learning_rate: {learning_rate} made the training loss {mean} in epoch {epoch}")
        bar.set_postfix(loss=f"{mean:.4f}")
        state = after_epoch(state)
        if workdir is not None and time.monotonic() - kept >= _KEEP_SECONDS:
            _keep(Path(workdir), epoch, mean, state)
            kept = time.monotonic()
    return mean, state


def _on_device(images: np.ndarray, labels: np.ndarray) -> tuple[jax.Array, jax.Array]:
    return jax.device_put(images), jax.device_put(np.asarray(labels, np.int32))


def _keep(workdir: Path, epoch: int, loss: float, state: Any) -> None:
    before = list(workdir.glob("epoch-?????"))
    leaves = {str(i): _plain(leaf) for i, leaf in enumerate(jax.tree.leaves(state))}
    checkpoint.save(workdir / f"epoch-{epoch:05d}", {"epoch": epoch, "loss": loss}, leaves)
    for folder in before:
        shutil.rmtree(folder, ignore_errors=True)


def _resume(workdir: str | Path | None, state: Any) -> tuple[int, float, Any]:
    """First epoch to train, the loss before it, and the state."""
    for folder in sorted(Path(workdir).glob("epoch-?????"), reverse=True) if workdir is not None else []:
        settings, arrays = checkpoint.load(folder)
        leaves, tree = jax.tree.flatten(state)
        if len(leaves) != len(arrays) or any(_plain(x).shape != arrays[str(i)].shape for i, x in enumerate(leaves)):
            raise ValueError(f"workdir: {folder} holds the training of another model")
        restored = [_like(leaf, arrays[str(i)]) for i, leaf in enumerate(leaves)]
        return settings["epoch"] + 1, settings["loss"], jax.tree.unflatten(tree, restored)
    return 0, float("nan"), state


def _plain(leaf: Any) -> Any:
    return jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf


def _like(leaf: Any, array: np.ndarray) -> Any:
    array_there = jnp.asarray(array)
    return jax.random.wrap_key_data(array_there) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else array_there
