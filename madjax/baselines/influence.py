"""Classical influence: inner products of gradients under the inverse Hessian, by its leading eigenvectors.

Koh and Liang 2017 (arXiv 1703.04730); the eigenvectors by Arnoldi's iteration, which for a symmetric matrix is Lanczos'
(Schioppa et al. 2022, arXiv 2112.03052). A ground truth for small models: couplings claim to approximate it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.linalg import eigh_tridiagonal

from madjax.baselines.baseline import Anomaly, Observed, Statistic
from madjax.baselines.gradient import Gradient, gradients, own_loss, trainable
from madjax.baselines.knn import unit
from madjax.baselines.model import Model
from madjax.losses import Network
from madjax.types import Params


@dataclasses.dataclass(frozen=True)
class Influence(Statistic):
    """Minus the mean of the `top_k` largest influences among the trusted examples, each over the norms of both.

    Norms are those under the inverse Hessian, so that an influence is a cosine, as in RelatIF (Barshan et al. 2020,
    arXiv 2003.11630). The Hessian is that of the mean loss of all trusted examples, and is not fitted anew where one is
    left out.

    Attributes:
      num_iterations: of Arnoldi's, each a product with the Hessian over all trusted examples.
      num_eigenvectors: of the leading ones, as many of positive eigenvalue at most.
      top_k: as for the Detector's couplings.
      seed: of the first vector.
    """

    num_iterations: int = 60
    num_eigenvectors: int = 30
    top_k: int = 10
    seed: int = 0

    @property
    def forwards(self) -> int:
        """A gradient counts as three."""
        return 3

    def observe(self, model: Model, images: np.ndarray, trusted: np.ndarray) -> Observed:
        """Logits, and "projection" `[n, num_eigenvectors]`, whose inner products are influences."""
        values, vectors = self._eigenvectors(model, trusted)
        observed = gradients(model, images)
        return {"logits": observed["logits"], "projection": observed["gradient"] @ vectors / np.sqrt(values)}

    def fit(self, trusted: Observed) -> Anomaly:
        """Keeps the trusted examples."""
        reference = unit(trusted["projection"])
        count = min(self.top_k, len(reference))

        def anomaly(observed: Observed) -> np.ndarray:
            cosines = unit(observed["projection"]) @ reference.T
            return -np.partition(cosines, -count, axis=1)[:, -count:].mean(axis=1)

        return anomaly

    def _eigenvectors(self, model: Model, trusted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        product = partial(_hessian_product, model.network, model.params, jnp.asarray(trusted))
        size = model.read(Gradient(), trusted[:1])["gradient"].shape[1]
        values, vectors = leading_eigenvectors(product, size, self.num_iterations, self.seed)
        chosen = np.argsort(-values)[: self.num_eigenvectors]
        chosen = chosen[values[chosen] > 1e-6 * values.max()]
        return values[chosen], vectors[:, chosen]


def leading_eigenvectors(
    product: Callable[[np.ndarray], Any], size: int, num_iterations: int, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Ritz values, ascending, and vectors `[size, num_iterations]` of a symmetric matrix that is given by its product.

    The largest converge first. Every vector is made orthogonal to all before it.
    """
    vector = np.random.default_rng(seed).normal(size=size)
    basis, diagonal, beside = [vector / np.linalg.norm(vector)], [], []
    for _ in range(min(num_iterations, size)):
        image = np.asarray(product(basis[-1].astype(np.float32)), np.float64)
        diagonal.append(float(image @ basis[-1]))
        known = np.stack(basis, axis=1)
        for _ in range(2):  # once leaves what rounding left
            image -= known @ (known.T @ image)
        length = float(np.linalg.norm(image))
        if length < 1e-10 * max(map(abs, diagonal)):
            break
        beside.append(length)
        basis.append(image / length)
    values, vectors = eigh_tridiagonal(np.array(diagonal), np.array(beside[: len(diagonal) - 1]))
    return values, np.stack(basis[: len(diagonal)], axis=1) @ vectors


@partial(jax.jit, static_argnums=0)
def _hessian_product(network: Network, params: Params, images: jax.Array, vector: jax.Array) -> jax.Array:
    """Product of the Hessian of the mean loss with a vector of all trainable parameters end to end."""
    chosen, apply = trainable(network, params)

    def loss(chosen: list[jax.Array]) -> jax.Array:
        return own_loss(apply(chosen, images)).mean()

    ends = np.cumsum([leaf.size for leaf in chosen])[:-1]
    tangents = [part.reshape(leaf.shape) for part, leaf in zip(jnp.split(vector, ends), chosen, strict=True)]
    _, result = jax.jvp(jax.grad(loss), (chosen,), (tangents,))
    return jnp.concatenate([part.ravel() for part in result])
