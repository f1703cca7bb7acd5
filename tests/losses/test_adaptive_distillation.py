"""Margins of a teacher by class, the mixing weights and the margins made of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import special

from regjax.losses import token_cross_entropy
from regjax.losses.adaptive_distillation import (
    adaptive_margin,
    adaptive_mixing,
    class_margins,
    margin_offsets,
    teacher_margins,
)
from regjax.losses.distillation import distillation

TEACHER = np.log(
    np.array(
        [[0.7, 0.2, 0.1], [0.5, 0.3, 0.2], [0.2, 0.6, 0.2], [0.3, 0.4, 0.3], [0.5, 0.3, 0.2]],
        np.float32,
    )
)
LABELS = np.array([0, 0, 1, 1, 2])
F = np.array([2.0, 1.0, 0.1, -1.0], np.float32)
T = np.array([3.0, 0.5, 0.2, -0.7], np.float32)
close = functools.partial(np.testing.assert_allclose, rtol=3e-6, atol=3e-7)


@pytest.mark.parametrize(
    ("margin", "each", "classes"),
    [
        ("max", [0.5, 0.2, 0.4, 0.1, -0.3], [0.35, 0.25, -0.3]),
        ("average", [0.55, 0.25, 0.40, 0.10, -0.20], [0.40, 0.25, -0.20]),
    ],
)
def test_margins_of_examples_and_classes(margin, each, classes):
    found = teacher_margins(TEACHER, LABELS, margin=margin)
    close(found, each)
    gammas = class_margins(found, LABELS, 3)
    close(gammas, classes)
    # The weights are the margins, none below zero: pure labels for the last class.
    student = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    weights = np.maximum(classes, 0.0)[LABELS]
    expected = (1 - weights) * token_cross_entropy(student, LABELS)
    expected += weights * distillation(student, TEACHER, kind="cross_entropy")
    close(adaptive_mixing(student, TEACHER, LABELS, gammas), expected)
    close(expected[4], token_cross_entropy(student[4], 2))


@settings(deadline=None, max_examples=30)
@given(hnp.arrays(np.float32, (5, 4), elements=st.floats(-9, 9, width=32)), st.integers(0, 3))
def test_the_ranges_of_the_margins(teacher, label):
    labels = np.full(5, label)
    largest = teacher_margins(teacher, labels)
    average = teacher_margins(teacher, labels, margin="average")
    slack = 1e-6
    assert np.all(largest <= average + slack)
    assert np.all((largest > -1) & (largest <= 1) & (average <= 1))
    assert np.all(average >= -1 / 3 - slack)
    probs = special.softmax(teacher.astype(np.float64), axis=-1)[:, label]
    np.testing.assert_allclose(average, (4 * probs - 1) / 3, rtol=1e-5, atol=1e-6)


def test_of_two_classes_the_margins_are_equal():
    teacher = np.random.default_rng(1).normal(size=(6, 2)).astype(np.float32)
    labels = np.arange(6) % 2
    close(
        teacher_margins(teacher, labels),
        teacher_margins(teacher, labels, margin="average"),
    )


def test_a_softer_teacher_has_smaller_margins():
    probs = special.softmax(TEACHER / 3, axis=-1)
    found = teacher_margins(TEACHER, LABELS, teacher_temperature=3.0)
    close(found[0], probs[0, 0] - probs[0, 1])


def test_class_margins_leave_out_what_does_not_count():
    margins = np.array([0.5, np.nan, 0.1, 0.3, np.inf], np.float32)
    labels = np.array([0, 0, 2, 2, -1])
    where = np.array([True, False, True, True, True])
    close(class_margins(margins, labels, 4, where=where), [0.5, 0.0, 0.2, 0.0])
    close(class_margins(margins.reshape(1, 5), labels[None], 3, where=where[None]), [0.5, 0, 0.2])


def test_the_ends_of_the_mixing_weight():
    rows, teachers, labels = np.stack([F, F]), np.stack([T, -T]), np.array([0, 3])
    none = adaptive_mixing(rows, teachers, labels, np.zeros(4, np.float32))
    close(none, token_cross_entropy(rows, labels))
    whole = adaptive_mixing(rows, teachers, labels, np.ones(4, np.float32))
    close(whole, distillation(rows, teachers, kind="cross_entropy"))
    mixed = adaptive_mixing(rows, teachers, labels, np.zeros(4, np.float32), clip=(0.3, 0.6))
    close(mixed, 0.7 * none + 0.3 * whole)
    assert adaptive_mixing(F, T, 0, np.float32([0.9, 0, 0, 0]), clip=(0.0, 0.5)) == pytest.approx(
        float(0.5 * none[0] + 0.5 * whole[0]), rel=1e-6
    )


def test_a_sure_teacher_a_uniform_one_and_the_labels_agree():
    sure = np.where(np.arange(4) == 1, 0.0, -np.inf).astype(np.float32)
    for teacher in (sure, np.zeros(4, np.float32)):
        for margin in ("max", "average"):
            close(adaptive_mixing(F, teacher, 1, margin=margin), token_cross_entropy(F, 1))


def test_the_gradient_is_that_of_one_mixed_target():
    gammas = np.float32([0.4, 0.1, 0.2, 0.9])
    gradient = jax.grad(lambda z: adaptive_mixing(z, T, 3, gammas))(F)
    target = 0.1 * np.eye(4)[3] + 0.9 * special.softmax(T)
    np.testing.assert_allclose(gradient, special.softmax(F) - target, rtol=1e-5, atol=1e-6)


def test_zero_margins_are_plain_distillation_and_constants_change_nothing():
    expected = distillation(F, T, kind="cross_entropy")
    close(adaptive_margin(F, T, np.zeros(4, np.float32)), expected)
    close(adaptive_margin(F, T, np.full(4, 2.5, np.float32)), expected)
    close(adaptive_margin(F, T, margins=np.zeros((4, 4), np.float32)), expected)


def test_the_margin_losses_of_given_class_weights():
    weights = np.float32([0.1, 0.2, 0.3, 0.4]) / np.float32([0.4, 0.3, 0.2, 0.1])
    offsets = np.log(weights)
    sure = np.where(np.eye(4), 0.0, -np.inf).astype(np.float32)
    rows = np.stack([F] * 4)
    expected = [0.1535744442, 2.1344036972, 3.8453339134, 5.9261631664]
    close(adaptive_margin(rows, sure, offsets), expected)
    close(adaptive_margin(F, T, offsets), 0.6073281328)
    between = offsets[:, None] - offsets
    close(adaptive_margin(rows, sure, margins=between), expected)
    close(adaptive_margin(F, T, margins=between), 0.6073281328)
    gradient = jax.grad(lambda z: adaptive_margin(z, T, offsets))(F)
    np.testing.assert_allclose(
        gradient, special.softmax(F - offsets) - special.softmax(T), rtol=1e-5, atol=1e-6
    )


def test_offsets_of_an_example_are_those_of_its_class_set_alone():
    rng = np.random.default_rng(2)
    students, teachers, offsets = rng.normal(size=(3, 5, 4)).astype(np.float32)
    found = adaptive_margin(students, teachers, offsets)
    each = [adaptive_margin(*row) for row in zip(students, teachers, offsets, strict=True)]
    close(found, each)
    masked = np.where(np.arange(5)[:, None] == 2, np.nan, offsets)
    where = np.arange(5) != 2
    gradient = jax.grad(lambda z: adaptive_margin(z, teachers, masked, where=where).sum())(students)
    assert np.isfinite(gradient).all()
    np.testing.assert_array_equal(gradient[2], 0.0)


def test_a_class_separated_less_must_be_separated_more():
    gammas = np.float32([0.8, 0.2, 0.5, -0.4])
    offsets = margin_offsets(gammas, smallest=0.1)
    close(offsets, -np.log([0.8, 0.2, 0.5, 0.1]))
    sure = np.where(np.eye(4), 0.0, -np.inf).astype(np.float32)
    losses = adaptive_margin(np.zeros((4, 4), np.float32), sure, offsets)
    assert np.argsort(losses).tolist() == [0, 2, 1, 3]


def test_a_margin_takes_the_place_of_a_difference_of_logits():
    sure = np.where(np.arange(4) == 2, 0.0, -np.inf).astype(np.float32)
    margins = np.zeros((4, 4), np.float32)
    margins[2, 0] = 1.5
    raised = F + np.float32([1.5, 0, 0, 0])
    close(adaptive_margin(F, sure, margins=margins), token_cross_entropy(raised, 2))
    close(adaptive_margin(F, sure, margins=margins.T), token_cross_entropy(F, 2))


def test_neither_teacher_nor_margins_get_a_gradient():
    def total(teacher, gammas, between):
        mixed = adaptive_mixing(F, teacher, 0, gammas) + adaptive_mixing(F, teacher, 0)
        offsets = adaptive_margin(F, teacher, gammas)
        margins = teacher_margins(teacher, 0)
        return mixed + offsets + adaptive_margin(F, teacher, margins=between) + margins

    arguments = T, np.float32([0.4, 0.1, 0.2, 0.9]), np.ones((4, 4), np.float32)
    for gradient in jax.grad(total, (0, 1, 2))(*arguments):
        np.testing.assert_array_equal(gradient, np.zeros_like(gradient))


def test_labels_out_of_range_give_nan_and_only_there():
    rows, labels = np.stack([F] * 3), np.array([-1, 0, 4])
    for found in (
        teacher_margins(rows, labels),
        adaptive_mixing(rows, rows, labels),
        adaptive_mixing(rows, rows, labels, np.zeros(4, np.float32)),
    ):
        np.testing.assert_array_equal(np.isnan(found), [True, False, True])


@pytest.mark.parametrize("margin", ["max", "average"])
def test_margins_of_certain_teachers_and_of_half_precision(margin):
    certain = np.float32(1e4) * np.eye(4, dtype=np.float32)
    close(teacher_margins(certain, np.arange(4), margin=margin), np.ones(4))
    wrong = -1.0 if margin == "max" else -1 / 3
    close(teacher_margins(certain, (np.arange(4) + 1) % 4, margin=margin), np.full(4, wrong))
    half = jnp.asarray(TEACHER, jnp.bfloat16)
    found = jax.vmap(lambda t, y: teacher_margins(t, y, margin=margin))(half, LABELS)
    assert found.dtype == jnp.float32
    close(found, teacher_margins(half.astype(jnp.float32), LABELS, margin=margin))


def test_masked_margins_are_zero():
    teacher = np.stack([T, np.full(4, np.nan, np.float32)])
    found = teacher_margins(teacher, np.array([0, -100]), where=np.array([True, False]))
    close(found, [special.softmax(T)[0] - special.softmax(T)[1], 0.0])


@pytest.mark.parametrize(
    ("function", "arguments", "options", "error", "message"),
    [
        (teacher_margins, (T, 0), {"margin": "min"}, ValueError, "margin must be .*'min'"),
        (teacher_margins, (T[:1], 0), {}, ValueError, r"teacher has shape \(1,\)"),
        (teacher_margins, (T, 0), {"teacher_temperature": 0.0}, ValueError, "positive; got 0.0"),
        (teacher_margins, (T, 0.5), {}, TypeError, "labels must be integers"),
        (class_margins, (LABELS, LABELS, 3), {}, TypeError, "margins must be floating"),
        (class_margins, (T, LABELS, 3), {}, ValueError, r"labels have shape \(5,\)"),
        (adaptive_mixing, (F, T, 0), {"clip": (0.5, 1.2)}, ValueError, r"clip .*\(0.5, 1.2\)"),
        (adaptive_mixing, (F, T, 0), {"margin": "min"}, ValueError, "margin must be .*'min'"),
        (adaptive_mixing, (F, T, 0, F[:2]), {}, ValueError, r"class_margins has shape \(2,\)"),
        (adaptive_margin, (F, T), {}, ValueError, "either offsets or margins"),
        (adaptive_margin, (F, T, F), {"margins": F}, ValueError, "either offsets or margins"),
        (adaptive_margin, (F, T, F[:2]), {}, ValueError, r"offsets have shape \(2,\)"),
        (adaptive_margin, (F, T), {"margins": F}, ValueError, r"margins have shape \(4,\)"),
        (margin_offsets, (F,), {"smallest": 0.0}, ValueError, "smallest must be positive"),
        (margin_offsets, (LABELS,), {}, TypeError, "class_margins must be floating"),
    ],
)
def test_input_that_does_not_fit_raises(function, arguments, options, error, message):
    with pytest.raises(error, match=message):
        function(*arguments, **options)


def test_margins_under_jit_are_the_same():
    found = jax.jit(lambda t, y: class_margins(teacher_margins(t, y), y, 3))(TEACHER, LABELS)
    close(found, [0.35, 0.25, -0.3])
    assert found.dtype == jnp.float32
