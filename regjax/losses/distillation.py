"""Distillation of a teacher's distribution over classes or tokens into a student's.

Everywhere `student` and `teacher` are logits `[..., K]` of the same classes, of any floating type;
log-probabilities are logits too. q and p are their softmaxes at the same temperature T,

    q = softmax(teacher / T),    p = softmax(student / T)

A teacher gets no gradient unless `teacher_gradient=True`. Logits of -inf, classes that cannot be,
count as zero probability. An example that `where` leaves out has a loss and a gradient of exactly
zero, even if its logits are not finite.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from regjax.losses.checks import (
    check_range,
    check_temperature,
    class_labels,
    floating,
    zero_unless,
)
from regjax.losses.divergence import Divergence, divergence, kl_of_logits, student_and_teacher
from regjax.losses.tokens import token_cross_entropy


def distillation(
    student: ArrayLike,
    teacher: ArrayLike,
    *,
    temperature: ArrayLike = 1.0,
    kind: Divergence | Literal["cross_entropy"] = "forward",
    beta: float = 0.5,
    squared_temperature: bool = True,
    teacher_gradient: bool = False,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Divergence of the student's distribution p from the teacher's q.

        forward:         T^2 KL(q || p)
        reverse:         T^2 KL(p || q)
        jensen_shannon:  T^2 (beta KL(q || m) + (1 - beta) KL(p || m)),  m = beta q + (1 - beta) p
        skew:            T^2 ((1 - beta) KL(q || m) + beta KL(p || m)),  the same m
        cross_entropy:   T^2 sum_k -q_k log p_k = forward + T^2 H(q)

    With respect to the student's logits, the gradient of the forward divergence and of the
    cross-entropy is T (p - q). As T grows, T^2 KL tends to the mean squared difference of the
    centred logits over two.

    At beta = 0 and 1 `jensen_shannon` is the forward and the reverse divergence, as in TRL and
    Liger, though its formula tends to zero there: it jumps. `skew` is continuous, from forward to
    reverse. At beta = 1/2 both are the symmetric divergence, at most log 2 for T = 1.

    `cross_entropy` at T = 1, with the previous generation's logits on the same crop as teacher, is
    the loss of label refinery.

    Use forward where the student is to cover all that the teacher finds probable, reverse where it
    is to keep to the teacher's most probable classes, the others between the two.

    Args:
        student: logits `[..., K]`.
        teacher: logits `[..., K]`.
        temperature: T, a positive number; an array, for example of a schedule, is not checked.
        kind: the divergence.
        beta: from 0 to 1, the teacher's share of the mixture m. Not used by the other kinds.
        squared_temperature: multiply by T^2, so that the gradient keeps its size as T grows. TRL's
            generalized Jensen-Shannon loss does not.
        teacher_gradient: let the gradient into the teacher, as for mutual learning.
        where: `[...]`, the examples that count.

    Returns:
        Float32 `[...]`, one loss per example; non-negative.

    Raises:
        TypeError: logits of a type that is not floating.
        ValueError: shapes that do not fit, an unknown kind, beta or temperature out of range.

    References:
        Hinton, Vinyals, Dean, *Distilling the Knowledge in a Neural Network*, 2015,
        https://arxiv.org/abs/1503.02531.
        Agarwal et al., *On-Policy Distillation of Language Models*, ICLR 2024,
        https://arxiv.org/abs/2306.13649, generalized Jensen-Shannon divergence.
        Bagherinezhad, Horton, Rastegari, Farhadi, *Label Refinery*, 2018,
        https://arxiv.org/abs/1805.02641.

        The weights of Hinton's two terms belong to the caller, or see `labelled_distillation`.
        Differs from `torch.nn.functional.kl_div(reduction="mean")`, which also divides by the
        number of classes. ms-swift's generalized Jensen-Shannon loss is `skew`; verl's recipe keeps
        the formula of `jensen_shannon` and moves beta = 1 to 1 - 1e-6, where it is nearly zero.
        The temperature of TRL's GKD is that of the samples, its loss has none.

    >>> import numpy as np
    >>> student, teacher = np.log([0.5, 0.5]), np.log([0.8, 0.2])
    >>> print(f"{distillation(student, teacher):.4f}")
    0.1927
    >>> print(f"{distillation(student, teacher, kind='reverse'):.4f}")
    0.2231
    >>> print(f"{distillation(student, teacher, temperature=4.0):.4f}")
    0.2367
    """
    check_temperature(temperature)
    check_range(beta, "beta", 0.0, 1.0)
    student, teacher, where = student_and_teacher(
        student, teacher, where, teacher_gradient=teacher_gradient
    )
    student, teacher = student / temperature, teacher / temperature
    if kind == "cross_entropy":
        losses = optax.losses.safe_softmax_cross_entropy(student, jax.nn.softmax(teacher))
    elif kind == "forward":
        losses = kl_of_logits(teacher, student)
    elif kind == "reverse":
        losses = kl_of_logits(student, teacher)
    else:
        losses = divergence(jax.nn.log_softmax(student), jax.nn.log_softmax(teacher), kind, beta)
    if squared_temperature:
        losses = losses * jnp.square(temperature)
    return zero_unless(where, losses)


