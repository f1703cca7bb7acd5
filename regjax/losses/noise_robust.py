"""Losses of softmax classifiers that bend less to wrong labels than cross-entropy does.

Everywhere p = softmax(logits), y is the label and l_k = -log p_k. A *symmetric* loss, whose sum
over all labels is a constant, has the same minimiser under symmetric label noise as without it.
"""

from __future__ import annotations

import math
from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from regjax.losses.checks import check_range, floating, zero_unless
from regjax.losses.labelled import is_label, logits_and_labels, of_label
from regjax.losses.tokens import token_cross_entropy

_LOG_ZERO = math.log(1e-4)


def generalized_cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    q: ArrayLike = 0.7,
    threshold: float = 0.0,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Generalized cross-entropy (GCE), between cross-entropy and the absolute error.

        loss = min((1 - p_y^q) / q, (1 - k^q) / q)

    Cross-entropy as q tends to 0, half the absolute error |p - e_y|, 1 - p_y, at q = 1. With the
    `threshold` k above zero it is the truncated loss: examples with p_y <= k have no gradient. To
    prune examples for longer than a step, as the authors do, use `where`.

    Use it in place of cross-entropy where labels are noisy: q trades fitting against robustness.

    Args:
        logits: `[..., K]`, floating.
        labels: y `[...]`, integers from 0 to K - 1. Any other gives NaN.
        q: from 0 to 1; an array, which may be traced, is not checked.
        threshold: k, from 0 to 1; the authors' value is 0.5.
        where: `[...]`, the examples that count.

    Returns:
        Float32 `[...]`, one loss per example; from 0 to 1 / q.

    Raises:
        TypeError: logits that are not floating, labels that are not integers.
        ValueError: shapes that do not fit, q or the threshold out of range.

    References:
        Zhang, Sabuncu, *Generalized Cross Entropy Loss for Training Deep Neural Networks with Noisy
        Labels*, NeurIPS 2018, https://arxiv.org/abs/1805.07836.

    >>> import numpy as np
    >>> logits = np.array([2.0, 1.0, 0.1, -1.0])
    >>> print(f"{generalized_cross_entropy(logits, 1):.4f}")
    0.9106
    >>> print(f"{generalized_cross_entropy(logits, 1, threshold=0.5):.4f}")
    0.5492
    """
    check_range(q, "q", 0.0, 1.0)
    check_range(threshold, "threshold", 0.0, 1.0)
    logits, labels, where = logits_and_labels(logits, labels, where)
    losses = _box_cox(of_label(jax.nn.log_softmax(logits), labels), q)
    if threshold > 0.0:
        cap = _box_cox(jnp.asarray(math.log(threshold), jnp.float32), q)
        # Not `jnp.minimum`, whose gradient at the threshold is half.
        losses = jnp.where(losses >= cap, cap, losses)
    return zero_unless(where, losses)


def reverse_cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    log_zero: float = _LOG_ZERO,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Reverse cross-entropy (RCE): that of the label's distribution, with log 0 set to A.

        loss = -sum_k p_k log e_y[k] = -A (1 - p_y)

    A multiple of the absolute error. Symmetric: its sum over the labels is -A (K - 1).

    Use it as the robust part of a sum, as in `symmetric_cross_entropy`; as the absolute error,
    alone it underfits many classes.

    Args:
        logits: `[..., K]`, floating.
        labels: y `[...]`, integers from 0 to K - 1. Any other gives NaN.
        log_zero: A, below zero. The default, log 1e-4, is that of the public code of Ma et al.
        where: `[...]`, the examples that count.

    Returns:
        Float32 `[...]`, one loss per example; from 0 to -A.

    Raises:
        TypeError, ValueError: as `generalized_cross_entropy`; A not below zero.

    References:
        Wang, Ma, Chen, Luo, Yi, Bailey, *Symmetric Cross Entropy for Robust Learning with Noisy
        Labels*, ICCV 2019, https://arxiv.org/abs/1908.06112.

    >>> import numpy as np
    >>> print(f"{reverse_cross_entropy(np.array([2.0, 1.0, 0.1, -1.0]), 0):.4f}")
    3.3335
    """
    if not log_zero < 0.0:
        raise ValueError(f"log_zero must be below zero; got {log_zero}")
    logits, labels, where = logits_and_labels(logits, labels, where)
    losses = log_zero * jnp.expm1(of_label(jax.nn.log_softmax(logits), labels))
    return zero_unless(where, losses)


