"""Distillation that trusts the teacher by class: AdaAlpha and AdaMargin, reconstructed.

Lukasik, Bhojanapalli, Menon, Kumar, *Teacher's pet: understanding and mitigating biases in
distillation*, TMLR 2022, https://arxiv.org/abs/2106.10494, soften the teacher's influence for
classes on which it is unreliable, by adaptive mixing weights and by adaptive margins. Only its
abstract was at hand, and no public code was found: everything below is a reconstruction from
memory. Where more than one reading is plausible, the readings are options, and no result of the
paper is claimed for any of them.

Everywhere q = softmax(teacher / T), with T `teacher_temperature`, which softens the teacher, not
the student; y is the label. The teacher never gets a gradient.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from regjax.losses.checks import (
    check_temperature,
    class_labels,
    floating,
    mask_of_shape,
    zero_unless,
)
from regjax.losses.divergence import student_and_teacher
from regjax.losses.tokens import token_cross_entropy


def teacher_margins(
    teacher: ArrayLike,
    labels: ArrayLike,
    *,
    margin: Literal["max", "average"] = "max",
    teacher_temperature: ArrayLike = 1.0,
    where: ArrayLike | None = None,
) -> jax.Array:
    """By how much the teacher prefers the label to the other classes.

        max:      q_y - max_{k != y} q_k                      in (-1, 1]
        average:  q_y - mean_{k != y} q_k = (K q_y - 1) / (K - 1)   in [-1 / (K - 1), 1]

    They are equal for K = 2; otherwise the first is the smaller. Take them on held-out examples: a
    teacher that interpolates its training set has margins of one there.

    Use them to see where the teacher can be trusted.

    Args:
        teacher: logits `[..., K]`, K at least 2.
        labels: y `[...]`, integers from 0 to K - 1. Any other gives NaN.
        margin: `"max"` or `"average"`; which of them the paper uses is not known here.
        teacher_temperature: T.
        where: `[...]`, the examples that count; zero elsewhere.

    Returns:
        Float32 `[...]`, without gradient.

    Raises:
        TypeError: logits that are not floating, labels that are not integers.
        ValueError: shapes that do not fit, an unknown margin, a temperature out of range.

    References:
        Lukasik, Bhojanapalli, Menon, Kumar, *Teacher's pet: understanding and mitigating biases in
        distillation*, TMLR 2022, https://arxiv.org/abs/2106.10494, reconstructed: only its abstract
        was at hand.

    >>> import numpy as np
    >>> teacher = np.log([[0.7, 0.2, 0.1], [0.5, 0.3, 0.2]])
    >>> [f"{margin:.4f}" for margin in teacher_margins(teacher, np.array([0, 1]))]
    ['0.5000', '-0.2000']
    """
    check_temperature(teacher_temperature)
    teacher = jax.lax.stop_gradient(floating(teacher, "teacher"))
    if teacher.ndim < 1 or teacher.shape[-1] < 2:
        raise ValueError(f"teacher has shape {teacher.shape}; expected [..., K], K at least 2")
    count = teacher.shape[-1]
    labels = class_labels(labels, teacher.shape[:-1], count)
    where = mask_of_shape(where, labels.shape)
    if where is not None:
        labels = jnp.where(where, labels, 0)
    probs = jax.nn.softmax(zero_unless(where, teacher) / teacher_temperature)
    of_label = jnp.take_along_axis(probs, labels[..., None], axis=-1)[..., 0]
    others = jnp.where(jnp.arange(count) == labels[..., None], 0.0, probs)
    if margin == "max":
        margins = of_label - others.max(axis=-1)
    elif margin == "average":
        margins = of_label - others.sum(axis=-1) / (count - 1)
    else:
        raise ValueError(f"margin must be 'max' or 'average'; got {margin!r}")
    return zero_unless(where, margins)


def class_margins(
    margins: ArrayLike, labels: ArrayLike, num_classes: int, *, where: ArrayLike | None = None
) -> jax.Array:
    """Mean margin of every class over the held-out examples that have its label.

        gamma_k = mean_{i: y_i = k} margin_i

    Use them as the gamma of `adaptive_mixing` and `margin_offsets`.

    Args:
        margins: `[...]` of examples, see `teacher_margins`.
        labels: `[...]`, integers; those outside 0..C - 1 do not count.
        num_classes: C.
        where: `[...]`, the examples that count.

    Returns:
        Float32 `[C]`. A class without examples has zero: its teacher is not trusted.

    Raises:
        TypeError: margins that are not floating, labels that are not integers.
        ValueError: shapes that do not fit.

    References:
        Lukasik, Bhojanapalli, Menon, Kumar, *Teacher's pet: understanding and mitigating biases in
        distillation*, TMLR 2022, https://arxiv.org/abs/2106.10494, reconstructed: only its abstract
        was at hand.

    >>> import numpy as np
    >>> gammas = class_margins(np.array([0.5, 0.2, 0.4]), np.array([0, 0, 1]), 3)
    >>> [f"{gamma:.2f}" for gamma in gammas]
    ['0.35', '0.40', '0.00']
    """
    margins = floating(margins, "margins")
    labels = class_labels(labels, margins.shape, num_classes)
    where = mask_of_shape(where, margins.shape)
    counted = jnp.ones(margins.shape, bool) if where is None else where
    of_class = (jnp.arange(num_classes) == labels[..., None]) & counted[..., None]
    examples = tuple(range(margins.ndim))
    totals = jnp.sum(jnp.where(of_class, margins[..., None], 0.0), axis=examples)
    return totals / jnp.maximum(jnp.sum(of_class, axis=examples), 1)


def adaptive_mixing(
    student: ArrayLike,
    teacher: ArrayLike,
    labels: ArrayLike,
    class_margins: ArrayLike | None = None,
    *,
    margin: Literal["max", "average"] = "max",
    clip: tuple[float, float] = (0.0, 1.0),
    teacher_temperature: ArrayLike = 1.0,
    where: ArrayLike | None = None,
) -> jax.Array:
    """AdaAlpha, reconstructed: the teacher's weight is its margin on the label's class.

        loss = (1 - a) CE(y) + a sum_k q_k CE(k),    CE(k) = -log softmax(student)_k
        a = clip(gamma_y)

    So cross-entropy with the target (1 - a) onehot + a q.

    Use it where the teacher is unreliable on some classes, rare ones say, and there are labels.

    Args:
        student: logits `[..., K]`.
        teacher: logits `[..., K]`.
        labels: y `[...]`, integers from 0 to K - 1. Any other gives NaN.
        class_margins: gamma `[K]`, the reading in which margins are means over held-out examples
            of a class, see the function `class_margins`. `None`, the other reading: gamma_y is
            this teacher's margin on this example.
        margin: `"max"` or `"average"`, if gamma is taken from this example.
        clip: the smallest and the largest a.
        teacher_temperature: T.
        where: `[...]`, the examples that count.

    Returns:
        Float32 `[...]`, one loss per example.

    Raises:
        TypeError: logits that are not floating, labels that are not integers.
        ValueError: shapes that do not fit, an unknown margin, a range that is none within [0, 1].

    References:
        Lukasik, Bhojanapalli, Menon, Kumar, *Teacher's pet: understanding and mitigating biases in
        distillation*, TMLR 2022, https://arxiv.org/abs/2106.10494, reconstructed: only its abstract
        was at hand.

    >>> import numpy as np
    >>> student, teacher = np.log([0.5, 0.5]), np.log([0.8, 0.2])
    >>> gammas = np.array([0.6, -0.1])
    >>> print(f"{adaptive_mixing(student, teacher, 0, gammas):.4f}")
    0.6931
    """
    smallest, largest = clip
    if not 0.0 <= smallest <= largest <= 1.0:
        raise ValueError(f"clip must be a range within [0, 1]; got {clip}")
    check_temperature(teacher_temperature)
    student, teacher, where = student_and_teacher(student, teacher, where)
    labels = class_labels(labels, student.shape[:-1], student.shape[-1])
    if class_margins is None:
        margins = teacher_margins(
            teacher, labels, margin=margin, teacher_temperature=teacher_temperature
        )
    else:
        of_class = jax.lax.stop_gradient(floating(class_margins, "class_margins"))
        if of_class.shape != student.shape[-1:]:
            raise ValueError(
                f"class_margins has shape {of_class.shape}; expected {student.shape[-1:]}"
            )
        margins = jnp.take(of_class, labels, mode="fill")
    weight = jnp.clip(margins, smallest, largest)
    probs = jax.nn.softmax(teacher / teacher_temperature)
    soft = optax.losses.safe_softmax_cross_entropy(student, probs)
    hard = token_cross_entropy(student, labels, where=where)
    return zero_unless(where, (1.0 - weight) * hard + weight * soft)


def margin_offsets(class_margins: ArrayLike, *, smallest: float = 0.05) -> jax.Array:
    """Offsets log w of the classes for `adaptive_margin`, from the teacher's margins on them.

        log w_k = -log max(gamma_k, smallest)

    The less the teacher separates a class, the larger the margin by which the student must. This map
    is one plausible reading: that of the paper is not known here.

    Use them for `adaptive_margin`, or any other offsets in their place.

    Args:
        class_margins: gamma `[..., K]`, see the function `class_margins`.
        smallest: smaller margins count as this one; it bounds the offsets, and is a choice made
            here.

    Returns:
        Float32 `[..., K]`. A constant added to all offsets of an example changes no loss.

    Raises:
        TypeError: margins that are not floating.
        ValueError: `smallest` not positive.

    References:
        Lukasik, Bhojanapalli, Menon, Kumar, *Teacher's pet: understanding and mitigating biases in
        distillation*, TMLR 2022, https://arxiv.org/abs/2106.10494, reconstructed: only its abstract
        was at hand.

    >>> import numpy as np
    >>> [f"{offset:.4f}" for offset in margin_offsets(np.array([1.0, 0.5, -0.3]))]
    ['-0.0000', '0.6931', '2.9957']
    """
    if not smallest > 0.0:
        raise ValueError(f"smallest must be positive; got {smallest}")
    return -jnp.log(jnp.maximum(floating(class_margins, "class_margins"), smallest))


def adaptive_margin(
    student: ArrayLike,
    teacher: ArrayLike,
    offsets: ArrayLike | None = None,
    *,
    margins: ArrayLike | None = None,
    teacher_temperature: ArrayLike = 1.0,
    where: ArrayLike | None = None,
) -> jax.Array:
    """AdaMargin, reconstructed: distillation with margins between the classes.

        loss = sum_k q_k log sum_j exp(m_kj + f_j - f_k),    m_kk = 0,    f = student

    With `offsets` log w, m_kj = log w_k - log w_j, and the loss is the cross-entropy of q with the
    shifted logits f - log w, its gradient softmax(f - log w) - q. With `margins`, m is given as it
    is. Zero margins give `distillation` with `kind="cross_entropy"`.

    Use it where the teacher separates some classes badly and the student is to do better on them.

    Args:
        student: logits `[..., K]`.
        teacher: logits `[..., K]`.
        offsets: log w, `[K]`, or `[..., K]` for margins of the example; see `margin_offsets`.
        margins: m `[K, K]`, row k the margins that class k must keep; not together with `offsets`.
            The loss then holds an array `[..., K, K]`.
        teacher_temperature: T.
        where: `[...]`, the examples that count.

    Returns:
        Float32 `[...]`, one loss per example; no gradient for offsets and margins.

    Raises:
        TypeError: logits, offsets or margins that are not floating.
        ValueError: shapes that do not fit; both or neither of `offsets` and `margins`.

    References:
        Lukasik, Bhojanapalli, Menon, Kumar, *Teacher's pet: understanding and mitigating biases in
        distillation*, TMLR 2022, https://arxiv.org/abs/2106.10494, reconstructed: only its abstract
        was at hand.

    >>> import numpy as np
    >>> student, teacher = np.log([0.5, 0.5]), np.log([0.8, 0.2])
    >>> print(f"{adaptive_margin(student, teacher, np.log([1.0, 2.0])):.4f}")
    0.5441
    """
    check_temperature(teacher_temperature)
    student, teacher, where = student_and_teacher(student, teacher, where)
    probs = jax.nn.softmax(teacher / teacher_temperature)
    count = student.shape[-1]
    if (offsets is None) == (margins is None):
        raise ValueError("adaptive_margin needs either offsets or margins")
    if offsets is not None:
        shift = jax.lax.stop_gradient(floating(offsets, "offsets"))
        if shift.shape not in ((count,), student.shape):
            raise ValueError(
                f"offsets have shape {shift.shape}; expected {(count,)} or {student.shape}"
            )
        return zero_unless(where, optax.losses.safe_softmax_cross_entropy(student - shift, probs))
    assert margins is not None
    between = jax.lax.stop_gradient(floating(margins, "margins"))
    if between.shape != (count, count):
        raise ValueError(f"margins have shape {between.shape}; expected {(count, count)}")
    log_totals = jax.nn.logsumexp(between + student[..., None, :], axis=-1)
    possible = probs > 0.0
    needed = jnp.where(possible, log_totals, 0.0) - jnp.where(possible, student, 0.0)
    return zero_unless(where, jnp.sum(probs * needed, axis=-1))
