import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arviz_stats.base.array import array_stats

from madjax.sampling import diagonal_curvature, drawn_parameters, gaussian, split_chains, trace_diagnostics
from madjax.sampling.perturbation import Gaussian, Langevin
from madjax.sampling.restrict import path_names
from madjax.sampling.scale import choose_moving_scale, choose_scale, surviving_share


def _mask(params, pattern=None):
    return drawn_parameters(params, pattern)


def test_noise_has_the_size_it_says():
    params = {"a": jnp.full((200, 50), 3.0), "b": jnp.full((1000,), -0.5), "n": jnp.arange(3)}
    for noise, expected in (("absolute", (0.1, 0.1)), ("relative", (0.3, 0.05))):
        drawn = gaussian(jax.random.key(0), params, 0.1, num_draws=1, mask=_mask(params), noise=noise).params(0)
        assert np.std(drawn["a"] - params["a"]) == pytest.approx(expected[0], rel=0.05)
        assert np.std(drawn["b"] - params["b"]) == pytest.approx(expected[1], rel=0.1)
        np.testing.assert_array_equal(drawn["n"], params["n"])


def test_curvature_moves_steep_directions_less():
    params = {"a": jnp.ones((2000,))}
    steep = {"a": jnp.concatenate([jnp.zeros(1000), jnp.full((1000,), 30.0)])}
    draws = gaussian(
        jax.random.key(0), params, 1.0, num_draws=1, mask=_mask(params), noise="curvature", curvature=steep
    )
    change = np.asarray(draws.params(0)["a"] - 1)
    assert change[:1000].std() == pytest.approx(1.0, rel=0.1)
    assert change[1000:].std() == pytest.approx(1 / np.sqrt(1 + 30 / 15), rel=0.1)


def test_diagonal_curvature_against_one_gradient_an_example():
    def loss_fn(params, batch):
        return jnp.square(batch["x"] @ params["w"])

    params, x = {"w": jnp.asarray([0.3, -1.0])}, np.random.default_rng(0).normal(size=(6, 2)).astype(np.float32)
    gradients = 2 * (x @ params["w"])[:, None] * x
    np.testing.assert_allclose(diagonal_curvature(loss_fn, params, {"x": x})["w"], np.mean(gradients**2, 0), rtol=1e-5)


def test_draws_depend_on_key_and_number_alone():
    params = {"a": jnp.ones((5,)), "b": jnp.zeros((2, 2))}
    few = gaussian(jax.random.key(3), params, 0.1, num_draws=3, mask=_mask(params))
    many = gaussian(jax.random.key(3), params, 0.1, num_draws=50, mask=_mask(params))
    np.testing.assert_array_equal(few.params(2)["a"], many.params(2)["a"])
    assert not np.array_equal(many.params(2)["a"], many.params(3)["a"])


def test_antithetic_draws_mirror_each_other():
    params = {"a": jnp.full((5,), 2.0), "b": jnp.zeros((2, 2))}
    draws = gaussian(jax.random.key(3), params, 0.1, num_draws=5, mask=_mask(params), antithetic=True)
    offsets = [jax.tree.map(jnp.subtract, draws.params(i), params) for i in range(5)]
    for first, second in ((0, 1), (2, 3)):
        for name in params:
            np.testing.assert_allclose(offsets[second][name], -offsets[first][name], atol=1e-6)
    assert not np.allclose(offsets[2]["a"], offsets[0]["a"])
    assert not np.allclose(offsets[4]["a"], offsets[2]["a"])


def test_restriction_by_path(digits_model):
    _, params = digits_model
    names = path_names(params)
    for pattern, expected in (("^output/", 2), ("bias$", 4), (None, 10)):
        mask = drawn_parameters(params, pattern, digits_model[0].is_trainable(params))
        assert sum(jax.tree.leaves(mask)) == expected, (pattern, names)
    with pytest.raises(ValueError, match=r"pattern: 'layer9' matches no trainable parameter; the paths are .*conv1"):
        drawn_parameters(params, "layer9")


