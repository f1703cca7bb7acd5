"""Z-scores of logits: torch's, invariances, and constant logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from regjax.losses.distillation import distillation
from regjax.losses.standardization import standardize_logits

ROWS = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32) * 5 + 3


@pytest.mark.parametrize("ddof", [0, 1])
def test_mean_zero_and_deviation_one(ddof):
    exact = ROWS.astype(np.float64)
    expected = (exact - exact.mean(-1, keepdims=True)) / exact.std(-1, ddof=ddof, keepdims=True)
    found = standardize_logits(ROWS, ddof=ddof)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_torch_has_the_same_default_deviation():
    torch = pytest.importorskip("torch")
    z = torch.tensor(ROWS, requires_grad=True)
    expected = (z - z.mean(-1, keepdim=True)) / (1e-7 + z.std(-1, keepdim=True))
    (expected**3).sum().backward()
    np.testing.assert_allclose(standardize_logits(ROWS), expected.detach(), rtol=1e-5, atol=1e-6)
    gradient = jax.grad(lambda z: jnp.sum(standardize_logits(z) ** 3))(ROWS)
    np.testing.assert_allclose(gradient, z.grad, rtol=1e-4, atol=1e-5)


def test_shift_and_scale_of_either_model_change_no_divergence():
    student, teacher = standardize_logits(ROWS), standardize_logits(ROWS[::-1])
    moved = standardize_logits(7.0 * ROWS - 2.0), standardize_logits(0.3 * ROWS[::-1] + 5.0)
    np.testing.assert_allclose(distillation(*moved), distillation(student, teacher), rtol=1e-4)


def test_the_epsilon_is_added_to_the_deviation():
    found = standardize_logits(ROWS, epsilon=2.0)
    centred = ROWS - ROWS.mean(-1, keepdims=True)
    expected = centred / (ROWS.std(-1, ddof=1, keepdims=True) + 2.0)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_equal_logits_and_what_is_masked_are_zero_with_zero_gradient():
    rows = np.stack([np.full(6, 3.0), ROWS[0], np.full(6, np.nan)]).astype(np.float32)
    where = np.array([True, True, False])
    gradient = jax.grad(lambda z: jnp.sum(standardize_logits(z, where=where) ** 3))(rows)
    np.testing.assert_array_equal(standardize_logits(rows, where=where)[::2], 0.0)
    np.testing.assert_array_equal(gradient[::2], 0.0)
    assert np.isfinite(gradient).all()
    assert np.abs(gradient[1]).max() > 0.01


def test_bfloat16_gives_float32():
    assert standardize_logits(jnp.asarray(ROWS, jnp.bfloat16)).dtype == jnp.float32


def test_what_does_not_fit_raises():
    with pytest.raises(TypeError, match="logits must be floating; got int"):
        standardize_logits(np.zeros((2, 3), int))
    with pytest.raises(ValueError, match=r"logits have shape \(2, 1\).*K above 1"):
        standardize_logits(np.zeros((2, 1)))
    with pytest.raises(ValueError, match=r"where has shape \(3,\)"):
        standardize_logits(ROWS, where=np.ones(3, bool))
