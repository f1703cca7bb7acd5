"""Distillation from a teacher of which only the most probable classes were kept.

Everywhere q = softmax(teacher / T) and p = softmax(student / T), over all V tokens.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from regjax.losses.checks import check_temperature, floating, mask_of_shape, zero_unless
from regjax.losses.divergence import Divergence, divergence

# Of a sum of float32 probabilities.
_ROUNDING = 4.0 * float(jnp.finfo(jnp.float32).eps)


class TopK(NamedTuple):
    """A teacher's k most probable tokens, what a cache of it keeps."""

    tokens: jax.Array
    """Int32 `[..., k]`."""
    log_probs: jax.Array
    """Float32 `[..., k]`, under the softmax over all V tokens."""
    log_tail: jax.Array
    """Float32 `[...]`, of the probability of all other tokens; -inf where there is none."""


def teacher_top_k(logits: ArrayLike, k: int, *, temperature: ArrayLike = 1.0) -> TopK:
    """The k most probable tokens, their log-probabilities and that of all the others.

        log q_j = teacher[token_j] / T - logsumexp(teacher / T)
        log tail = log sum_{v not among the k} q_v

    Use it to keep a teacher over a large vocabulary in a cache.

    Args:
        logits: `[..., V]`, floating.
        k: from 1 to V.
        temperature: T. What the teacher gives to all other tokens is known at this temperature
            only, so choose here the one that the loss will use.

    Returns:
        `TopK(tokens [..., k], log_probs [..., k], log_tail [...])`, the most probable first.

    Raises:
        TypeError: logits of a type that is not floating.
        ValueError: k out of range.

    References:
        The softmax with a temperature of Hinton, Vinyals, Dean, *Distilling the Knowledge in a
        Neural Network*, 2015, https://arxiv.org/abs/1503.02531, cut to k tokens; no paper is
        followed in that.

    >>> import numpy as np
    >>> teacher = teacher_top_k(np.log([0.1, 0.6, 0.3]), 2)
    >>> teacher.tokens.tolist(), [f"{prob:.4f}" for prob in jnp.exp(teacher.log_probs)]
    ([1, 2], ['0.6000', '0.3000'])
    >>> print(f"{jnp.exp(teacher.log_tail):.4f}")
    0.1000
    """
    check_temperature(temperature)
    logits = floating(logits, "logits")
    if logits.ndim < 1 or not 1 <= k <= logits.shape[-1]:
        raise ValueError(f"k must lie in 1..V; got {k} for logits of shape {logits.shape}")
    all_log_probs = jax.nn.log_softmax(logits / temperature)
    log_probs, tokens = jax.lax.top_k(all_log_probs, k)
    return TopK(tokens, log_probs, _log_total_without(all_log_probs, tokens)[..., 0])