@pytest.mark.parametrize("noise", ["absolute", "relative"])
def test_chosen_scale_keeps_the_wanted_share(digits_model, examples, noise):
    loss_fn, params = digits_model
    # a network that is sure of its outputs
    sure = jax.tree.map(lambda x: x, params)
    sure["output"]["kernel"] = sure["output"]["kernel"].replace(params["output"]["kernel"].get_value() * 60)
    trusted = loss_fn.label(sure, examples)
    draws = gaussian(jax.random.key(0), sure, 1.0, num_draws=64, mask=loss_fn.is_trainable(sure), noise=noise)
    for retained in (0.3, 0.7):
        scale, _ = choose_scale(loss_fn, draws, trusted, retained)
        assert surviving_share(loss_fn, draws.with_scale(scale), trusted) == pytest.approx(retained, abs=0.15)


def test_the_scale_is_that_of_all_draws_by_fewer_passes(digits_model, examples):
    loss_fn, params = digits_model
    trusted = loss_fn.label(params, examples)
    draws = gaussian(jax.random.key(3), params, 1.0, num_draws=8, mask=loss_fn.is_trainable(params))
    for retained in (0.3, 0.6, 0.95):
        low, high = np.log([1e-5, 1e2])
        for _ in range(9):
            middle = (low + high) / 2
            share = surviving_share(loss_fn, draws.with_scale(np.exp(middle)), trusted)
            low, high = (middle, high) if share > retained else (low, middle)
        scale, forwards = choose_scale(loss_fn, draws, trusted, retained)
        assert scale == pytest.approx(np.exp((low + high) / 2))
        assert len(examples["image"]) * (1 + 9 * 8) > forwards > 0


def test_log_losses_move_by_what_is_wanted(digits_model, examples):
    loss_fn, params = digits_model
    trusted = loss_fn.label(params, examples)
    draws = gaussian(jax.random.key(0), params, 1.0, num_draws=40, mask=loss_fn.is_trainable(params))
    before = np.log(np.asarray(loss_fn(params, trusted)) + 1e-7)
    for moved in (0.01, 0.5):
        scale, forwards = choose_moving_scale(loss_fn, draws, trusted, moved)
        there = draws.with_scale(scale)
        losses = np.array([loss_fn(there.params(item), trusted) for item in there.items()])
        by = np.sqrt(np.square(np.log(losses + 1e-7) - before).mean(0))
        assert np.median(by) == pytest.approx(moved, rel=0.35)  # of 40 draws, four of which it was chosen on
        assert forwards <= len(trusted["image"]) * (1 + 8 * 4)
    # not by how sure the model is, as what survives is
    sure = jax.tree.map(lambda x: x, params)
    sure["output"]["kernel"] = sure["output"]["kernel"].replace(params["output"]["kernel"].get_value() * 60)
    chosen = Gaussian(moved=0.3).perturb(jax.random.key(0), loss_fn, sure, trusted, None, 8).scale
    assert chosen < 0.3 * Gaussian().perturb(jax.random.key(0), loss_fn, sure, trusted, None, 8).scale


def test_a_moving_scale_comes_back_from_draws_that_overflow(digits_model, examples):
    loss_fn, params = digits_model
    trusted = loss_fn.label(params, examples)
    draws = gaussian(jax.random.key(0), params, 1.0, num_draws=8, mask=loss_fn.is_trainable(params))

    def overflows(p, batch):  # from a distance on that is less than that of the first try
        far = sum(jnp.abs(a - b).max() for a, b in zip(jax.tree.leaves(p), jax.tree.leaves(params), strict=True))
        return jnp.where(far > 1e-3, jnp.inf, loss_fn(p, batch))

    scale, _ = choose_moving_scale(overflows, draws, trusted, 1e-4)
    assert 1e-5 < scale < 1e-3


