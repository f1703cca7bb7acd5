"""Noise-robust losses: values of public code's formulas, limits, symmetry."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from regjax.losses.noise_robust import (
    active_passive,
    bootstrapping,
    generalized_cross_entropy,
    normalized_cross_entropy,
    reverse_cross_entropy,
    squentropy,
    symmetric_cross_entropy,
)
from regjax.losses.tokens import token_cross_entropy

Z = np.array([2.0, 1.0, 0.1, -1.0], np.float32)
PROBS = np.array([0.6380663511, 0.2347314927, 0.0954347031, 0.0317674530])
CROSS_ENTROPIES = np.array([0.4493130024, 1.4493130024, 2.3493130024, 3.4493130024])

close = functools.partial(np.testing.assert_allclose, rtol=2e-6, atol=2e-7)


def all_labels(loss, **options):
    return loss(np.tile(Z, (4, 1)), np.arange(4), **options)


def test_published_values():
    close(
        all_labels(generalized_cross_entropy, q=1.0),
        [0.3619336, 0.7652685, 0.9045653, 0.9682325],
        atol=1e-7,
    )
    close(
        all_labels(generalized_cross_entropy),
        [0.3855144, 0.9106046, 1.1527066, 1.3008424],
        atol=1e-7,
    )
    close(all_labels(reverse_cross_entropy), [3.3335321, 7.0483834, 8.3313543, 8.9177513])
    close(all_labels(symmetric_cross_entropy), [3.3784634, 7.1933147, 8.5662856, 9.2626826])
    close(
        all_labels(normalized_cross_entropy),
        [0.0583732, 0.1882897, 0.3052145, 0.4481227],
        atol=1e-7,
    )
    close(all_labels(bootstrapping), [0.4748810, 1.4248810, 2.2798810, 3.3248810])
    close(
        all_labels(bootstrapping, kind="hard", label_weight=0.8),
        [0.4493130, 1.2493130, 1.9693130, 2.8493130],
    )


def test_truncation_at_a_half():
    cap = 0.5491825619
    truncated = functools.partial(generalized_cross_entropy, q=0.7, threshold=0.5)
    close(all_labels(truncated), [0.3855144, cap, cap, cap], atol=1e-7)
    slopes = jax.vmap(jax.grad(truncated), (None, 0))(jnp.asarray(Z), np.arange(4))
    plain = jax.grad(generalized_cross_entropy)(jnp.asarray(Z), 0)
    np.testing.assert_array_equal(slopes[0], plain)
    np.testing.assert_array_equal(slopes[1:], 0.0)


def test_truncation_of_cross_entropy_and_its_edge():
    losses = all_labels(generalized_cross_entropy, q=0.0, threshold=0.2)
    close(losses, np.minimum(CROSS_ENTROPIES, -np.log(0.2)))
    # p_y = k exactly is pruned.
    edge = functools.partial(generalized_cross_entropy, q=1.0, threshold=0.5)
    np.testing.assert_array_equal(jax.grad(edge)(jnp.zeros(2), 0), 0.0)


def test_generalized_cross_entropy_between_cross_entropy_and_the_absolute_error():
    close(all_labels(generalized_cross_entropy, q=0.0), CROSS_ENTROPIES)
    close(all_labels(generalized_cross_entropy, q=1e-6), CROSS_ENTROPIES, rtol=1e-5)
    close(all_labels(generalized_cross_entropy, q=1.0), 1 - PROBS)
    # The gradient is p_y^q times that of cross-entropy.
    slope = jax.grad(generalized_cross_entropy)(jnp.asarray(Z), 1)
    close(slope, PROBS[1] ** 0.7 * (PROBS - np.eye(4)[1]))


def test_symmetric_losses_sum_to_a_constant_over_the_labels():
    rng = np.random.default_rng(0)
    for scale in (0.1, 3.0, 30.0):
        logits = np.tile(scale * rng.normal(size=5), (5, 1))
        labels = np.arange(5)
        close(generalized_cross_entropy(logits, labels, q=1.0).sum(), 4.0)
        close(reverse_cross_entropy(logits, labels).sum(), 4 * 9.2103404)
        close(reverse_cross_entropy(logits, labels, log_zero=-4.0).sum(), 16.0)
        close(normalized_cross_entropy(logits, labels).sum(), 1.0)
        close(active_passive(logits, labels).sum(), 1.0 + 4 * 9.2103404)
        both = active_passive(
            logits, labels, active_weight=10, passive_weight=0.1, passive="absolute_error"
        )
        close(both.sum(), 10.4)


def test_sums_of_losses_are_sums():
    cross_entropy = all_labels(token_cross_entropy)
    reverse = all_labels(reverse_cross_entropy)
    normalized = all_labels(normalized_cross_entropy)
    close(
        all_labels(symmetric_cross_entropy, forward_weight=6.0, reverse_weight=0.1),
        6 * cross_entropy + 0.1 * reverse,
    )
    close(
        all_labels(symmetric_cross_entropy, forward_weight=6.0, reverse_weight=0.0),
        6 * CROSS_ENTROPIES,
    )
    close(all_labels(symmetric_cross_entropy, log_zero=-4.0, forward_weight=0.0), 4 * (1 - PROBS))
    close(all_labels(active_passive), normalized + reverse)
    close(
        all_labels(active_passive, active_weight=10.0, passive_weight=0.1),
        10 * normalized + 0.1 * reverse,
    )
    close(
        all_labels(active_passive, log_zero=-4.0, passive_weight=0.5), normalized + 2 * (1 - PROBS)
    )
    close(all_labels(active_passive, passive="absolute_error"), normalized + (1 - PROBS))


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_bootstrapping_with_the_label_alone_is_cross_entropy(kind):
    close(all_labels(bootstrapping, kind=kind, label_weight=1.0), CROSS_ENTROPIES)
    weights = np.array([1.0, 0.5, 0.0, 1.0], np.float32)
    own = all_labels(bootstrapping, kind=kind, label_weight=0.0)
    close(own, np.full(4, 0.9606727901 if kind == "soft" else CROSS_ENTROPIES[0]))
    mixed = all_labels(bootstrapping, kind=kind, label_weight=weights)
    close(mixed, weights * CROSS_ENTROPIES + (1 - weights) * own)


def test_the_gradient_of_soft_bootstrapping_into_its_target():
    slope = jax.grad(lambda z: bootstrapping(z, 1, label_weight=0.6))(jnp.asarray(Z))
    of_entropy = -PROBS * (np.log(PROBS) + 0.9606727901)
    close(slope, 0.6 * (PROBS - np.eye(4)[1]) + 0.4 * of_entropy)
    constant = jax.grad(lambda z: bootstrapping(z, 1, label_weight=0.6, target_gradient=False))
    close(constant(jnp.asarray(Z)), 0.6 * (PROBS - np.eye(4)[1]))


def test_soft_bootstrapping_with_an_impossible_class():
    logits = jnp.array([1.0, 0.0, -jnp.inf])
    loss, slope = jax.value_and_grad(bootstrapping)(logits, 0)
    probs = np.exp([1.0, 0.0]) / np.exp([1.0, 0.0]).sum()
    close(loss, -0.95 * np.log(probs[0]) - 0.05 * probs @ np.log(probs))
    assert np.isfinite(slope).all()


def test_squentropy_sees_the_level_of_the_logits_and_keeps_its_digits():
    close(squentropy(Z, 0), CROSS_ENTROPIES[0] + (1.0 + 0.01 + 1.0) / 3)
    close(squentropy(Z + 1.0, 0), CROSS_ENTROPIES[0] + (4.0 + 1.21 + 0.0) / 3)
    close(squentropy(np.array([1e4, 1.0, 2.0], np.float32), 0), 2.5)


@pytest.mark.parametrize(
    ("loss", "options", "message"),
    [
        (generalized_cross_entropy, {"q": 1.5}, r"q must lie in \[0, 1\]; got 1.5"),
        (generalized_cross_entropy, {"threshold": -1}, r"threshold must lie in \[0, 1\]; got -1"),
        (reverse_cross_entropy, {"log_zero": 4.0}, "log_zero must be below zero; got 4.0"),
        (symmetric_cross_entropy, {"log_zero": 0.0}, "log_zero must be below zero; got 0.0"),
        (active_passive, {"passive": "mae"}, "'absolute_error'; got 'mae'"),
        (bootstrapping, {"kind": "medium"}, "'soft' or 'hard'; got 'medium'"),
        (bootstrapping, {"label_weight": np.ones(2)}, r"label_weight has shape \(2,\)"),
    ],
)
def test_options_that_do_not_fit_raise(loss, options, message):
    with pytest.raises(ValueError, match=message):
        loss(Z, 0, **options)
