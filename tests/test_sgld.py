"""The Langevin kernels against the reference implementation and against what theory says of a quadratic."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from madjax.sampling.chains import ChainDraws
from madjax.sampling.sgld import langevin_update, rmsprop_sgld, sgld
from madjax.sampling.target import Target

GOLDEN = Path(__file__).parent / "golden" / "sgmcmc.npz"
STEPS, SIZE, STEP_SIZE, NBETA, LOCALIZATION = 50, 13, 1e-3, 30.0, 5.0
HAS_REFERENCE = all(importlib.util.find_spec(name) for name in ("torch", "devinterp"))


def _reference(kind):
    """50 steps of devinterp's optimizer: gradients, noise and positions."""
    import torch
    from devinterp.optim.sgmcmc import SGMCMC

    rng = np.random.default_rng(0)
    start = rng.normal(size=SIZE).astype(np.float32)
    gradients = rng.normal(size=(STEPS, SIZE)).astype(np.float32)
    parameter = torch.nn.Parameter(torch.tensor(start))
    options = {"lr": STEP_SIZE, "nbeta": NBETA, "localization": LOCALIZATION}
    optimizer = getattr(SGMCMC, kind)([parameter], **options)
    noises, positions = [], []
    for step in range(STEPS):
        torch.manual_seed(step)
        noises.append(torch.normal(mean=0.0, std=1.0, size=(SIZE,)).numpy())
        parameter.grad = torch.tensor(gradients[step])
        torch.manual_seed(step)
        optimizer.step()
        positions.append(parameter.detach().numpy().copy())
    return {"start": start, "gradients": gradients, "noises": np.stack(noises), "positions": np.stack(positions)}


def _recorded(kind):
    if HAS_REFERENCE:
        arrays = _reference(kind)
        GOLDEN.parent.mkdir(exist_ok=True)
        stored = dict(np.load(GOLDEN)) if GOLDEN.exists() else {}
        missing = {f"{kind}_{name}": value for name, value in arrays.items() if f"{kind}_{name}" not in stored}
        if missing:
            np.savez_compressed(GOLDEN, **stored, **missing)
        return arrays
    stored = np.load(GOLDEN)
    return {name: stored[f"{kind}_{name}"] for name in ("start", "gradients", "noises", "positions")}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["sgld", "rmsprop_sgld"])
def test_update_equals_devinterp(kind, monkeypatch):
    """The whole step, with the reference's gradients as those of a linear loss and its noise in place of ours."""
    reference = _recorded(kind)
    noise = iter(reference["noises"])
    monkeypatch.setattr(jax.random, "normal", lambda key, shape: jnp.asarray(next(noise)).reshape(shape))
    kernel = {"sgld": sgld, "rmsprop_sgld": rmsprop_sgld}[kind](lambda p, b: b @ p["w"], {"w": True})
    start = {"w": jnp.asarray(reference["start"])}
    state, target = kernel.init(start), Target(start, NBETA, LOCALIZATION)
    worst = 0.0
    for step in range(STEPS):
        minibatch = jnp.asarray(reference["gradients"][step])[None]
        state, _ = kernel.step(jax.random.key(0), state, target, minibatch, STEP_SIZE)
        worst = max(worst, float(jnp.abs(state.position["w"] - reference["positions"][step]).max()))
    assert worst <= 1e-6


def test_stationary_variance_is_the_discrete_one_per_chain_and_across_chains():
    # large steps, for which the continuum's 1 / (nbeta h + gamma) would be off by up to 60 %
    curvature, step_size = jnp.asarray([0.5, 2.0, 8.0]), 0.02
    target = Target({"w": jnp.zeros(3)}, 10.0, 3.0)
    kernel = sgld(lambda params, batch: jnp.sum(curvature * jnp.square(params["w"])) / 2 + 0 * batch, {"w": True})

    def step(state, rng_key):
        state, _ = kernel.step(rng_key, state, target, jnp.zeros(1), step_size)
        return state, state.position["w"]

    @jax.vmap
    def walk(rng_key):
        return jax.lax.scan(step, kernel.init({"w": jnp.zeros(3)}), jax.random.split(rng_key, 10_200))[1][200:]

    chains = np.asarray(walk(jax.random.split(jax.random.key(1), 4)))
    variance = step_size / (1 - (1 - step_size * (10.0 * np.asarray(curvature) + 3.0) / 2) ** 2)
    np.testing.assert_allclose(chains.var((0, 1)), variance, rtol=0.05)
    np.testing.assert_allclose(chains.var(1), np.broadcast_to(variance, (4, 3)), rtol=0.12)
    across = chains[:, ::100].swapaxes(0, 1)  # the chains at far apart times: independent of each other
    assert abs(np.corrcoef(across[..., 0].T)[0, 1]) < 0.3
    continuum = 1 / (10.0 * np.array([0.5, 2.0, 8.0]) + 3.0)
    assert not np.allclose(variance, continuum, rtol=0.3)


def test_without_noise_it_is_gradient_descent():
    import optax

    gradient, position = jnp.asarray([1.0, -2.0]), jnp.asarray([0.3, 0.4])
    ours = langevin_update(
        position, gradient, jnp.zeros(2), jnp.ones(()), jnp.zeros(2), Target({}, 7.0, 0.0), jnp.asarray(0.1)
    )
    optimizer = optax.sgd(0.1 / 2 * 7.0)
    updates, _ = optimizer.update(gradient, optimizer.init(position))
    np.testing.assert_allclose(ours, optax.apply_updates(position, updates), rtol=1e-6)


def test_masked_leaves_stay_and_statistics_drift_only_when_asked(digits_model, examples):
    loss_fn, params = digits_model
    mask = jax.tree.map(lambda _: False, params)
    mask["output"]["bias"] = mask["output"]["bias"].replace(True)
    for drift in (False, True):
        kernel = rmsprop_sgld(loss_fn, mask, drift=drift)
        state, info = kernel.step(jax.random.key(0), kernel.init(params), Target(params, 1.0, 1.0), examples, 1e-2)
        moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), state.position, params)
        assert moved["output"]["bias"].get_value()
        assert not moved["output"]["kernel"].get_value()
        assert moved["norm1"]["mean"].get_value() == drift
        assert np.isfinite(info.loss)


def test_a_diverging_chain_stops_with_its_place(digits_model, examples):
    loss_fn, params = digits_model
    mask = loss_fn.is_trainable(params)
    draws = ChainDraws(
        jax.random.key(0), sgld(loss_fn, mask), Target(params, 1e30, 0.0), examples, num_draws=4, num_burnin_steps=0,
        step_size=1e10,
    )  # fmt: skip
    with pytest.raises(FloatingPointError, match="minibatch loss of chain 0 at draw"):
        list(draws.items())


def test_epochs_cover_every_example_and_are_reshuffled():
    seen = []

    def loss_fn(params, batch):
        jax.debug.callback(lambda x: seen.append(np.array(x)), batch["x"], ordered=True)
        return params["w"] * batch["x"]

    draws = ChainDraws(
        jax.random.key(0), sgld(loss_fn, {"w": True}), Target({"w": jnp.zeros(())}, 1.0, 1.0),
        {"x": np.arange(10.0, dtype=np.float32)}, num_draws=6, num_burnin_steps=0, batch_size=4,
    )  # fmt: skip
    list(draws.items())
    jax.effects_barrier()
    assert [len(x) for x in seen] == [4, 4, 2, 4, 4, 2]
    first, second = np.concatenate(seen[:3]), np.concatenate(seen[3:])
    assert sorted(first) == sorted(second) == list(range(10))
    assert not np.array_equal(first, second)
