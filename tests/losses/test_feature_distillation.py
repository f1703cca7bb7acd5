"""Feature losses: correlations of scipy, cosines of optax, and what is constant or zero."""

import jax
import numpy as np
import optax
import pytest
from scipy import stats

from regjax.losses.feature_distillation import patient_features, pearson_features

RNG = np.random.default_rng(0)
STUDENT, TEACHER = RNG.normal(size=(2, 3, 8, 5)).astype(np.float32)


def test_pearson_is_one_less_the_mean_correlation_of_the_channels():
    expected = 1 - stats.pearsonr(STUDENT, TEACHER, axis=1).statistic.mean(-1)
    np.testing.assert_allclose(pearson_features(STUDENT, TEACHER), expected, rtol=1e-4)


def test_pearson_sees_neither_shift_nor_scale_of_a_channel():
    moved = STUDENT * np.array([0.5, 2, 3, 10, 1], np.float32) + 4.0
    np.testing.assert_allclose(pearson_features(moved, STUDENT), np.zeros(3), atol=1e-6)
    np.testing.assert_allclose(pearson_features(-moved, STUDENT), np.full(3, 2.0), rtol=1e-5)


def test_torch_standardises_with_one_less():
    torch = pytest.importorskip("torch")
    flat = [torch.tensor(x.reshape(-1, 5)) for x in (STUDENT, TEACHER)]
    student, teacher = ((x - x.mean(0)) / (x.std(0) + 1e-6) for x in flat)
    expected = torch.nn.functional.mse_loss(student, teacher) / 2
    found = pearson_features(STUDENT.reshape(-1, 5), TEACHER.reshape(-1, 5))
    np.testing.assert_allclose(found * 23 / 24, expected, rtol=1e-5)


def test_a_constant_channel_costs_a_half_in_one_and_nothing_in_both():
    student, teacher = STUDENT[0].copy(), STUDENT[0].copy()
    student[:, 1] = 2.0
    value, gradient = jax.value_and_grad(pearson_features)(student, teacher)
    np.testing.assert_allclose(value, 0.5 / 5, rtol=1e-4)
    assert np.isfinite(gradient).all()
    teacher[:, 1] = -1.0
    np.testing.assert_allclose(pearson_features(student, teacher), 0.0, atol=1e-7)


def test_patient_is_twice_the_cosine_distances_of_the_layers():
    expected = 2 * optax.losses.cosine_distance(STUDENT, TEACHER).sum(-1)
    np.testing.assert_allclose(patient_features(STUDENT, TEACHER), expected, rtol=1e-5)


def test_torch_has_the_same_patience():
    torch = pytest.importorskip("torch")
    student = torch.tensor(STUDENT, requires_grad=True)
    normalize = torch.nn.functional.normalize
    expected = torch.nn.functional.mse_loss(
        normalize(student, dim=-1), normalize(torch.tensor(TEACHER), dim=-1), reduction="sum"
    )
    expected.backward()
    value, gradient = jax.value_and_grad(lambda s: patient_features(s, TEACHER).sum())(STUDENT)
    np.testing.assert_allclose(value, expected.item(), rtol=1e-5)
    np.testing.assert_allclose(gradient, student.grad, rtol=1e-4, atol=1e-6)


def test_directions_do_not_depend_on_sizes_that_squares_cannot_hold():
    expected = patient_features(STUDENT, TEACHER)
    for size in (1e-30, 1e30):
        found = patient_features(np.float32(size) * STUDENT, TEACHER)
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_state_of_zeros_has_no_direction_and_no_gradient():
    student = STUDENT[0].copy()
    student[2] = 0.0
    gradient = jax.grad(patient_features)(student, TEACHER[0])
    np.testing.assert_array_equal(gradient[2], 0.0)
    others = [0, 1, 3, 4, 5, 6, 7]
    expected = 1.0 + patient_features(student[others], TEACHER[0][others])
    np.testing.assert_allclose(patient_features(student, TEACHER[0]), expected, rtol=1e-5)


@pytest.mark.parametrize("function", [pearson_features, patient_features])
def test_features_need_two_dimensions(function):
    with pytest.raises(ValueError, match=r"student has shape \(5,\)"):
        function(STUDENT[0, 0], TEACHER[0, 0])
