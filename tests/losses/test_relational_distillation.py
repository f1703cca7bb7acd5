"""Correlations of probabilities over classes and batch: published values, scipy's, invariances."""

import jax
import numpy as np
import pytest
from scipy import special, stats

from regjax.losses.relational_distillation import correlation_distillation

F = np.array([[2, 1, 0.1, -1], [0, 1, 2, 0.5], [0.3, -0.2, 0.1, 1.2]], np.float32)
T = np.array([[3, 0.5, 0.2, -0.7], [0.1, 0.8, 2.5, 0], [0, 0, 0.5, 2]], np.float32)

loss = jax.jit(
    correlation_distillation, static_argnames=("inter_weight", "intra_weight", "epsilon")
)


def test_both_parts():
    inter = loss(F, T, intra_weight=0.0)
    intra = loss(F, T, inter_weight=0.0)
    np.testing.assert_allclose(inter.mean(), 0.0239240778, rtol=1e-5)
    np.testing.assert_allclose(intra.mean(), 0.2508251117, rtol=1e-5)
    np.testing.assert_allclose(loss(F, T).mean(), 0.2747491895, rtol=1e-5)
    np.testing.assert_allclose(loss(F, T), inter + intra, rtol=1e-5, atol=1e-6)


def test_scipy_has_the_same_correlations():
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(size=(2, 7, 5)).astype(np.float32)
    p, q = (special.softmax(z.astype(np.float64) / 2, axis=-1) for z in (student, teacher))
    inter = 1 - stats.pearsonr(p, q, axis=1).statistic
    intra = 1 - stats.pearsonr(p, q, axis=0).statistic.mean()
    options = {"temperature": 2.0, "epsilon": 0.0}
    found = loss(student, teacher, intra_weight=0.0, **options)
    np.testing.assert_allclose(found, 4 * inter, rtol=1e-5)
    found = loss(student, teacher, inter_weight=0.0, **options).mean()
    np.testing.assert_allclose(found, 4 * intra, rtol=1e-5)


def test_zero_on_the_teacher_and_on_affine_maps_of_its_probabilities():
    q = special.softmax(T, axis=-1)
    # Toward the uniform distribution: one positive slope and intercept for all.
    softer = np.log(0.3 * q + 0.7 / 4).astype(np.float32)
    # Products of deviations are 0.01 at least, and the epsilon is 1e-8.
    for student in (T, softer):
        np.testing.assert_allclose(loss(student, T), np.zeros(3), atol=5e-6)


def test_the_loss_is_at_most_twice_its_weights():
    away = np.array([[0.0, 5.0], [5.0, 0.0]], np.float32)
    np.testing.assert_allclose(loss(away, away[::-1]), [4.0, 4.0], rtol=1e-5)
    found = loss(away, away[::-1], inter_weight=2.0, intra_weight=0.5)
    np.testing.assert_allclose(found, [5.0, 5.0], rtol=1e-5)


def test_constant_probabilities_have_correlation_zero():
    np.testing.assert_allclose(loss(np.zeros_like(T), T), np.full(3, 2.0), rtol=1e-6)


def test_a_mask_is_a_smaller_batch():
    where = np.array([True, False, True])
    found = correlation_distillation(F, T, where=where)
    np.testing.assert_allclose(found[where], loss(F[where], T[where]), rtol=1e-5, atol=1e-6)
    assert found[1] == 0.0


def test_what_does_not_fit_raises():
    with pytest.raises(ValueError, match=r"student has shape \(4,\); expected \[..., B, K\]"):
        correlation_distillation(F[0], T[0])
    with pytest.raises(ValueError, match="temperature must be positive"):
        correlation_distillation(F, T, temperature=-1.0)
