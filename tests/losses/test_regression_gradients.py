"""Gradients of the losses on a score grid: in closed form, and against float64 NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from regjax.losses import expected_risk, number_token, raft
from regjax.scores import TokenGrid
from tests.losses.differences import central_differences

VALUES = np.array([1.0, 2.0, 3.0, 4.0, 5.0], np.float32)
FIRST_FIVE = TokenGrid(np.arange(5, dtype=np.int32)[:, None], np.ones((5, 1), bool), VALUES)
MULTI = TokenGrid(
    tokens=np.array([[1, 5, 0], [2, 0, 0], [1, 0, 4]], np.int32),
    mask=np.array([[1, 1, 0], [1, 0, 0], [1, 1, 1]], bool),
    values=np.array([1.5, 2.0, 10.0], np.float32),
)

close = functools.partial(np.testing.assert_allclose, rtol=2e-6, atol=2e-7)


@functools.cache
def compiled(function, **options):
    return jax.jit(jax.value_and_grad(functools.partial(function, **options)))


def value_and_gradient(function, logits, target, codec, /, **options):
    return compiled(function, **options)(jnp.asarray(logits), target, codec)


@settings(deadline=None, max_examples=25)
@given(hnp.arrays(np.float32, (8,), elements=st.floats(-6, 6, width=32)), st.floats(0, 6))
def test_raft_gradient_in_closed_form(logits, target):
    probs = np.exp(np.asarray(logits, np.float64))
    probs /= probs.sum()
    scores = np.append(VALUES, np.zeros(3))
    on_grid = scores > 0
    prediction = probs @ scores
    expected = 2 * (prediction - target) * probs * (scores - prediction)
    _, gradient = value_and_gradient(raft, logits, target, FIRST_FIVE)
    np.testing.assert_allclose(gradient, expected, rtol=2e-5, atol=2e-5)
    probs = probs * on_grid / probs[on_grid].sum()
    prediction = probs @ scores
    expected = 2 * (prediction - target) * probs * (scores - prediction)
    _, gradient = value_and_gradient(raft, logits, target, FIRST_FIVE, normalize=True)
    np.testing.assert_allclose(gradient, expected, rtol=2e-5, atol=2e-5)
    risk = probs @ (scores - target) ** 2
    expected = probs * ((scores - target) ** 2 - risk)
    _, gradient = value_and_gradient(expected_risk, logits, target, FIRST_FIVE)
    np.testing.assert_allclose(gradient, expected, rtol=2e-5, atol=2e-5)


def float64_probs(logits, codec, normalize):
    if logits.ndim == 1:
        exponentials = np.exp(logits)
        probs = exponentials[codec.tokens[:, 0]] / exponentials.sum()
    else:
        softmax = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        probs = np.array(
            [
                np.prod([softmax[k, t, v] for t, v in enumerate(row) if codec.mask[k, t]])
                for k, row in enumerate(codec.tokens)
            ]
        )
    return probs / probs.sum() if normalize else probs


def float64_error(error, loss, delta):
    if loss == "squared":
        return error**2
    if loss == "absolute":
        return abs(error)
    return error**2 / 2 if abs(error) <= delta else delta * (abs(error) - delta / 2)


def float64_loss(name, logits, target, codec, normalize, loss, delta=0.75):
    probs = float64_probs(logits, codec, normalize)
    values = codec.values.astype(np.float64)
    if name == "raft":
        return float64_error(probs @ values - target, loss, delta)
    return sum(
        prob * float64_error(value - target, loss, delta)
        for prob, value in zip(probs, values, strict=True)
    )


@pytest.mark.parametrize("loss", ["squared", "absolute", "huber"])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("function", [raft, expected_risk])
@pytest.mark.parametrize(("codec", "shape"), [(FIRST_FIVE, (6,)), (MULTI, (3, 3, 6))])
def test_values_and_gradients_against_central_differences(codec, shape, function, normalize, loss):
    rng = np.random.default_rng(0)
    for target in (0.4, 2.6, 7.3):
        logits = rng.normal(size=shape).astype(np.float32)
        reference = functools.partial(
            float64_loss,
            function.__name__,
            target=target,
            codec=codec,
            normalize=normalize,
            loss=loss,
        )
        value, gradient = value_and_gradient(
            function, logits, target, codec, normalize=normalize, loss=loss, delta=0.75
        )
        exact = logits.astype(np.float64)
        expected = central_differences(reference, exact)
        np.testing.assert_allclose(value, reference(exact), rtol=5e-6, atol=1e-6)
        np.testing.assert_allclose(gradient, expected, rtol=5e-5, atol=5e-6)


def test_reweighed_gradient_against_central_differences():
    logits = np.random.default_rng(1).normal(size=6).astype(np.float32)

    def reference(z):
        mass = float64_probs(z, FIRST_FIVE, False).sum()
        risk = float64_loss("risk", z, 2.3, FIRST_FIVE, True, "absolute")
        return mass * risk + 1.01 * 4 * (1 - mass)

    value, gradient = value_and_gradient(number_token, logits, 2.3, FIRST_FIVE, reweigh=True)
    exact = logits.astype(np.float64)
    expected = central_differences(reference, exact)
    close(value, reference(exact))
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-6)
