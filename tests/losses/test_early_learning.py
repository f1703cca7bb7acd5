"""Early-learning regularisation, beside the authors' formula with its clipping."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from regjax.losses.early_learning import early_learning, early_learning_targets
from regjax.losses.tokens import token_cross_entropy

Z = np.array([[2.0, 1.0, 0.1, -1.0], [0.0, 3.0, 1.0, 0.5]], np.float32)
LABELS = np.array([1, 1])
TARGETS = np.array([[0.8, 0.1, 0.05, 0.05], [0.1, 0.2, 0.1, 0.1]], np.float32)

close = functools.partial(np.testing.assert_allclose, rtol=2e-6, atol=2e-7)


def probabilities(logits):
    exact = np.exp(logits.astype(float))
    return exact / exact.sum(axis=-1, keepdims=True)


def test_one_step_of_the_authors_code_where_nothing_is_clipped():
    probs = np.clip(probabilities(Z), 1e-4, 1 - 1e-4)
    updated = 0.7 * TARGETS.astype(float) + 0.3 * probs / probs.sum(axis=1, keepdims=True)
    regularizer = np.log(1 - np.sum(updated * probs, axis=1))
    cross_entropy = -np.log(probabilities(Z)[[0, 1], LABELS])
    targets = early_learning_targets(TARGETS, Z)
    close(targets, updated)
    close(early_learning(Z, LABELS, targets), cross_entropy + 3 * regularizer)
    close(early_learning(Z, LABELS, targets, weight=7.0), cross_entropy + 7 * regularizer)


def test_no_targets_yet_or_no_weight_is_cross_entropy():
    plain = token_cross_entropy(Z, LABELS)
    close(early_learning(Z, LABELS, np.zeros_like(TARGETS)), plain)
    close(early_learning(Z, LABELS, TARGETS, weight=0.0), plain)


def test_the_targets_weaken_the_pull_of_a_label_that_they_contradict():
    slope = jax.grad(lambda z: early_learning(z, 1, TARGETS[0]))(jnp.asarray(Z[0]))
    probs = probabilities(Z[0])
    tilted = probs * (1 - TARGETS[0])
    close(slope, probs - np.eye(4)[1] + 3 * (tilted / tilted.sum() - probs), atol=1e-6)
    plain = jax.grad(lambda z: token_cross_entropy(z, 1))(jnp.asarray(Z[0]))
    assert slope[1] > plain[1] and slope[0] < plain[0]


def test_digits_are_kept_and_the_floor_stops_the_gradient_near_full_agreement():
    sure = np.array([12.0, 0.0, 0.0, 0.0], np.float32)
    targets = np.array([1.0, 0.0, 0.0, 0.0], np.float32)
    rest = 3 * np.exp(-12.0) / (1 + 3 * np.exp(-12.0))  # 2e-5, which 1 - p does not hold
    plain = token_cross_entropy(sure, 1)
    close(early_learning(sure, 1, targets, weight=1.0, floor=0.0) - plain, np.log(rest), rtol=3e-6)
    close(early_learning(sure, 1, targets, weight=1.0) - plain, np.log(1e-4))
    slope = jax.grad(lambda z: early_learning(z, 1, targets))(jnp.asarray(sure))
    np.testing.assert_array_equal(slope, jax.grad(lambda z: token_cross_entropy(z, 1))(sure))


def test_targets_are_a_running_mean_of_the_examples_that_count():
    where = np.array([True, False])
    logits = np.where(where[:, None], Z, np.nan)
    new = early_learning_targets(TARGETS, logits, momentum=0.9, where=where)
    close(new[0], 0.9 * TARGETS[0] + 0.1 * probabilities(Z[0]))
    np.testing.assert_array_equal(new[1], TARGETS[1])
    constant = jnp.zeros(4)
    for step in range(1, 6):
        constant = early_learning_targets(constant, Z[0], momentum=0.5)
        close(constant, (1 - 0.5**step) * probabilities(Z[0]))


def test_no_gradient_into_the_targets():
    into_logits = jax.grad(lambda z: early_learning_targets(TARGETS, z).sum())(jnp.asarray(Z))
    np.testing.assert_array_equal(into_logits, 0.0)
    into_targets = jax.grad(lambda t: early_learning(Z, LABELS, t).sum())(jnp.asarray(TARGETS))
    np.testing.assert_array_equal(into_targets, 0.0)


def test_input_that_does_not_fit_raises():
    with pytest.raises(ValueError, match=r"targets have shape \(4,\), but the logits \(2, 4\)"):
        early_learning(Z, LABELS, TARGETS[0])
    with pytest.raises(TypeError, match="labels must be integers"):
        early_learning(Z, LABELS.astype(float), TARGETS)
    with pytest.raises(TypeError, match="targets must be floating"):
        early_learning(Z, LABELS, TARGETS.astype(int))
    with pytest.raises(ValueError, match=r"floor must lie in \[0, 1\); got 1.0"):
        early_learning(Z, LABELS, TARGETS, floor=1.0)
    with pytest.raises(ValueError, match=r"momentum must lie in \[0, 1\]; got -0.1"):
        early_learning_targets(TARGETS, Z, momentum=-0.1)
    with pytest.raises(ValueError, match=r"targets have shape \(4,\), but the logits \(2, 4\)"):
        early_learning_targets(TARGETS[0], Z)
    with pytest.raises(TypeError, match="logits must be floating"):
        early_learning_targets(TARGETS, Z.astype(int))