def symmetric_cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    forward_weight: float = 0.1,
    reverse_weight: float = 1.0,
    log_zero: float = _LOG_ZERO,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Symmetric cross-entropy (SCE), forward and reverse.

        loss = a l_y - b A (1 - p_y)

    Despite its name not a symmetric loss unless a = 0.

    Use it where labels are noisy: the forward part fits, the reverse part bends less to wrong
    labels.

    Args:
        logits: `[..., K]`, floating.
        labels: y `[...]`, integers from 0 to K - 1. Any other gives NaN.
        forward_weight: a. The public code of Ma et al. has a = 0.1, b = 1 for CIFAR-10, a = 6,
            b = 0.1 for CIFAR-100.
        reverse_weight: b.
        log_zero: A, as in `reverse_cross_entropy`.
        where: `[...]`, the examples that count.

    Returns:
        Float32 `[...]`, one loss per example.

    Raises:
        TypeError, ValueError: as `reverse_cross_entropy`.

    References:
        Wang, Ma, Chen, Luo, Yi, Bailey, *Symmetric Cross Entropy for Robust Learning with Noisy
        Labels*, ICCV 2019, https://arxiv.org/abs/1908.06112.

    >>> import numpy as np
    >>> print(f"{symmetric_cross_entropy(np.array([2.0, 1.0, 0.1, -1.0]), 0):.4f}")
    3.3785
    """
    # Once, so that the gradients of the two terms are added before they are rounded.
    logits = floating(logits, "logits")
    forward = token_cross_entropy(logits, labels, where=where)
    reverse = reverse_cross_entropy(logits, labels, log_zero=log_zero, where=where)
    return forward_weight * forward + reverse_weight * reverse


def normalized_cross_entropy(
    logits: ArrayLike, labels: ArrayLike, *, where: ArrayLike | None = None
) -> jax.Array:
    """Normalised cross-entropy (NCE): the share of the label in the losses of all labels.

        loss = l_y / sum_k l_k

    Symmetric: its sum over the labels is one.

    Use it as the active part of `active_passive`; alone it underfits.

    Args:
        logits: `[..., K]`, floating.
        labels: y `[...]`, integers from 0 to K - 1. Any other gives NaN.
        where: `[...]`, the examples that count.

    Returns:
        Float32 `[...]`, one loss per example; from 0 to 1.

    Raises:
        TypeError, ValueError: as `generalized_cross_entropy`.

    References:
        Ma, Huang, Wang, Romano, Erfani, Bailey, *Normalized Loss Functions for Deep Learning with
        Noisy Labels*, ICML 2020, https://arxiv.org/abs/2006.13554.

    >>> import numpy as np
    >>> print(f"{normalized_cross_entropy(np.array([2.0, 1.0, 0.1, -1.0]), 0):.4f}")
    0.0584
    """
    logits, labels, where = logits_and_labels(logits, labels, where)
    log_probs = jax.nn.log_softmax(logits)
    return zero_unless(where, of_label(log_probs, labels) / log_probs.sum(axis=-1))


def active_passive(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    active_weight: float = 1.0,
    passive_weight: float = 1.0,
    passive: Literal["reverse_cross_entropy", "absolute_error"] = "reverse_cross_entropy",
    log_zero: float = _LOG_ZERO,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Active passive loss (APL): what raises p_y, plus what lowers the other probabilities.

        reverse_cross_entropy:  a l_y / sum_k l_k - b A (1 - p_y)
        absolute_error:         a l_y / sum_k l_k + b (1 - p_y)

    A sum of symmetric losses, so symmetric.

    Use it where labels are noisy and each of its two symmetric parts alone underfits.

    Args:
        logits: `[..., K]`, floating.
        labels: y `[...]`, integers from 0 to K - 1. Any other gives NaN.
        active_weight: a. The authors' code has a = b = 1 for CIFAR-10, a = 10 and b = 0.1 for
            CIFAR-100.
        passive_weight: b.
        passive: the second term.
        log_zero: A, as in `reverse_cross_entropy`; the absolute error has none.
        where: `[...]`, the examples that count.

    Returns:
        Float32 `[...]`, one loss per example.

    Raises:
        TypeError, ValueError: as `reverse_cross_entropy`; an unknown `passive`.

    References:
        Ma, Huang, Wang, Romano, Erfani, Bailey, *Normalized Loss Functions for Deep Learning with
        Noisy Labels*, ICML 2020, https://arxiv.org/abs/2006.13554.

        The authors' code also has a normalised reverse cross-entropy, which multiplies by (K - 1) /
        4 where it should divide; a constant factor, it is not offered here.

    >>> import numpy as np
    >>> print(f"{active_passive(np.array([2.0, 1.0, 0.1, -1.0]), 0):.4f}")
    3.3919
    """
    # Once, so that the gradients of the two terms are added before they are rounded.
    logits = floating(logits, "logits")
    active = normalized_cross_entropy(logits, labels, where=where)
    if passive == "reverse_cross_entropy":
        other = reverse_cross_entropy(logits, labels, log_zero=log_zero, where=where)
    elif passive == "absolute_error":
        other = generalized_cross_entropy(logits, labels, q=1.0, where=where)
    else:
        raise ValueError(
            f"passive must be 'reverse_cross_entropy' or 'absolute_error'; got {passive!r}"
        )
    return active_weight * active + passive_weight * other