def hard_distillation(
    student: ArrayLike,
    teacher: ArrayLike,
    *,
    label_smoothing: float = 0.0,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Cross-entropy with the class that the teacher finds most probable.

        loss = -log p_c,    c = argmax_k teacher_k,    p = softmax(student)

    Use it where of the teacher only its answers are to be had.

    Args:
        student: logits `[..., K]`.
        teacher: logits or probabilities `[..., K]`; of equal largest ones, the first.
        label_smoothing: a of the target (1 - a) onehot + a / K, as in `token_cross_entropy`. The
            rate e of big_vision, which spreads e over the other classes only, is a = e K / (K - 1).
        where: `[...]`, the examples that count.

    Returns:
        Float32 `[...]`, one loss per example.

    Raises:
        TypeError, ValueError: as `distillation`; smoothing out of range.

    References:
        Touvron et al., *Training data-efficient image transformers & distillation through
        attention*, ICML 2021, https://arxiv.org/abs/2012.12877.

    >>> import numpy as np
    >>> print(f"{hard_distillation(np.log([0.5, 0.5]), np.log([0.8, 0.2])):.4f}")
    0.6931
    """
    student, teacher, where = student_and_teacher(student, teacher, where)
    labels = jnp.argmax(teacher, axis=-1)
    return token_cross_entropy(student, labels, label_smoothing=label_smoothing, where=where)


def labelled_distillation(
    student: ArrayLike,
    teacher: ArrayLike,
    labels: ArrayLike,
    *,
    teacher_weight: ArrayLike = 0.5,
    temperature: ArrayLike = 1.0,
    kind: Divergence | Literal["cross_entropy"] = "forward",
    beta: float = 0.5,
    teacher_gradient: bool = False,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Distillation beside the labels.

        loss = (1 - w) CE(label, softmax(student)) + w distillation(student, teacher)

    w = `teacher_weight`.

    Use it where there are labels beside the teacher.

    Args:
        student: logits `[..., K]`.
        teacher: logits `[..., K]`.
        labels: `[...]`, integers from 0 to K - 1. Any other gives NaN.
        teacher_weight: w, a number or `[...]`.
        temperature: T of the distillation; the cross-entropy has none.
        kind, beta, teacher_gradient, where: as in `distillation`.

    Returns:
        Float32 `[...]`, one loss per example.

    Raises:
        TypeError, ValueError: as `distillation`; labels that are not integers or do not fit.

    References:
        Hinton, Vinyals, Dean, *Distilling the Knowledge in a Neural Network*, 2015,
        https://arxiv.org/abs/1503.02531.

        What `alpha` means differs: in Tunix it is w, 0.5 at T = 2; in torchdistill 1 - w, and for
        alpha = 0 the whole cross-entropy and T^2 are left out. mdistiller has 0.1 and 0.9 for the
        two terms at T = 4, the code of logit standardization 0.1 and 9 at T = 2, timm 1 and 1 at
        T = 1. KD-Lib takes the squared error of the softened probabilities by default.

    >>> import numpy as np
    >>> student, teacher = np.log([0.5, 0.5]), np.log([0.8, 0.2])
    >>> print(f"{labelled_distillation(student, teacher, 1, teacher_weight=0.9):.4f}")
    0.2428
    """
    # Once, so that the gradients of the two terms are added before they are rounded.
    student = floating(student, "student")
    soft = distillation(
        student,
        teacher,
        temperature=temperature,
        kind=kind,
        beta=beta,
        teacher_gradient=teacher_gradient,
        where=where,
    )
    hard = token_cross_entropy(student, labels, where=where)
    weight = jnp.asarray(teacher_weight, jnp.float32)
    if weight.shape not in ((), soft.shape):
        raise ValueError(f"teacher_weight has shape {weight.shape}; expected () or {soft.shape}")
    return (1.0 - weight) * hard + weight * soft


def decoupled_distillation(
    student: ArrayLike,
    teacher: ArrayLike,
    labels: ArrayLike,
    *,
    target_weight: ArrayLike = 1.0,
    non_target_weight: ArrayLike = 8.0,
    temperature: ArrayLike = 4.0,
    teacher_gradient: bool = False,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Decoupled knowledge distillation (DKD): the label's class and the others weighed apart.

        loss = T^2 (alpha KL(q_y, 1 - q_y || p_y, 1 - p_y) + beta KL(q' || p'))
        q', p': of the classes other than y, normalised

    Since KL(q || p) is the first
    divergence plus 1 - q_y times the second, alpha = 1 and beta = 1 - q_y give `distillation`; for
    two classes the second is zero.

    Use it where the teacher is so certain of the label that `distillation` hardly sees the other
    classes.

    Args:
        student: logits `[..., K]`, K at least 2.
        teacher: logits `[..., K]`.
        labels: y `[...]`, integers from 0 to K - 1. Any other gives NaN.
        target_weight: alpha, a number or `[...]`.
        non_target_weight: beta, a number or `[...]`. The authors' code: 8 for most CIFAR-100 pairs,
            2 or 6 for others, 0.5 to 2 at T = 1 for ImageNet.
        temperature: T.
        teacher_gradient, where: as in `distillation`.

    Returns:
        Float32 `[...]`, one loss per example; non-negative.

    Raises:
        TypeError, ValueError: as `distillation`; labels that are not integers or do not fit; K < 2.

    References:
        Zhao, Cui, Song, Qiu, Liang, *Decoupled Knowledge Distillation*, CVPR 2022,
        https://arxiv.org/abs/2203.08679.

        The authors' code takes y out by subtracting 1000 from its logit, here it is left out
        exactly; it adds cross-entropy of weight 1 and multiplies this loss by min(epoch / 20, 1),
        both left to the caller. The loss is several times the size of `distillation`: its users
        report much of the gain from plain distillation of that weight.

    >>> import numpy as np
    >>> student, teacher = np.log([0.5, 0.25, 0.25]), np.log([0.5, 0.4, 0.1])
    >>> print(f"{decoupled_distillation(student, teacher, 0, temperature=1.0):.4f}")
    1.5420
    """
    check_temperature(temperature)
    student, teacher, where = student_and_teacher(
        student, teacher, where, teacher_gradient=teacher_gradient
    )
    count = student.shape[-1]
    if count < 2:
        raise ValueError(f"decoupled distillation needs two classes; student has {student.shape}")
    labels = class_labels(labels, student.shape[:-1], count)
    if where is not None:
        labels = jnp.where(where, labels, 0)
    is_label = jnp.arange(count) == labels[..., None]
    pairs, others = [], []
    for logits in (student, teacher):
        log_probs = jax.nn.log_softmax(logits / temperature)
        of_label = jnp.take_along_axis(log_probs, labels[..., None], axis=-1)
        rest = jnp.where(is_label, -jnp.inf, log_probs)
        of_rest = jax.nn.logsumexp(rest, axis=-1, keepdims=True)
        pairs.append(jnp.concatenate([of_label, of_rest], axis=-1))
        others.append(rest - jnp.where(of_rest == -jnp.inf, 0.0, of_rest))
    target = divergence(pairs[0], pairs[1], "forward", 0.5)
    non_target = divergence(others[0], others[1], "forward", 0.5)
    # A teacher to which the other classes are impossible has no opinion on them.
    non_target = jnp.where(pairs[1][..., 1] == -jnp.inf, 0.0, non_target)
    losses = jnp.square(temperature) * (target_weight * target + non_target_weight * non_target)
    return zero_unless(where, losses)
