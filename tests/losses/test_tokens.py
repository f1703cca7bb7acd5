"""Token cross-entropy against optax with a one-hot, and float64 NumPy."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from regjax.losses import token_cross_entropy

V = 7
SMOOTHINGS = [0.0, 0.1, 0.5, 1.0]


def one_hot_cross_entropy(logits, labels, smoothing):
    targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), smoothing)
    return optax.losses.softmax_cross_entropy(logits, targets)


@pytest.mark.parametrize("smoothing", SMOOTHINGS)
@settings(deadline=None, max_examples=15)
@given(
    logits=hnp.arrays(np.float32, (3, 2, V), elements=st.floats(-15, 15, width=32)),
    labels=hnp.arrays(np.int32, (3, 2), elements=st.integers(0, V - 1)),
)
def test_values_and_gradients_equal_those_of_a_smoothed_one_hot(smoothing, logits, labels):
    def total(loss, z):
        losses = loss(z)
        return losses.sum(), losses

    gradient, losses = jax.grad(
        lambda z: total(lambda z: token_cross_entropy(z, labels, label_smoothing=smoothing), z),
        has_aux=True,
    )(logits)
    expected_gradient, expected = jax.grad(
        lambda z: total(lambda z: one_hot_cross_entropy(z, labels, smoothing), z), has_aux=True
    )(logits)
    np.testing.assert_allclose(losses, expected, rtol=2e-6, atol=4e-6)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("smoothing", SMOOTHINGS)
def test_values_and_gradients_in_closed_form(smoothing):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(5, V)).astype(np.float32)
    labels = np.array([0, 6, 3, 3, 2])
    exact = logits.astype(np.float64)
    log_probs = exact - np.log(np.exp(exact).sum(-1, keepdims=True))
    targets = (1 - smoothing) * np.eye(V)[labels] + smoothing / V
    losses = jax.jit(lambda z: token_cross_entropy(z, labels, label_smoothing=smoothing))(logits)
    np.testing.assert_allclose(losses, -(targets * log_probs).sum(-1), rtol=1e-6)
    gradient = jax.grad(lambda z: token_cross_entropy(z, labels, label_smoothing=smoothing).sum())(
        logits
    )
    np.testing.assert_allclose(gradient, np.exp(log_probs) - targets, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_bfloat16_logits_are_read_in_float32(smoothing):
    logits = jnp.asarray(np.random.default_rng(1).normal(size=(4, V)) * 5, jnp.bfloat16)
    labels = np.array([1, 2, 3, 4])

    def loss(z):
        return token_cross_entropy(z, labels, label_smoothing=smoothing)

    chex.assert_type(loss(logits), jnp.float32)
    whole = logits.astype(jnp.float32)
    np.testing.assert_array_equal(loss(logits), loss(whole))
    gradient = jax.grad(lambda z: loss(z).sum())(logits)
    exact = jax.grad(lambda z: loss(z).sum())(whole)
    np.testing.assert_array_equal(gradient, exact.astype(jnp.bfloat16))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_tokens_that_do_not_count_have_zero_loss_and_gradient(smoothing):
    logits = np.random.default_rng(2).normal(size=(3, 4, V)).astype(np.float32)
    labels = np.random.default_rng(3).integers(0, V, (3, 4))
    where = np.random.default_rng(4).random((3, 4)) < 0.5
    broken_logits = np.where(where[..., None], logits, np.nan)
    broken_labels = np.where(where, labels, -100)

    def total(z, y, **options):
        losses = token_cross_entropy(z, y, label_smoothing=smoothing, **options)
        return jnp.sum(losses, where=where), losses

    expected_gradient, expected = jax.grad(total, has_aux=True)(logits, labels)
    gradient, losses = jax.jit(jax.grad(lambda z, y: total(z, y, where=where), has_aux=True))(
        broken_logits, broken_labels
    )
    np.testing.assert_allclose(losses, np.where(where, expected, 0.0), rtol=1e-6)
    np.testing.assert_array_equal(losses[~where], 0.0)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(gradient[~where], 0.0)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, np.int64])
def test_labels_outside_the_vocabulary_give_nan_and_only_there(dtype):
    labels = np.array([0, 120, 119, 121, 127], dtype)
    losses = jax.jit(token_cross_entropy)(jnp.zeros((5, 120)), labels)
    np.testing.assert_array_equal(np.isnan(losses), [False, True, False, True, True])
    np.testing.assert_allclose(losses[::2][:2], np.log(120), rtol=1e-6)


def test_negative_labels_do_not_count_from_the_end():
    losses = token_cross_entropy(jnp.zeros((3, 200)), np.array([-1, -100, 199], np.int16))
    np.testing.assert_array_equal(np.isnan(losses), [True, True, False])
    small = token_cross_entropy(jnp.zeros((2, 200)), np.array([-1, 5], np.int8))
    np.testing.assert_array_equal(np.isnan(small), [True, False])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_extreme_and_impossible_logits_keep_finite_gradients(smoothing):
    logits = np.concatenate([1e4 * np.eye(V), np.where(np.eye(V), -np.inf, 0.0)])
    labels = np.arange(2 * V) % V
    gradient = jax.grad(
        lambda z: token_cross_entropy(z, (labels + 1) % V, label_smoothing=smoothing).sum()
    )(jnp.asarray(logits, jnp.float32))
    assert np.isfinite(gradient).all()
    np.testing.assert_allclose(gradient.sum(-1), 0.0, atol=1e-6)
    if smoothing == 0.0:
        losses = token_cross_entropy(logits, labels)
        np.testing.assert_array_equal(losses[:V], 0.0)
        np.testing.assert_array_equal(losses[V:], np.inf)


def test_vmap_equals_the_batch():
    logits = np.random.default_rng(5).normal(size=(4, V))
    labels = np.array([1, 2, 3, 4])
    np.testing.assert_allclose(
        jax.vmap(token_cross_entropy)(logits, labels),
        token_cross_entropy(logits, labels),
        rtol=1e-6,
    )


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((np.zeros((2, V), int), np.zeros(2, int)), {}, TypeError, "logits must be floating"),
        ((np.zeros((2, V)), np.zeros(2)), {}, TypeError, r"integers; got float\d+ of shape \(2,\)"),
        ((np.zeros((2, V)), np.zeros(2, bool)), {}, TypeError, "integers; got bool"),
        (
            (np.zeros((2, V)), np.zeros((2, 1), int)),
            {},
            ValueError,
            r"labels .*\(2, 1\); expected \(2,\)",
        ),
        (
            (np.zeros((2, V)), np.zeros((1,), int)),
            {},
            ValueError,
            r"labels .*\(1,\); expected \(2,\)",
        ),
        ((np.float32(0), np.zeros((), int)), {}, ValueError, "logits must have shape.*a scalar"),
        (
            (np.zeros((2, V)), np.zeros(2, int)),
            {"where": True},
            ValueError,
            r"where has shape \(\)",
        ),
        (
            (np.zeros((2, V)), np.zeros(2, int)),
            {"label_smoothing": 1.1},
            ValueError,
            r"\[0, 1\]; got 1.1",
        ),
    ],
)
def test_input_that_does_not_fit_raises(arguments, options, error, message):
    with pytest.raises(error, match=message):
        token_cross_entropy(*arguments, **options)