def bootstrapping(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    kind: Literal["soft", "hard"] = "soft",
    label_weight: ArrayLike | None = None,
    target_gradient: bool = True,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Cross-entropy with labels that are mixed with the model's own prediction.

        soft:  b l_y + (1 - b) sum_k p_k l_k
        hard:  b l_y + (1 - b) l_c,    c = argmax_k p_k

    Use it where labels are noisy, once the model's own predictions are worth mixing in.

    Args:
        logits: `[..., K]`, floating.
        labels: y `[...]`, integers from 0 to K - 1. Any other gives NaN.
        kind: the prediction.
        label_weight: b, a number or `[...]`. By default 0.95 for soft, as in the public code of
            Patrini et al., and 0.8 for hard.
        target_gradient: of the soft kind, let the gradient also into the weights p_k, as in that
            code. Without it, the prediction is a constant label.
        where: `[...]`, the examples that count.

    Returns:
        Float32 `[...]`, one loss per example.

    Raises:
        TypeError, ValueError: as `generalized_cross_entropy`; an unknown kind.

    References:
        Reed, Lee, Anguelov, Szegedy, Erhan, Rabinovich, *Training Deep Neural Networks on Noisy
        Labels with Bootstrapping*, 2014, https://arxiv.org/abs/1412.6596.

    >>> import numpy as np
    >>> print(f"{bootstrapping(np.array([2.0, 1.0, 0.1, -1.0]), 1):.4f}")
    1.4249
    >>> print(f"{bootstrapping(np.array([2.0, 1.0, 0.1, -1.0]), 1, kind='hard'):.4f}")
    1.2493
    """
    if kind not in ("soft", "hard"):
        raise ValueError(f"kind must be 'soft' or 'hard'; got {kind!r}")
    if label_weight is None:
        label_weight = 0.95 if kind == "soft" else 0.8
    logits, labels, where = logits_and_labels(logits, labels, where)
    weight = jnp.asarray(label_weight, jnp.float32)
    if weight.shape not in ((), labels.shape):
        raise ValueError(f"label_weight has shape {weight.shape}; expected () or {labels.shape}")
    log_probs = jax.nn.log_softmax(logits)
    if kind == "soft":
        probs = jnp.exp(log_probs)
        if not target_gradient:
            probs = jax.lax.stop_gradient(probs)
        own = -jnp.sum(probs * jnp.where(log_probs == -jnp.inf, 0.0, log_probs), axis=-1)
    else:
        own = -of_label(log_probs, jnp.argmax(log_probs, axis=-1))
    losses = weight * -of_label(log_probs, labels) + (1.0 - weight) * own
    return zero_unless(where, losses)


def squentropy(
    logits: ArrayLike, labels: ArrayLike, *, where: ArrayLike | None = None
) -> jax.Array:
    """Cross-entropy plus the mean square of the other classes' logits.

        loss = -log p_y + sum_{k != y} z_k^2 / (K - 1)

    Unlike the softmax, it sees the level of the logits z.

    Use it in place of cross-entropy where the logits of the other classes are to stay near zero.

    Args:
        logits: z `[..., K]`, floating.
        labels: y `[...]`, integers from 0 to K - 1. Any other gives NaN.
        where: `[...]`, the examples that count.

    Returns:
        Float32 `[...]`, one loss per example.

    Raises:
        TypeError, ValueError: as `generalized_cross_entropy`.

    References:
        Hui, Belkin, Wright, *Cut your Losses with Squentropy*, ICML 2023,
        https://arxiv.org/abs/2302.03952.

        The authors' code subtracts z_y^2 from the sum of all squares, which cancels for large z_y.

    >>> import numpy as np
    >>> print(f"{squentropy(np.array([2.0, 1.0, 0.1, -1.0]), 0):.4f}")
    1.1193
    """
    logits, labels, where = logits_and_labels(logits, labels, where)
    count = logits.shape[-1]
    others = jnp.where(is_label(labels, count), 0.0, logits)
    squares = jnp.sum(jnp.square(others), axis=-1) / (count - 1)
    return zero_unless(where, squares - of_label(jax.nn.log_softmax(logits), labels))


def _box_cox(log_probs: jax.Array, q: ArrayLike) -> jax.Array:
    """(1 - p^q) / q, and its limit -log p at q = 0."""
    if isinstance(q, int | float):
        return -log_probs if q == 0.0 else -jnp.expm1(q * log_probs) / q
    # Both sides are finite, with finite gradients: one of them counts.
    safe = jnp.where(jnp.asarray(q) == 0.0, 1.0, q)
    return jnp.where(jnp.asarray(q) == 0.0, -log_probs, -jnp.expm1(safe * log_probs) / safe)