def top_k_distillation(
    student: ArrayLike,
    tokens: ArrayLike,
    log_probs: ArrayLike,
    log_tail: ArrayLike | None = None,
    *,
    temperature: ArrayLike = 1.0,
    kind: Divergence = "forward",
    beta: float = 0.5,
    tail: Literal["bucket", "renormalize"] = "bucket",
    squared_temperature: bool = True,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Divergence of the student from a teacher of which k tokens are known.

        bucket:       T^2 D(q_1, ..., q_k, 1 - sum_j q_j || p_1, ..., p_k, 1 - sum_j p_j)
        renormalize:  T^2 D(q / sum_j q_j || p / sum_j p_j), on the k tokens

    p = softmax(student / T) over all V tokens. With the bucket, all other tokens are one: the loss
    is a divergence of two distributions, so it is never negative, at most the divergence over all V
    (data processing), and equal to it for k = V. `renormalize` does not see how much the student
    gives to the other tokens. The sum over the k tokens alone, without a bucket, is no divergence:
    it becomes negative, and its reverse form falls as the student leaves the k tokens.

    Use it where the teacher's logits over the whole vocabulary are too many to keep.

    Args:
        student: logits `[..., V]`.
        tokens: `[..., k]`, integers below V, each at most once. Negative ones are padding, for
            teachers whose number of tokens varies.
        log_probs: `[..., k]`, of the teacher's tokens under its softmax over all V at temperature
            T, see `teacher_top_k`. No gradient.
        log_tail: `[...]`, of the probability of all other tokens. `None`: one less the k, which
            float32 knows up to 5e-7; a smaller tail counts as that, so that a reverse divergence
            stays finite, and as none where the student has none. Not used by `renormalize`.
        temperature: T of the student, and of the teacher when `log_probs` were taken.
        kind, beta: as in `distillation`.
        tail: `"bucket"` or `"renormalize"`.
        squared_temperature: multiply by T^2.
        where: `[...]`, the examples that count.

    Returns:
        Float32 `[...]`, one loss per example; non-negative.

    Raises:
        TypeError: a student or log-probabilities that are not floating, tokens not integers.
        ValueError: shapes that do not fit; an unknown kind or tail; beta or temperature out of
            range.

    References:
        Renormalised, this is the top-k option of Tunix.

        TRL and others take the student's top-k tokens, or both, where the divergence is not the
        forward one; here they are the teacher's always, as kept in a cache.

    >>> import numpy as np
    >>> teacher = teacher_top_k(np.log([0.6, 0.3, 0.1]), 1)
    >>> print(f"{top_k_distillation(np.log([0.2, 0.4, 0.4]), *teacher):.4f}")
    0.3819
    """
    check_temperature(temperature)
    student = floating(student, "student")
    log_teacher = jax.lax.stop_gradient(floating(log_probs, "log_probs"))
    tokens = jnp.asarray(tokens)
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise TypeError(f"tokens must be integers; got {tokens.dtype} of shape {tokens.shape}")
    if (
        min(student.ndim, tokens.ndim) < 1
        or tokens.shape != log_teacher.shape
        or tokens.shape[:-1] != student.shape[:-1]
    ):
        raise ValueError(
            f"student has shape {student.shape}, tokens {tokens.shape} and log_probs "
            f"{log_teacher.shape}; expected [..., V], [..., k] and [..., k]"
        )
    if log_tail is not None:
        log_tail = jax.lax.stop_gradient(floating(log_tail, "log_tail"))
        if log_tail.shape != student.shape[:-1]:
            raise ValueError(f"log_tail has shape {log_tail.shape}; expected {student.shape[:-1]}")
    if tail not in ("bucket", "renormalize"):
        raise ValueError(f"tail must be 'bucket' or 'renormalize'; got {tail!r}")
    where = mask_of_shape(where, student.shape[:-1])
    student = jax.nn.log_softmax(zero_unless(where, student) / temperature)
    known = tokens >= 0
    if where is not None:
        known = known & where[..., None]
    log_teacher = jnp.where(known, log_teacher, -jnp.inf)
    chosen = jnp.take_along_axis(student, jnp.where(known, tokens, 0), axis=-1)
    log_student = jnp.where(known, chosen, -jnp.inf)
    if tail == "renormalize":
        log_student, log_teacher = _normalize(log_student), _normalize(log_teacher)
    else:
        # Summed, not one less the k tokens: float32 would lose a small one.
        beyond = jnp.where(known, tokens, student.shape[-1])
        student_tail = _log_total_without(student, beyond)
        log_student = jnp.concatenate([log_student, student_tail], axis=-1)
        if log_tail is None:
            teacher_tail = _log_complement(_logsumexp(log_teacher), student_tail == -jnp.inf)
        else:
            teacher_tail = zero_unless(where, log_tail)[..., None]
        # Rounding, for example to bfloat16 in a cache, leaves a sum that is not one.
        log_teacher = _normalize(jnp.concatenate([log_teacher, teacher_tail], axis=-1))
    losses = divergence(log_student, log_teacher, kind, beta)
    if squared_temperature:
        losses = losses * jnp.square(temperature)
    return zero_unless(where, losses)


def _log_total_without(log_probs: jax.Array, tokens: jax.Array) -> jax.Array:
    """Logsumexp `[..., 1]` of all entries but those of `tokens [..., k]`."""
    others = jnp.put_along_axis(log_probs, tokens, -jnp.inf, axis=-1, inplace=False, mode="drop")
    return _logsumexp(others)


def _log_complement(log_mass: jax.Array, empty: jax.Array) -> jax.Array:
    """Log of one less the mass, and at least of what rounding may hide, unless it is `empty`."""
    hidden = log_mass > -_ROUNDING
    rest = jnp.where(hidden, _ROUNDING, -jnp.expm1(jnp.where(hidden, -1.0, log_mass)))
    return jnp.where(empty, -jnp.inf, jnp.log(rest))


def _normalize(log_probs: jax.Array) -> jax.Array:
    log_total = _logsumexp(log_probs)
    return log_probs - jnp.where(log_total == -jnp.inf, 0.0, log_total)


def _logsumexp(log_probs: jax.Array) -> jax.Array:
    """Over the last axis, kept; -inf with a gradient of zero where all are."""
    possible = jnp.any(log_probs != -jnp.inf, axis=-1, keepdims=True)
    log_probs = jnp.where(possible, log_probs, 0.0)
    return jnp.where(possible, jax.nn.logsumexp(log_probs, axis=-1, keepdims=True), -jnp.inf)
