import numpy as np
import pytest

from madjax.traces import SHRINKAGE, SMALL_LOSS, TraceMapFit, fit_trace_map, least_loss


def test_against_scipy_free_formula():
    rng = np.random.default_rng(0)
    losses = rng.gamma(1.0, size=(6, 50)).astype(np.float32)
    x = np.log1p(losses.astype(float) / SMALL_LOSS)
    covariance = np.cov(x, bias=True)
    metric = (1 + SHRINKAGE) * np.linalg.inv(covariance / (np.trace(covariance) / 6) + SHRINKAGE * np.eye(6))
    trace_map = fit_trace_map(losses)
    np.testing.assert_allclose(trace_map.root @ trace_map.root, metric, rtol=1e-9)
    np.testing.assert_allclose(trace_map(losses).mean(1), 0, atol=1e-12)


def test_what_all_share_is_weakened():
    rng = np.random.default_rng(0)
    common = np.exp(rng.normal(size=(30, 1)) * 3)
    losses = common * rng.gamma(50.0, size=(1, 80)) / 50 * np.exp(0.1 * rng.normal(size=(30, 80)))
    raw = np.corrcoef(losses.T)
    mapped = np.corrcoef(fit_trace_map(losses)(losses).T)
    off = ~np.eye(80, dtype=bool)
    assert np.abs(raw[off]).mean() > 0.9
    assert np.abs(mapped[off]).mean() < 0.3


def test_negative_losses_of_a_users_own_are_allowed():
    assert np.isfinite(fit_trace_map(np.array([[-1.0, 2.0, 0.0], [0.5, -3.0, 1.0]]))(np.array([[-5.0], [5.0]]))).all()


def test_losses_that_were_rounded_to_zero_lie_beside_the_smallest_that_was_not():
    losses = np.array([[0.0, 1e-7, 2.0], [3e-7, 0.0, 1.0]])
    assert least_loss(losses) == 1e-7
    assert least_loss(losses * 1e-20) == pytest.approx(1e-27)
    assert least_loss(losses * 1e-30) == 1e-30
    assert least_loss(np.zeros((2, 2))) == 1
    assert least_loss(np.array([[-1.0, 3.0], [1e-9, 2.0]])) == 1.5


def test_the_unit_of_losses_does_not_matter_to_margins():
    rng = np.random.default_rng(0)
    trusted, test = rng.gamma(0.1, size=(6, 50)), rng.gamma(0.1, size=(6, 7))
    for factor in (1e-6, 1e3):
        scaled = fit_trace_map(trusted * factor, least_loss(trusted * factor))(test * factor)
        np.testing.assert_allclose(scaled, fit_trace_map(trusted, least_loss(trusted))(test), rtol=1e-6, atol=1e-9)


def test_a_map_without_some_is_the_map_of_the_rest():
    losses = np.random.default_rng(0).gamma(1.0, size=(6, 50))
    held_out = np.array([0, 7, 49])
    rest = fit_trace_map(np.delete(losses, held_out, axis=1))
    left_out = TraceMapFit(losses).without(held_out)
    np.testing.assert_allclose(left_out.mean, rest.mean, rtol=1e-12)
    np.testing.assert_allclose(left_out.root, rest.root, rtol=1e-9)


def test_without_whitening_height_counts_the_same_however_many_draws_there_are():
    rng = np.random.default_rng(0)
    for num_draws in (8, 64):
        height = rng.normal(size=50) * 3
        trusted = np.exp(height + rng.normal(size=(num_draws, 50)))
        test = np.exp(np.stack([np.zeros(num_draws), np.full(num_draws, 5.0)], axis=1))
        least = least_loss(trusted)
        apart = {}
        for whiten in (True, False):
            mapped = TraceMapFit(trusted, least, whiten=whiten).without(np.zeros(0, int))(test)
            apart[whiten] = np.linalg.norm(mapped[:, 1] - mapped[:, 0]) / np.sqrt(num_draws)
        assert apart[False] == pytest.approx(5, abs=0.1)
        assert apart[True] < 0.7 * apart[False]
