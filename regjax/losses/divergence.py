"""Divergences between two distributions, and the student and teacher that have them."""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from regjax.losses.checks import check_range, floating, mask_of_shape, zero_unless

Divergence: TypeAlias = Literal["forward", "reverse", "jensen_shannon", "skew"]

# d + exp(-d) - 1 over d squared, to float32 precision for |d| < 1/2; the highest power first.
_SERIES = tuple((-1) ** n / math.factorial(n) for n in range(8, 1, -1))


def divergence(
    log_student: jax.Array, log_teacher: jax.Array, kind: Divergence, beta: float
) -> jax.Array:
    """Divergence `[...]` of two arrays `[..., K]` of log-probabilities; see `distillation`.

    Every KL(a || b) is summed as a d + b - a with d = log a - log b, each term non-negative, and by
    its power series where d is small. `optax.losses.kl_divergence_with_log_targets` sums a d, whose
    terms cancel: of a divergence below 1e-7, as at high temperatures, float32 keeps no digit, and
    log-probabilities of -inf give NaN.
    """
    check_range(beta, "beta", 0.0, 1.0)
    impossible = (log_student == -jnp.inf) & (log_teacher == -jnp.inf)
    ratio = jnp.where(impossible, 0.0, log_teacher) - jnp.where(impossible, 0.0, log_student)
    student, teacher = jnp.exp(log_student), jnp.exp(log_teacher)
    if kind in ("jensen_shannon", "skew"):
        if 0.0 < beta < 1.0:
            mixture = beta * teacher + (1.0 - beta) * student
            log_beta, log_rest = math.log(beta), math.log1p(-beta)
            teacher_ratio = -jnp.logaddexp(log_beta, log_rest - ratio)
            student_ratio = -jnp.logaddexp(log_rest, log_beta + ratio)
            of_teacher = _kl_terms(teacher, mixture, teacher_ratio)
            of_student = _kl_terms(student, mixture, student_ratio)
            weight = beta if kind == "jensen_shannon" else 1.0 - beta
            return jnp.sum(weight * of_teacher + (1.0 - weight) * of_student, axis=-1)
        kind = "forward" if beta == 0.0 else "reverse"
    if kind == "forward":
        return jnp.sum(_kl_terms(teacher, student, ratio), axis=-1)
    if kind == "reverse":
        return jnp.sum(_kl_terms(student, teacher, -ratio), axis=-1)
    raise ValueError(f"kind must be 'forward', 'reverse', 'jensen_shannon' or 'skew'; got {kind!r}")


@jax.custom_jvp
def kl_of_logits(first: jax.Array, second: jax.Array) -> jax.Array:
    """KL(q || p) `[...]`, as `divergence`, with q and p the softmaxes of two arrays `[..., K]`.

    Its derivatives are q (log q - log p - KL) and p - q: nothing of a term has to be kept for them.
    """
    return divergence(jax.nn.log_softmax(second), jax.nn.log_softmax(first), "forward", 0.5)


def _by_first(
    tangent: jax.Array, losses: jax.Array, first: jax.Array, second: jax.Array
) -> jax.Array:
    log_q, log_p = jax.nn.log_softmax(first), jax.nn.log_softmax(second)
    q = jnp.exp(log_q)
    slopes = jnp.where(q > 0.0, q * (log_q - log_p - losses[..., None]), 0.0)
    return jnp.sum(slopes * tangent, axis=-1)


def _by_second(
    tangent: jax.Array, losses: jax.Array, first: jax.Array, second: jax.Array
) -> jax.Array:
    q, p = jnp.exp(jax.nn.log_softmax(first)), jnp.exp(jax.nn.log_softmax(second))
    return jnp.sum((p - q) * tangent, axis=-1)


kl_of_logits.defjvps(_by_first, _by_second)


def student_and_teacher(
    student: ArrayLike,
    teacher: ArrayLike,
    where: ArrayLike | None,
    *,
    teacher_gradient: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Both in float32 and of one shape `[..., K]`, zero where `where [...]` is false."""
    student, teacher = floating(student, "student"), floating(teacher, "teacher")
    if student.ndim < 1 or student.shape != teacher.shape:
        raise ValueError(
            f"student has shape {student.shape} and teacher {teacher.shape}; expected one shape, "
            "[..., K]"
        )
    if not teacher_gradient:
        teacher = jax.lax.stop_gradient(teacher)
    where = mask_of_shape(where, student.shape[:-1])
    # Before the arithmetic as well as after it: the gradient of an ignored NaN would be NaN.
    return zero_unless(where, student), zero_unless(where, teacher), where


def _kl_terms(first: jax.Array, second: jax.Array, ratio: jax.Array) -> jax.Array:
    """Terms of KL(first || second), `ratio` the log of their quotient."""
    near = jnp.abs(ratio) < 0.5
    small = jnp.where(near, ratio, 0.0)
    series = small**2 * jnp.polyval(jnp.asarray(_SERIES, jnp.float32), small)
    # Zero times a ratio of infinity is zero here.
    ratio = jnp.where(near | (first == 0.0), 0.0, ratio)
    return jnp.where(near, first * series, first * ratio + (second - first))
