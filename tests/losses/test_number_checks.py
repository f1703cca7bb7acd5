"""What holds for every loss of `number_cases` and `score_cases`: value, gradient, masks, types."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.losses import number_cases, score_cases
from tests.losses.differences import central_differences

CASES = [*number_cases.CASES, *score_cases.CASES]
cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def inputs(case, seed=0):
    x = 1.5 * np.random.default_rng(seed).normal(size=case.shape)
    return x.astype(np.float32), case.targets.astype(np.float32), np.ones(case.mask_shape, bool)


def some(case):
    """A mask with holes at the front, in the middle and at the end, and an empty last row."""
    where = ~np.isin(np.arange(np.prod(case.mask_shape)) % 6, (0, 4)).reshape(case.mask_shape)
    where[-1] = False
    return where


def masked_targets(case, where):
    """Where no entry of an example counts, its target does not either."""
    if case.targets.shape[: where.ndim] == where.shape:
        return ~where
    return ~where.any(axis=-1)


@functools.cache
def compiled(name):
    case = next(case for case in CASES if case.name == name)

    def total(x, y, where, weights):
        losses = case.loss(x, y, where)
        return jnp.sum(losses * weights), losses

    return jax.jit(jax.grad(total, has_aux=True))


@functools.cache
def weights_of(name):
    """Unlike for every example, so that gradients of one cannot stand for another's."""
    case = next(case for case in CASES if case.name == name)
    x, y, where = inputs(case)
    shape = jax.eval_shape(case.loss, x, y, where).shape
    return np.random.default_rng(7).uniform(0.5, 1.5, shape).astype(np.float32)


def losses_and_gradients(case, x, y, where):
    gradients, losses = compiled(case.name)(x, y, where, weights_of(case.name))
    return np.asarray(losses), np.asarray(gradients)


@cases
@pytest.mark.parametrize("mask", [False, True], ids=["whole", "masked"])
def test_values_and_gradients_are_those_of_float64(case, mask):
    x, y, where = inputs(case)
    if mask:
        where = some(case)
    losses, gradients = losses_and_gradients(case, x, y, where)
    chex.assert_type(losses, np.float32)
    exact, targets = x.astype(np.float64), y.astype(np.float64)
    # Of a few terms of size ten or less, each of a few roundings.
    np.testing.assert_allclose(losses, case.reference(exact, targets, where), rtol=1e-5, atol=5e-6)
    if case.surrogate:
        return
    weights = weights_of(case.name)
    slopes = central_differences(
        lambda point: np.sum(weights * case.reference(point, targets, where)), exact
    )
    np.testing.assert_allclose(gradients, slopes, rtol=2e-5, atol=5e-6)
    assert np.abs(slopes).max() > 1e-3


@cases
@pytest.mark.parametrize("junk", [np.nan, np.inf, -np.inf])
def test_what_is_masked_changes_nothing_even_if_it_is_not_finite(case, junk):
    x, y, _ = inputs(case, seed=1)
    where = some(case)
    expected = losses_and_gradients(case, x, y, where)
    x[~where], y[masked_targets(case, where)] = junk, junk
    found = losses_and_gradients(case, x, y, where)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(found[1][~where], 0.0)
    np.testing.assert_array_equal(found[0][-1], 0.0)


@cases
def test_all_masked_is_zero_with_zero_gradients(case):
    x, y, where = inputs(case)
    losses, gradients = losses_and_gradients(case, x * np.nan, y * np.nan, ~where)
    np.testing.assert_array_equal(losses, np.zeros_like(losses))
    np.testing.assert_array_equal(gradients, np.zeros(case.shape))


@pytest.mark.parametrize("case", [c for c in CASES if c.extreme], ids=lambda case: case.name)
def test_extreme_predictions_have_finite_losses_and_gradients(case):
    _, y, where = inputs(case)
    values = np.array([1e4, -1e4, 0.0, 1e4 - 1, -300.0, 9e3, 40.0], np.float32)
    for seed in range(3):
        x = np.random.default_rng(seed).choice(values, size=case.shape)
        losses, gradients = losses_and_gradients(case, x, y, where)
        expected = case.reference(x.astype(np.float64), y.astype(np.float64), where)
        assert np.isfinite(expected).all()
        np.testing.assert_allclose(losses, expected, rtol=1e-5, atol=1e4 * 2**-23)
        assert np.isfinite(gradients).all()


@cases
def test_bfloat16_is_read_in_float32_and_without_a_mask_all_count(case):
    x, y, where = inputs(case, seed=2)
    half = jnp.asarray(x, jnp.bfloat16)

    def total(x):
        losses = case.loss(x, y, None)
        return jnp.sum(losses * weights_of(case.name)), losses

    gradients, losses = jax.jit(jax.grad(total, has_aux=True))(half)
    chex.assert_type([losses, gradients], [jnp.float32, jnp.bfloat16])
    expected, slopes = losses_and_gradients(case, half.astype(jnp.float32), y, where)
    np.testing.assert_allclose(losses, expected, rtol=2e-6, atol=2e-6)
    # One rounding of the gradient to eight bits.
    np.testing.assert_allclose(gradients.astype(jnp.float32), slopes, rtol=2**-8, atol=2e-6)


@cases
def test_vmap_equals_the_loop(case):
    x, y, _ = inputs(case, seed=3)
    where = some(case)
    expected, _ = losses_and_gradients(case, x, y, where)
    found = jax.jit(jax.vmap(case.loss))(x, y, where)
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=2e-6)


@cases
def test_what_does_not_fit_raises_by_name(case):
    x, y, where = inputs(case)
    with pytest.raises(TypeError, match=f"{case.argument} must be floating; got int"):
        jax.eval_shape(case.loss, x.astype(np.int32), y, where)
    with pytest.raises(ValueError, match=r"where has shape \(7,\)"):
        jax.eval_shape(case.loss, x, y, np.ones(7, bool))
    with pytest.raises(ValueError, match=r"(?s)shape \(.*(expected|are of a grid|but second)"):
        jax.eval_shape(lambda x, y: case.loss(x, y, None), x, y[:-1])
