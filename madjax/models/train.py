"""Trains a small classifier on the spot: optax SGD with momentum, cosine schedule, weight decay."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm


def train_classifier(
    model: nnx.Module,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    rng: np.random.Generator,
    num_epochs: int,
    preprocess: Callable[[jax.Array], jax.Array],
    learning_rate: float = 0.05,
    batch_size: int = 128,
    weight_decay: float = 5e-4,
    progress: bool = True,
) -> float:
    """Trains `model` in place on `images` (uint8 `[n, ...]`) and returns the mean loss (nats) of the last epoch.

    The last, smaller batch of an epoch is dropped, so that one program serves all steps.
    """
    num_batches = len(images) // batch_size
    if num_batches < 1:
        raise ValueError(f"batch_size: {batch_size} is more than the {len(images)} images")
    schedule = optax.cosine_decay_schedule(learning_rate, num_epochs * num_batches)
    optimizer = nnx.Optimizer(
        model,
        optax.chain(optax.add_decayed_weights(weight_decay), optax.sgd(schedule, momentum=0.9)),
        wrt=nnx.Param,
    )
    model.train()

    # a loop on the host over one compiled step: convolution gradients inside lax.scan are slow on the CPU
    @nnx.jit
    def step(model, optimizer, image, label):
        def mean_loss(model):
            logits = model(preprocess(image))
            return optax.softmax_cross_entropy_with_integer_labels(logits, label).mean()

        loss, gradient = nnx.value_and_grad(mean_loss)(model)
        optimizer.update(model, gradient)
        return loss

    mean = float("nan")
    for _ in (bar := tqdm(range(num_epochs), desc="train", unit="epoch", disable=not progress)):
        order = rng.permutation(len(images))[: num_batches * batch_size].reshape(num_batches, batch_size)
        losses = [step(model, optimizer, jnp.asarray(images[b]), jnp.asarray(labels[b])) for b in order]
        mean = float(jnp.mean(jnp.stack(losses)))
        if not np.isfinite(mean):
            raise FloatingPointError(f"learning_rate: {learning_rate} made the training loss {mean}")
        bar.set_postfix(loss=f"{mean:.4f}")
    model.eval()
    return mean
