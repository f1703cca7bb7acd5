"""Distillation of the teacher's relations instead of its probabilities."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from regjax.losses.checks import check_temperature, zero_unless
from regjax.losses.divergence import student_and_teacher
from regjax.losses.standardization import centred_and_squares, root


def correlation_distillation(
    student: ArrayLike,
    teacher: ArrayLike,
    *,
    inter_weight: float = 1.0,
    intra_weight: float = 1.0,
    temperature: ArrayLike = 1.0,
    epsilon: float = 1e-8,
    teacher_gradient: bool = False,
    where: ArrayLike | None = None,
) -> jax.Array:
    """DIST: correlations of the probabilities over the classes, and over the batch.

        mean_i loss_i = T^2 (beta (1 - mean_i r(p_i., q_i.)) + gamma (1 - mean_k r(p_.k, q_.k)))

    with p, q `[B, K]` and r Pearson's correlation. The first is already one number per example. The
    correlations over the batch are divided among its examples: 1 - r = sum_i (a_i - b_i)^2 / 2 with
    a, b the centred columns at length one, of which example i gets its own term times B. So average
    these losses with equal weights, and note that the batch that is given here, not the one that is
    accumulated over micro-batches or devices, is the one that is correlated: make it large. For
    T = 1 and equal weights the mean lies between 0, if all q are one increasing affine map of p,
    and 4.

    Use it where the teacher is much stronger than the student, which then need not match its
    probabilities, only how they vary together.

    Args:
        student: logits `[..., B, K]`.
        teacher: logits `[..., B, K]`.
        inter_weight: beta.
        intra_weight: gamma.
        temperature: T, of both softmaxes.
        epsilon: added to the product of the two standard deviations, times the count, of a
            correlation, as in the authors' code. Constant probabilities so have correlation zero;
            with many classes raise the temperature or lower this, since probabilities of 1e-5 vary
            by less.
        teacher_gradient: let the gradient into the teacher.
        where: `[..., B]`, the examples that count.

    Returns:
        Float32 `[..., B]`, one loss per example.

    Raises:
        TypeError: logits of a type that is not floating.
        ValueError: shapes that do not fit, a temperature out of range.

    References:
        Huang, You, Wang, Qian, Xu, *Knowledge Distillation from A Stronger Teacher*, NeurIPS 2022,
        https://arxiv.org/abs/2205.10536.

        The authors' code adds cross-entropy, left to the caller here; T with its square is that of
        torchdistill.

    >>> import numpy as np
    >>> student = np.array([[2.0, 1.0, 0.1], [0.0, 1.0, 2.0]])
    >>> teacher = np.array([[3.0, 0.5, 0.2], [0.1, 0.8, 2.5]])
    >>> print(f"{correlation_distillation(student, teacher).mean():.4f}")
    0.0205
    """
    check_temperature(temperature)
    student, teacher, where = student_and_teacher(
        student, teacher, where, teacher_gradient=teacher_gradient
    )
    if student.ndim < 2:
        raise ValueError(f"student has shape {student.shape}; expected [..., B, K]")
    counted = jnp.ones(student.shape[:-1], bool) if where is None else where
    probs = jax.nn.softmax(student / temperature), jax.nn.softmax(teacher / temperature)
    shares, rest = _decorrelation(*probs, axis=-1, epsilon=epsilon)
    inter = rest[..., 0] + shares.sum(axis=-1)
    shares, rest = _decorrelation(*probs, axis=-2, epsilon=epsilon, where=counted[..., None])
    intra = jnp.mean(rest + counted.sum(axis=-1)[..., None, None] * shares, axis=-1)
    losses = jnp.square(temperature) * (inter_weight * inter + intra_weight * intra)
    return zero_unless(where, losses)


def _decorrelation(
    first: jax.Array,
    second: jax.Array,
    *,
    axis: int,
    epsilon: float,
    where: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Shares of the entries in one less the correlation over `axis`, and what epsilon adds to it.

    With unit vectors a, b it is sum (a - b)^2 / 2, which is zero entry by entry where a = b.
    """
    first, first_squares = centred_and_squares(first, axis=axis, where=where)
    second, second_squares = centred_and_squares(second, axis=axis, where=where)
    lengths = root(first_squares), root(second_squares)
    product = lengths[0] * lengths[1]
    first, second = (
        array / jnp.where(length > 0.0, length, 1.0)
        for array, length in zip((first, second), lengths, strict=True)
    )
    kept = jnp.where(product > 0.0, product / jnp.where(product > 0.0, product + epsilon, 1.0), 0.0)
    return kept * jnp.square(first - second) / 2.0, 1.0 - kept
