"""What holds for every distillation loss, on one table: value, gradients, masks, types, shapes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.losses.differences import central_differences
from tests.losses.distillation_cases import CASES

cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def inputs(case, seed=0, scale=1.5):
    rng = np.random.default_rng(seed)
    student, teacher = (scale * rng.normal(size=case.shape).astype(np.float32) for _ in range(2))
    where = np.ones(case.shape[:-1], bool)
    return student, teacher, where


def half_mask(case):
    """Two of every five left out, at the front, in the middle and at the end."""
    where = np.arange(np.prod(case.shape[:-1])) % 5
    return ~np.isin(where, (0, 3)).reshape(case.shape[:-1])


@functools.cache
def compiled(name, **options):
    """Losses, and the gradients of their weighted sum with respect to student and teacher."""
    case = next(case for case in CASES if case.name == name)

    def total(student, teacher, where, weights):
        losses = case.loss(student, teacher, where, **options)
        return jnp.sum(losses * weights), losses

    def both(student, teacher, where, weights):
        gradients, losses = jax.grad(total, (0, 1), has_aux=True)(student, teacher, where, weights)
        return losses, *gradients

    return jax.jit(both)


def losses_and_gradients(case, student, teacher, where, **options):
    weights = weights_of(case.name)
    return [np.asarray(x) for x in compiled(case.name, **options)(student, teacher, where, weights)]


@functools.cache
def weights_of(name):
    case = next(case for case in CASES if case.name == name)
    logits = jax.ShapeDtypeStruct(case.shape, jnp.float32)
    shape = jax.eval_shape(lambda s, t: case.loss(s, t, None), logits, logits).shape
    return np.random.default_rng(7).uniform(0.5, 1.5, shape).astype(np.float32)


def rounding(gradient):
    """Entries are sums of terms as large as the largest of them."""
    return 1e-5 + 2e-6 * np.abs(gradient).max()


@cases
@pytest.mark.parametrize("mask", [False, True], ids=["whole", "masked"])
def test_values_and_gradients_are_those_of_float64(case, mask):
    student, teacher, where = inputs(case)
    if mask:
        where = half_mask(case)
    losses, gradient, teacher_gradient = losses_and_gradients(case, student, teacher, where)
    exact, exact_teacher = student.astype(np.float64), teacher.astype(np.float64)
    expected = case.reference(exact, exact_teacher, where)
    # Terms of the size of the logits times the squared temperature cancel in the losses.
    np.testing.assert_allclose(losses, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(teacher_gradient, np.zeros(case.shape))
    if case.surrogate:
        return
    weights = weights_of(case.name)
    expected = central_differences(
        lambda z: np.sum(weights * case.reference(z, exact_teacher, where)), exact
    )
    np.testing.assert_allclose(gradient, expected, rtol=2e-5, atol=rounding(expected))
    assert np.abs(expected[where]).max() > 1e-3


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.into_teacher], ids=lambda case: case.name
)
def test_the_teacher_gets_its_gradient_where_asked(case):
    student, teacher, _ = inputs(case, seed=1)
    where = half_mask(case)
    losses, _, gradient = losses_and_gradients(case, student, teacher, where, teacher_gradient=True)
    exact, exact_teacher = student.astype(np.float64), teacher.astype(np.float64)
    weights = weights_of(case.name)
    expected = central_differences(
        lambda z: np.sum(weights * case.reference(exact, z, where)), exact_teacher
    )
    np.testing.assert_allclose(losses, case.reference(exact, exact_teacher, where), 1e-5, 1e-5)
    np.testing.assert_allclose(gradient, expected, rtol=2e-5, atol=rounding(expected))


@cases
@pytest.mark.parametrize("junk", [np.nan, np.inf, -np.inf])
def test_what_is_masked_changes_nothing_even_if_it_is_not_finite(case, junk):
    student, teacher, _ = inputs(case, seed=2)
    where = half_mask(case)
    expected = losses_and_gradients(case, student, teacher, where)
    student[~where], teacher[~where] = junk, junk
    found = losses_and_gradients(case, student, teacher, where)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(found[1][~where], 0.0)
    if found[0].shape == where.shape:
        np.testing.assert_array_equal(found[0][~where], 0.0)


@cases
def test_all_masked_is_zero_with_zero_gradients(case):
    junk = np.full(case.shape, np.nan, np.float32)
    where = np.zeros(case.shape[:-1], bool)
    for found in losses_and_gradients(case, junk, junk, where):
        np.testing.assert_array_equal(found, np.zeros_like(found))


@cases
def test_extreme_logits_stay_finite_and_true(case):
    rng = np.random.default_rng(3)
    width = case.shape[-1]
    values = np.array([1e4, -1e4, 1e4 - 1, 0.0, -300.0, 9e3], np.float32)[:width]
    student, teacher = (
        np.stack([rng.permutation(values) for _ in range(np.prod(case.shape[:-1]))])
        .reshape(case.shape)
        .astype(np.float32)
        for _ in range(2)
    )
    where = np.ones(case.shape[:-1], bool)
    losses, gradient, _ = losses_and_gradients(case, student, teacher, where)
    assert np.isfinite(gradient).all()
    expected = case.reference(student.astype(np.float64), teacher.astype(np.float64), where)
    assert np.isfinite(expected).all()
    # Integer labels: the difference of two numbers of 1e4.
    np.testing.assert_allclose(losses, expected, rtol=1e-5, atol=1e4 * np.finfo(np.float32).eps)


@cases
def test_a_student_equal_to_its_teacher_has_finite_gradients(case):
    student, _, where = inputs(case, seed=4)
    constant = np.zeros_like(student)
    for point in (student, constant):
        losses, gradient, _ = losses_and_gradients(case, point, point, where)
        assert np.isfinite(losses).all()
        assert np.isfinite(gradient).all()


@cases
def test_bfloat16_is_read_in_float32_and_without_a_mask_all_count(case):
    student, teacher, where = inputs(case, seed=5)
    student, teacher = jnp.asarray(student, jnp.bfloat16), jnp.asarray(teacher, jnp.bfloat16)

    def total(student, teacher):
        losses = case.loss(student, teacher, None)
        return jnp.sum(losses * weights_of(case.name)), losses

    gradient, losses = jax.jit(jax.grad(total, has_aux=True))(student, teacher)
    assert (losses.dtype, gradient.dtype) == (jnp.float32, jnp.bfloat16)
    wide = student.astype(jnp.float32), teacher.astype(jnp.float32)
    expected, slopes, _ = losses_and_gradients(case, *wide, where)
    np.testing.assert_allclose(losses, expected, rtol=5e-6, atol=5e-6)
    # One rounding of the gradient to eight bits.
    np.testing.assert_allclose(
        gradient.astype(jnp.float32), slopes, rtol=2**-8, atol=rounding(slopes)
    )


@cases
def test_vmap_equals_the_loop(case):
    student, teacher, _ = (np.stack(x) for x in zip(inputs(case, 5), inputs(case, 6), strict=True))
    where = np.stack([half_mask(case), np.ones(case.shape[:-1], bool)])
    found = jax.jit(jax.vmap(case.loss))(student, teacher, where)
    for row in range(2):
        expected, *_ = losses_and_gradients(case, student[row], teacher[row], where[row])
        np.testing.assert_allclose(found[row], expected, rtol=2e-6, atol=1e-6)


@cases
def test_what_does_not_fit_raises_by_name(case):
    student, teacher, where = inputs(case)
    with pytest.raises(TypeError, match=r"(student|logits) must be floating; got int"):
        case.loss(student.astype(int), teacher, where)
    with pytest.raises(ValueError, match=r"where has shape \(7,\)"):
        case.loss(student, teacher, np.ones(7, bool))
    if case.takes_teacher:
        with pytest.raises(TypeError, match=r"(teacher|logits) must be floating; got int"):
            case.loss(student, teacher.astype(int), where)
        with pytest.raises(ValueError, match=r"student has shape \(.*teacher \("):
            case.loss(student[..., :-1], teacher, where)
