"""Losses of bags: identities between the bag level and the instance level."""

import jax
import numpy as np
import optax
import pytest

from regjax.losses.aggregate import aggregate_response

RNG = np.random.default_rng(0)
PREDICTIONS = (2 * RNG.normal(size=(4, 5))).astype(np.float32)
PROPORTIONS = np.array([0.0, 0.2, 0.6, 1.0], np.float32)


@pytest.mark.parametrize("loss", ["squared", "binary_cross_entropy"])
def test_the_instance_level_is_above_the_bag_level_and_equal_for_bags_of_one_prediction(loss):
    bag, instance = (
        aggregate_response(PREDICTIONS, PROPORTIONS, instance_weight=rho, loss=loss)
        for rho in (0.0, 1.0)
    )
    assert (instance > bag).all()
    constant = np.repeat(PREDICTIONS[:, :1], 5, axis=1)
    each = [
        aggregate_response(constant, PROPORTIONS, instance_weight=rho, loss=loss)
        for rho in (0.0, 0.4, 1.0)
    ]
    one = aggregate_response(PREDICTIONS[:, :1], PROPORTIONS, loss=loss)
    np.testing.assert_allclose(each, [one] * 3, rtol=2e-6, atol=1e-6)
    elementwise = {
        "squared": optax.losses.squared_error,
        "binary_cross_entropy": optax.losses.sigmoid_binary_cross_entropy,
    }[loss]
    np.testing.assert_allclose(one, elementwise(PREDICTIONS[:, 0], PROPORTIONS), rtol=2e-6)


def test_squared_levels_differ_by_the_variance_even_of_large_predictions():
    far = PREDICTIONS + 1000.0
    bag, instance = (
        aggregate_response(far, PROPORTIONS + 1000.0, instance_weight=rho) for rho in (0.0, 1.0)
    )
    np.testing.assert_allclose(instance - bag, far.astype(float).var(axis=-1), rtol=1e-4, atol=1e-3)


def test_the_instance_level_does_not_know_the_means():
    """Its gradient is that of fitting every example to the bag's response."""
    instance = jax.grad(lambda f: aggregate_response(f, PROPORTIONS, instance_weight=1.0).sum())(
        PREDICTIONS
    )
    np.testing.assert_allclose(
        instance, 2 * (PREDICTIONS - PROPORTIONS[:, None]) / 5, rtol=1e-5, atol=1e-6
    )
    bag = jax.grad(lambda f: aggregate_response(f, PROPORTIONS).sum())(PREDICTIONS)
    np.testing.assert_allclose(
        bag, np.tile(2 * (PREDICTIONS.mean(-1) - PROPORTIONS)[:, None] / 5, 5), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("loss", ["squared", "binary_cross_entropy"])
def test_responses_have_gradients_too_and_empty_bags_none(loss):
    where = np.array([True, True, False, True])[:, None] & (np.arange(5) != 2)

    def total(y):
        return aggregate_response(PREDICTIONS, y, loss=loss, where=where).sum()

    slopes = jax.grad(total)(PROPORTIONS)
    kept = np.delete(PREDICTIONS, 2, axis=1).astype(float)
    if loss == "squared":
        expected = 2 * (PROPORTIONS - kept.mean(-1))
    else:
        mean = (1 / (1 + np.exp(-kept))).mean(-1)
        expected = np.log(1 - mean) - np.log(mean)
    np.testing.assert_allclose(slopes, np.where(where.any(-1), expected, 0.0), rtol=1e-5, atol=1e-6)


def test_what_does_not_fit_raises_by_name():
    with pytest.raises(ValueError, match=r"instance_weight must lie in \[0, 1\]; got 2"):
        aggregate_response(PREDICTIONS, PROPORTIONS, instance_weight=2)
    with pytest.raises(ValueError, match=r"responses have shape \(4, 5\); expected \(4,\)"):
        aggregate_response(PREDICTIONS, PREDICTIONS)
    with pytest.raises(ValueError, match="predictions must have shape"):
        aggregate_response(1.0, 1.0)
    with pytest.raises(ValueError, match="'squared' or 'binary_cross_entropy'; got 'hinge'"):
        aggregate_response(PREDICTIONS, PROPORTIONS, loss="hinge")
