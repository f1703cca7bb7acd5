"""Distillation of a teacher's hidden features, already projected to the student's shape."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from regjax.losses.checks import zero_unless
from regjax.losses.divergence import student_and_teacher
from regjax.losses.standardization import centred_and_squares, root, scaled


def pearson_features(
    student: ArrayLike,
    teacher: ArrayLike,
    *,
    epsilon: float = 1e-6,
    teacher_gradient: bool = False,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Half the mean squared difference of features standardised per channel.

        loss = mean_pd (s_pd - t_pd)^2 / 2 = mean_d (1 - r_d)

    s and t have mean zero and variance one over the positions p, and r_d is Pearson's correlation
    of channel d. A channel that is constant over the positions becomes zero, so it costs nothing
    where both are constant and 1/2 where one is.

    Use it for feature maps of which the pattern counts and not the scale, as in object detectors.

    Args:
        student: features `[..., P, D]`, P positions of D channels.
        teacher: features `[..., P, D]`.
        epsilon: added to the standard deviations.
        teacher_gradient: let the gradient into the teacher.
        where: `[..., P]`, the positions that count.

    Returns:
        Float32 `[...]`, from 0 to 2, one loss per example; 0 without positions.

    Raises:
        TypeError: features of a type that is not floating.
        ValueError: shapes that do not fit.

    References:
        Cao et al., *PKD: General Distillation Framework for Object Detectors via Pearson
        Correlation Coefficient*, NeurIPS 2022, https://arxiv.org/abs/2207.02039; the formula is
        from memory of it.

        MMRazor's code standardises over the positions of the whole batch, which is this of features
        reshaped to `[B P, D]`, and with n - 1: (n - 1) / n of this loss.

    >>> import numpy as np
    >>> features = np.array([[1.0, 0.0], [2.0, 1.0], [3.0, 0.0]])
    >>> print(f"{pearson_features(features, 5.0 + features * [2.0, -1.0]):.4f}")
    1.0000
    """
    student, teacher, where = student_and_teacher(
        student, teacher, where, teacher_gradient=teacher_gradient
    )
    if student.ndim < 2:
        raise ValueError(f"student has shape {student.shape}; expected [..., P, D]")
    counted = jnp.ones(student.shape[:-1], bool) if where is None else where
    count = jnp.maximum(jnp.sum(counted, axis=-1), 1)
    standardized = []
    for features in (student, teacher):
        centred, squares = centred_and_squares(features, axis=-2, where=counted[..., None])
        standardized.append(scaled(centred, squares / count[..., None, None], epsilon))
    squared = jnp.square(standardized[0] - standardized[1])
    return squared.mean(axis=-1).sum(axis=-1) / (2.0 * count)


def patient_features(
    student: ArrayLike,
    teacher: ArrayLike,
    *,
    normalize: bool = True,
    teacher_gradient: bool = False,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Squared distance of the directions of paired hidden states, summed over the layers.

        loss = sum_m || s_m / |s_m| - t_m / |t_m| ||^2 = sum_m 2 (1 - cos(s_m, t_m))

    Which layers of the teacher are paired with the student's, every k-th or the last, and the
    weight of this loss are the caller's. For plain cosine distances see
    `optax.losses.cosine_distance`.

    Use it for a student of fewer layers than the teacher, beside `labelled_distillation`.

    Args:
        student: states `[..., M, D]` of M layers, usually at the first token.
        teacher: states `[..., M, D]`.
        normalize: compare directions; else the states themselves. A state of zeros has the
            direction zero, and no gradient.
        teacher_gradient: let the gradient into the teacher.
        where: `[..., M]`, the layers that count.

    Returns:
        Float32 `[...]`, one loss per example.

    Raises:
        TypeError: states of a type that is not floating.
        ValueError: shapes that do not fit.

    References:
        Sun, Cheng, Gan, Liu, *Patient Knowledge Distillation for BERT Model Compression*, EMNLP
        2019, https://arxiv.org/abs/1908.09355; the formula is from memory of it.

        Public code takes the mean over all M D elements where this sums.

    >>> import numpy as np
    >>> print(f"{patient_features(np.array([[1.0, 0.0]]), np.array([[0.0, 3.0]])):.4f}")
    2.0000
    """
    student, teacher, where = student_and_teacher(
        student, teacher, where, teacher_gradient=teacher_gradient
    )
    if student.ndim < 2:
        raise ValueError(f"student has shape {student.shape}; expected [..., M, D]")
    if normalize:
        student, teacher = _direction(student), _direction(teacher)
    return zero_unless(where, jnp.square(student - teacher).sum(axis=-1)).sum(axis=-1)


def _direction(states: jax.Array) -> jax.Array:
    # Divided by the largest entry first, so that no square overflows or vanishes.
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(states), axis=-1, keepdims=True))
    states = states / jnp.where(largest > 0.0, largest, 1.0)
    length = root(jnp.sum(jnp.square(states), axis=-1, keepdims=True))
    return jnp.where(length > 0.0, states / jnp.where(length > 0.0, length, 1.0), 0.0)
