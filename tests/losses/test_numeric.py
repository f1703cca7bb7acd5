"""Quantile and relative losses: the computed number, minimisers, limits."""

import jax
import numpy as np
import optax
import pytest

from regjax.losses.numeric import ordered_quantiles, pinball, relative_error


def test_pinball_is_the_computed_number():
    quantiles, levels = np.array([2, 2.5, 3, 3.5, 4.2]), [0.1, 0.3, 0.5, 0.7, 0.9]
    each = pinball(quantiles[:, None], np.full(5, 3.4), [0.5])
    np.testing.assert_allclose(each, np.abs(3.4 - quantiles) / 2, rtol=2e-6)
    singles = [pinball(q[None], 3.4, [tau]) for q, tau in zip(quantiles, levels, strict=True)]
    np.testing.assert_allclose(singles, [0.14, 0.27, 0.2, 0.03, 0.08], rtol=5e-6)
    np.testing.assert_allclose(pinball(quantiles, 3.4, levels), 0.144, rtol=2e-6)


def test_the_minimiser_is_the_quantile():
    sample = np.random.default_rng(0).gamma(2.0, size=101).astype(np.float32)
    for level in (0.15, 0.5, 0.83):
        best = np.quantile(sample, level, method="inverted_cdf")
        candidates = np.sort(np.concatenate([sample, best + np.linspace(-1, 1, 9)]))
        losses = pinball(
            np.tile(candidates[:, None, None], (1, 101, 1)), np.tile(sample, (110, 1)), [level]
        ).mean(-1)
        assert candidates[np.argmin(losses)] == pytest.approx(best)


def test_ordered_quantiles_ascend_and_reach_any_ascending_ones():
    outputs = np.random.default_rng(1).normal(size=(20, 6), scale=4.0)
    assert (np.diff(ordered_quantiles(outputs)) > 0).all()
    wanted = np.array([-3.0, -2.9, 0.0, 7.0])
    steps = np.log(np.expm1(np.diff(wanted)))
    found = ordered_quantiles(np.concatenate([wanted[:1], steps]))
    np.testing.assert_allclose(found, wanted, atol=2e-6)


def test_relative_error_is_symmetric_free_of_scale_and_bounded():
    rng = np.random.default_rng(2)
    one, other = rng.uniform(0.1, 1e6, size=(2, 40)).astype(np.float32)
    losses = relative_error(one, other)
    np.testing.assert_allclose(losses, relative_error(other, one), rtol=1e-6)
    np.testing.assert_allclose(losses, relative_error(-8 * one, -8 * other), rtol=2e-6)
    assert (losses < 1).all()
    np.testing.assert_allclose(relative_error(one, -other), 1.0, rtol=1e-6)
    np.testing.assert_allclose(relative_error(np.array([3.0, 0.0]), [1, 1]), [0.5, 1.0], rtol=1e-6)
    # One apart, of a hundred: about half the plain relative error.
    assert relative_error(101.0, 100) == pytest.approx(1 / 201, rel=1e-5)


def test_exact_predictions_are_free_and_stationary():
    for number in (0.0, 5.0, -7.0):
        loss, slope = jax.value_and_grad(lambda x, y=number: relative_error(x, y))(number)
        assert loss == 0.0
        assert slope == 0.0


def test_half_the_absolute_error_at_the_median():
    predictions = np.array([1.0, 4.0])
    far = optax.losses.huber_loss(predictions, np.array([30.0, -50.0]), delta=1e-3) / 1e-3
    found = pinball(predictions[:, None], np.array([30.0, -50.0]), [0.5])
    np.testing.assert_allclose(found, far / 2, rtol=1e-4)


def test_what_does_not_fit_raises_by_name():
    with pytest.raises(ValueError, match=r"levels must lie between 0 and 1; got \[0.0, 0.5\]"):
        pinball(np.ones(2), 1.0, [0.0, 0.5])
    with pytest.raises(ValueError, match=r"quantiles have shape \(3,\) and levels \(2,\)"):
        pinball(np.ones(3), 1.0, [0.1, 0.5])
    with pytest.raises(ValueError, match=r"targets have shape \(3,\); expected \(2,\)"):
        relative_error(np.ones(2), np.ones(3))
    with pytest.raises(ValueError, match="epsilon must be positive"):
        relative_error(1.0, 1.0, epsilon=0.0)
    with pytest.raises(ValueError, match="outputs must have shape"):
        ordered_quantiles(1.0)
