"""Label-distributionally robust losses: the worst distribution over labels, not the given one.

Everywhere z are the logits of K classes, y is the label and lambda the temperature.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from regjax.losses.checks import check_temperature, floating, mask_of_shape, zero_unless
from regjax.losses.labelled import is_label, logits_and_labels, of_label


def label_distributionally_robust(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    temperature: ArrayLike = 1.0,
    margin: ArrayLike = 1.0,
    where: ArrayLike | None = None,
) -> jax.Array:
    """LDR-KL: the largest mean margin violation over distributions d near the uniform one.

        loss = max_d sum_k d_k (z_k - z_y + c [k != y]) - lambda KL(d || 1/K)
             = lambda log mean_k exp((z_k - z_y + c [k != y]) / lambda)

    As lambda tends to 0 it is the Crammer-Singer hinge loss, max_k (...); as it grows, mean_k (...),
    which is symmetric, so robust to label noise. At lambda = 1 and c = 0 it is cross-entropy less
    log K.

    With one lambda per example from `adaptive_temperature` it is ALDR-KL, up to a term without a
    gradient, -(alpha log K / (2 lambda_0)) (lambda - lambda_0)^2.

    Use it where labels are noisy, to choose by one temperature between a hinge loss, cross-entropy
    and a symmetric loss.

    Args:
        logits: z `[..., K]`, floating. The authors' code normalises them, to softplus(z) over its
            mean in LDR-KL, to z over its mean absolute value in ALDR-KL; left to the caller.
        labels: y `[...]`, integers from 0 to K - 1. Any other gives NaN.
        temperature: lambda, a positive number or `[...]`; an array is not checked.
        margin: c, a number or `[...]`. The authors' code has 2 for LDR-KL, 1 for ALDR-KL.
        where: `[...]`, the examples that count.

    Returns:
        Float32 `[...]`, one loss per example; at least -lambda log K, and lower than zero where the
        label wins by the margin.

    Raises:
        TypeError: logits that are not floating, labels that are not integers.
        ValueError: shapes that do not fit, a temperature that is not positive.

    References:
        Zhu, Ying, Yang, *Label Distributionally Robust Losses for Multi-class Classification:
        Consistency, Robustness and Adaptivity*, ICML 2023, https://arxiv.org/abs/2112.14869.

    >>> import numpy as np
    >>> logits = np.array([2.0, 1.0, 0.1, -1.0])
    >>> print(f"{label_distributionally_robust(logits, 1):.4f}")
    0.9024
    >>> print(f"{label_distributionally_robust(logits, 1, temperature=0.1):.4f}")
    1.8614
    """
    check_temperature(temperature)
    logits, labels, where = logits_and_labels(logits, labels, where)
    temperature = _per_example(temperature, "temperature", where, labels.shape)
    margin = _per_example(margin, "margin", where, labels.shape)
    count = logits.shape[-1]
    margins = jnp.where(is_label(labels, count), 0.0, margin[..., None])
    violations = logits - of_label(logits, labels)[..., None] + margins
    tilted = jax.nn.logsumexp(violations / temperature[..., None], axis=-1)
    return zero_unless(where, temperature * (tilted - math.log(count)))


def adaptive_temperature(
    logits: ArrayLike,
    temperature: ArrayLike,
    *,
    reference: float = 1.0,
    alpha: float = 2.0,
    where: ArrayLike | None = None,
) -> jax.Array:
    """The next temperatures of ALDR-KL, one per training example.

        lambda <- lambda_0 (1 - KL(softmax(z / lambda) || 1/K) / (alpha log K))

    From lambda_0 for a model that is undecided, and so perhaps trained on a wrong label, down to
    lambda_0 (1 - 1 / alpha) for one that is certain.

    Use it where some labels are more doubtful than others, so that no single temperature suits all.

    Args:
        logits: z `[..., K]`, floating.
        temperature: lambda, positive, a number or `[...]`; start from lambda_0.
        reference: lambda_0, positive.
        alpha: above 1, so that lambda stays positive; 2 in the authors' examples.
        where: `[...]`, the examples that count; the others keep their temperature.

    Returns:
        Float32 `[...]`, without a gradient.

    Raises:
        TypeError: logits that are not floating.
        ValueError: shapes that do not fit; `reference` not positive, `alpha` not above 1.

    References:
        Zhu, Ying, Yang, *Label Distributionally Robust Losses for Multi-class Classification:
        Consistency, Robustness and Adaptivity*, ICML 2023, https://arxiv.org/abs/2112.14869.

        This is the update of the authors' code, without the 1e-5 that it adds to the probabilities.

    >>> import numpy as np
    >>> print(f"{adaptive_temperature(np.array([2.0, 1.0, 0.1, -1.0]), 1.0):.4f}")
    0.8465
    """
    if not reference > 0.0 or not alpha > 1.0:
        raise ValueError(
            f"reference must be positive and alpha above 1; got {reference} and {alpha}"
        )
    check_temperature(temperature)
    logits = floating(logits, "logits")
    if logits.ndim < 1 or logits.shape[-1] < 2:
        raise ValueError(f"logits have shape {logits.shape}; expected [..., K], K at least 2")
    where = mask_of_shape(where, logits.shape[:-1])
    kept = _per_example(temperature, "temperature", None, logits.shape[:-1])
    divisor = kept if where is None else jnp.where(where, kept, 1.0)
    log_probs = jax.nn.log_softmax(zero_unless(where, logits) / divisor[..., None])
    finite = jnp.where(log_probs == -jnp.inf, 0.0, log_probs)
    # KL / log K = 1 - entropy / log K.
    certainty = 1.0 + jnp.sum(jnp.exp(log_probs) * finite, axis=-1) / math.log(logits.shape[-1])
    new = reference * (1.0 - certainty / alpha)
    return jax.lax.stop_gradient(new if where is None else jnp.where(where, new, kept))


def _per_example(
    value: ArrayLike, name: str, where: jax.Array | None, shape: tuple[int, ...]
) -> jax.Array:
    """`value` as float32 `[...]`, one where `where` is false."""
    array = jnp.asarray(value, jnp.float32)
    if array.shape not in ((), shape):
        raise ValueError(f"{name} has shape {array.shape}; expected () or {shape}")
    array = jnp.broadcast_to(array, shape)
    return array if where is None else jnp.where(where, array, 1.0)
