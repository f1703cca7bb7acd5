"""What is read out of logits or rewards with a gradient: values, gradients, extremes, types, vmap."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from regjax.losses.long_tail import post_hoc_adjusted
from regjax.losses.ordinal import exceedance, thurstone
from regjax.losses.sequence_distillation import discounted_returns
from regjax.losses.worst_case import class_risk_sums

PRIOR = np.array([0.5, 0.3, 0.15, 0.05])
TARGETS = np.array([0.6, 0.0, 0.3, 0.1])
ROWS = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32) * 1.5


def log_sigmoid(z):
    return -np.logaddexp(0.0, -z)


def normal(first, second):
    return 0.5 * math.erfc((second - first) / 2.0)


def pairs(z):
    return thurstone(z[..., :2], z[..., 2:])


def risks(z):
    return class_risk_sums(z, TARGETS)[0]


P = functools.partial
READ_OUTS = {
    "coral": (P(exceedance, kind="coral"), lambda z: np.exp(log_sigmoid(z))),
    "corn": (P(exceedance, kind="corn"), lambda z: np.exp(np.cumsum(log_sigmoid(z)))),
    "thurstone": (pairs, lambda z: np.array([normal(z[0], z[2]), normal(z[1], z[3])])),
    "post hoc": (P(post_hoc_adjusted, counts=PRIOR, tau=1.5), lambda z: z - 1.5 * np.log(PRIOR)),
    "risks": (risks, lambda z: TARGETS * (np.logaddexp.reduce(z) - z)),
    "returns": (
        P(discounted_returns, gamma=0.7),
        lambda r: (
            np.array([[0.7 ** max(s - t, 0) * (s >= t) for s in range(4)] for t in range(4)]) @ r
        ),
    ),
}
each = pytest.mark.parametrize(("function", "formula"), READ_OUTS.values(), ids=READ_OUTS)


@each
def test_values_and_jacobians_are_those_of_float64(function, formula):
    jacobian = jax.jit(jax.vmap(jax.jacrev(function)))(ROWS)
    found = jax.jit(jax.vmap(function))(ROWS)
    chex.assert_type(found, jnp.float32)
    for row, values, slopes in zip(ROWS.astype(np.float64), found, jacobian, strict=True):
        np.testing.assert_allclose(values, formula(row), rtol=2e-6, atol=1e-6)
        steps = 1e-5 * np.eye(4)
        expected = [(formula(row + e) - formula(row - e)) / 2e-5 for e in steps]
        np.testing.assert_allclose(slopes, np.transpose(expected), rtol=2e-5, atol=1e-6)


@each
def test_extremes_are_finite_and_true(function, formula):
    extreme = np.array([[1e4, -1e4, 0, 9e3], [-1e4, -1e4, 1e4, 1e4], [1e4] * 4], np.float32)
    found = jax.jit(jax.vmap(function))(extreme)
    expected = [formula(row) for row in extreme.astype(np.float64)]
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=1e-6)
    assert np.isfinite(jax.jit(jax.vmap(jax.jacrev(function)))(extreme)).all()


@each
def test_bfloat16_is_read_in_float32_and_vmap_is_the_loop(function, formula):
    half = jnp.asarray(ROWS, jnp.bfloat16)
    found = jax.vmap(function)(half)
    chex.assert_type(found, jnp.float32)
    looped = [function(row) for row in half.astype(jnp.float32)]
    np.testing.assert_allclose(found, looped, rtol=2e-6, atol=1e-6)