def test_a_moving_scale_that_is_not_found_is_told(digits_model, examples):
    loss_fn, params = digits_model
    trusted = loss_fn.label(params, examples)
    draws = gaussian(jax.random.key(0), params, 1.0, num_draws=8, mask=loss_fn.is_trainable(params))

    def jumps(p, batch):  # log losses move by a hundredth or by ten, and by nothing between
        far = sum(jnp.abs(a - b).max() for a, b in zip(jax.tree.leaves(p), jax.tree.leaves(params), strict=True))
        return jnp.where(far > 1e-2, jnp.exp(10.0), jnp.where(far > 0, jnp.exp(0.01), 1.0)) + jnp.zeros(
            len(batch["image"])
        )

    with pytest.warns(UserWarning, match=r"trusted: 8 steps did not find a scale at which the log losses move by 0.3"):
        choose_moving_scale(jumps, draws, trusted, 0.3)


def test_scale_errors(digits_model, examples):
    loss_fn, params = digits_model
    trusted = loss_fn.label(params, examples)
    draws = gaussian(jax.random.key(0), params, 1.0, num_draws=8, mask=loss_fn.is_trainable(params))
    with pytest.raises(ValueError, match="trusted: more than 30% of the outputs survive every scale"):
        choose_scale(lambda p, b: 0 * loss_fn(p, b), draws, trusted, 0.3)
    with pytest.raises(ValueError, match="retained: wanted a share"):
        choose_scale(loss_fn, draws, trusted, 0.0)
    with pytest.raises(ValueError, match=r"moved: wanted a number above 0, and 1 at most, got 2"):
        choose_moving_scale(loss_fn, draws, trusted, 2)
    with pytest.raises(ValueError, match=r"trusted: no scale between 1e-05 and 100.0 moves the log losses by 0.3"):
        choose_moving_scale(lambda p, b: 0 * loss_fn(p, b) + 1, draws, trusted, 0.3)
    with pytest.raises(ValueError, match=r"scale: 1e\+30 changes every output"):
        Gaussian(scale=1e30).perturb(jax.random.key(0), loss_fn, params, trusted, None, 8)
    with pytest.raises(ValueError, match="num_draws: wanted at least 1, got 0"):
        gaussian(jax.random.key(0), params, 1.0, num_draws=0, mask=loss_fn.is_trainable(params))


def test_chains_need_examples(digits_model, examples):
    loss_fn, params = digits_model
    with pytest.raises(ValueError, match="sampling: chains need examples"):
        Langevin().perturb(jax.random.key(0), loss_fn, params, examples, None, 8)
    with pytest.raises(ValueError, match="kernel: wanted one of rmsprop_sgld, sgld, got 'hmc'"):
        Langevin(kernel="hmc").perturb(jax.random.key(0), loss_fn, params, examples, examples, 8)  # pyright: ignore
    with pytest.raises(ValueError, match="num_draws: 7 is no multiple of num_chains, 2"):
        Langevin(num_chains=2).perturb(jax.random.key(0), loss_fn, params, examples, examples, 7)


def test_diagnostics_tell_mixed_from_stuck_chains():
    rng = np.random.default_rng(0)
    mixed = rng.normal(size=(4, 200))
    stuck = mixed + np.arange(4)[:, None] * 5
    slow = np.stack([np.convolve(rng.normal(size=260), np.ones(40) / 40)[40:240] for _ in range(4)])
    traces = np.stack([mixed, stuck, slow], axis=-1)
    found = trace_diagnostics(traces)
    assert found.rhat[0] < 1.02
    assert found.rhat[1] > 1.5
    assert found.ess[0] > 500 > 100 > found.ess[2]
    assert found.ess[0] == pytest.approx(array_stats.ess(mixed, chain_axis=0, draw_axis=1))
    with pytest.raises(ValueError, match=r"traces: wanted \[num_chains, num_draws >= 4, num_examples\]"):
        trace_diagnostics(traces[:, :3])


def test_split_chains():
    matrix = np.arange(12).reshape(6, 2)  # draws 0..2 of chains 0 and 1, in turn
    np.testing.assert_array_equal(split_chains(matrix, 2)[1, :, 0], [2, 6, 10])
