"""Weights of examples for distributionally robust objectives: what is hard counts more.

Everywhere v are the losses of n examples, a batch, from which each function makes weights w
without a gradient, and

    objective = sum_i w_i v_i

has the robust objective's gradient, since w is the worst distribution of its kind (Danskin). All
are zero where `where` is false, whatever the loss there. The weights belong to the batch that they
are computed from: those of a part of it, one micro-batch or device, are not those of the whole.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from regjax.losses.checks import floating, mask_of_shape, per_class, zero_unless
from regjax.losses.worst_case import exponentiated_gradient


def group_dro(
    losses: ArrayLike,
    groups: ArrayLike,
    multipliers: ArrayLike,
    *,
    step_size: ArrayLike = 0.01,
    adjustment: ArrayLike = 0.0,
    group_counts: ArrayLike | None = None,
    where: ArrayLike | None = None,
) -> tuple[jax.Array, jax.Array]:
    """One step of group DRO: the weights of the examples, and the new weights of the groups.

        m_g = mean loss of group g in the batch, 0 if it is absent
        q_g <- q_g exp(eta (m_g + C / sqrt(n_g))) / sum
        sum_i w_i v_i = sum_g q_g m_g

    The adjustment C only steers q; the reported loss is that of the model. eta = 0 with uniform q is
    the group-balanced mean, a large eta the worst group, one group the plain mean. The authors' code
    draws the groups with equal probability.

    Use it where the groups are known and the worst of them counts, with strong weight decay or
    early stopping: of groups that are fitted none is the worst.

    Args:
        losses: v `[...]`, floating. No gradient.
        groups: g `[...]`, integers from 0 to G - 1. Any other gets a weight of NaN.
        multipliers: q `[G]`, floating, of sum one; start from 1 / G, keep with the training state.
        step_size: eta.
        adjustment: C, not negative; for a generalisation gap that shrinks with the group's size.
        group_counts: n `[G]`, positive, training examples; needed for an adjustment.
        where: `[...]`, the examples that count.

    Returns:
        w, float32 `[...]`, and q, float32 `[G]`.

    Raises:
        TypeError: losses or multipliers that are not floating, groups that are not integers.
        ValueError: shapes that do not fit; an adjustment without `group_counts`.

    References:
        Sagawa, Koh, Hashimoto, Liang, *Distributionally Robust Neural Networks for Group Shifts*,
        ICLR 2020, https://arxiv.org/abs/1911.08731; the defaults are those of the authors' code.

        That code adds the adjustment in place, so the loss that it reports and differentiates is
        shifted too.

    >>> import numpy as np
    >>> losses, groups = np.array([1.0, 3.0, 4.0]), np.array([0, 0, 1])
    >>> weights, multipliers = group_dro(losses, groups, np.full(2, 0.5), step_size=0.1)
    >>> [f"{weight:.4f}" for weight in weights], [f"{q:.4f}" for q in multipliers]
    (['0.2251', '0.2251', '0.5498'], ['0.4502', '0.5498'])
    """
    losses, counted = _losses_and_mask(losses, where)
    groups = jnp.asarray(groups)
    if not jnp.issubdtype(groups.dtype, jnp.integer):
        raise TypeError(f"groups must be integers; got {groups.dtype} of shape {groups.shape}")
    if groups.shape != losses.shape:
        raise ValueError(f"groups have shape {groups.shape}, but the losses {losses.shape}")
    multipliers = floating(multipliers, "multipliers")
    if multipliers.ndim != 1:
        raise ValueError(f"multipliers have shape {multipliers.shape}; expected [G]")
    size = len(multipliers)
    # An index below zero would count from the end; beyond it, it gives NaN.
    groups = jnp.where(counted, jnp.where(groups < 0, size, groups.astype(jnp.int32)), 0)
    sums, counts = (
        jax.ops.segment_sum(values.astype(jnp.float32).ravel(), groups.ravel(), size)
        for values in (losses, counted)
    )
    risks = sums / jnp.maximum(counts, 1.0)
    if group_counts is not None:
        risks += adjustment / jnp.sqrt(per_class(group_counts, "group_counts", size))
    elif not (isinstance(adjustment, int | float) and adjustment == 0.0):
        raise ValueError("an adjustment needs group_counts, the training examples of each group")
    multipliers = exponentiated_gradient(multipliers, risks, step_size=step_size)
    of_member = multipliers / jnp.maximum(counts, 1.0)
    return jnp.where(counted, jnp.take(of_member, groups), 0.0), multipliers


def cvar_weights(
    losses: ArrayLike, *, fraction: float, where: ArrayLike | None = None
) -> jax.Array:
    """Weights of the conditional value at risk: the mean of the worst fraction of the losses.

        1 / (a n) for each of the floor(a n) largest, what is left of 1 for the next, 0 else

    The mean for a = 1, the largest loss for a <= 1 / n. Of small batches this is a biased estimate
    of the population's; `cvar_dual` has no such bias.

    Use it where the hardest examples count, groups are not known and batches are large.

    Args:
        losses: `[..., n]`, floating. No gradient.
        fraction: a, above 0 and at most 1.
        where: `[..., n]`, the examples that count; n is their number.

    Returns:
        Float32 `[..., n]`, of sum one over the last axis, or zero if no example counts. Of equal
        losses at the boundary the first ones have the weight.

    Raises:
        TypeError: losses that are not floating.
        ValueError: shapes that do not fit, a fraction out of range.

    References:
        Levy, Carmon, Duchi, Sidford, *Large-Scale Methods for Distributionally Robust
        Optimization*, NeurIPS 2020, https://arxiv.org/abs/2010.05893.

    >>> import numpy as np
    >>> cvar_weights(np.array([0.1, 2.0, 0.5, 1.0]), fraction=0.5).tolist()
    [0.0, 0.5, 0.0, 0.5]
    """
    _check_fraction(fraction)
    losses, counted = _losses_and_mask(losses, where, axes=1)
    order = jnp.argsort(jnp.where(counted, -losses, jnp.inf), axis=-1, stable=True)
    rank = jnp.argsort(order, axis=-1)
    tail = fraction * counted.sum(axis=-1, keepdims=True)
    weights = jnp.clip(tail - rank, 0.0, 1.0) / jnp.where(tail > 0.0, tail, 1.0)
    return jnp.where(counted, weights, 0.0)


def cvar_dual(
    losses: ArrayLike,
    threshold: ArrayLike,
    *,
    fraction: float,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Losses whose mean, minimised over the threshold as well, is the conditional value at risk.

        t + max(v - t, 0) / a

    With t a trained parameter the mean over mini-batches is without bias. The best t is the loss
    that a fraction a of the examples exceeds; start from a typical loss.

    Use it in place of `cvar_weights` where batches are small.

    Args:
        losses: v `[...]`, floating.
        threshold: t, a number or `[...]`, in units of the loss.
        fraction: a, above 0 and at most 1.
        where: `[...]`, the examples that count.

    Returns:
        Float32 `[...]`, one loss per example, with gradients into losses and threshold.

    Raises:
        TypeError: losses that are not floating.
        ValueError: shapes that do not fit, a fraction out of range.

    References:
        Rockafellar, Uryasev, *Optimization of conditional value-at-risk*, 2000.

    >>> import numpy as np
    >>> print(f"{cvar_dual(np.array([0.1, 2.0, 0.5, 1.0]), 0.8, fraction=0.5).mean():.4f}")
    1.5000
    """
    _check_fraction(fraction)
    losses = floating(losses, "losses")
    where = mask_of_shape(where, losses.shape)
    losses = zero_unless(where, losses)
    threshold = jnp.asarray(threshold, jnp.float32)
    if threshold.shape not in ((), losses.shape):
        raise ValueError(f"threshold has shape {threshold.shape}; expected () or {losses.shape}")
    return zero_unless(where, threshold + jax.nn.relu(losses - threshold) / fraction)


def chi_square_weights(
    losses: ArrayLike, *, radius: float, where: ArrayLike | None = None
) -> jax.Array:
    """Weights of the worst distribution within a chi-square ball around the uniform one.

        max_w sum_i w_i v_i    where    mean_i (n w_i - 1)^2 / 2 <= rho

    w_i is proportional to max(v_i - t, 0), with t found by bisection. Uniform for rho = 0, the
    largest loss alone from rho = (n - 1) / 2 on.

    Use it where harder examples are to count more by how hard they are, within a radius.

    Args:
        losses: `[..., n]`, floating. No gradient.
        radius: rho, not negative.
        where: `[..., n]`, the examples that count; n is their number.

    Returns:
        Float32 `[..., n]`, of sum one over the last axis, or zero if no example counts.

    Raises:
        TypeError: losses that are not floating.
        ValueError: shapes that do not fit, a negative radius.

    References:
        Levy, Carmon, Duchi, Sidford, *Large-Scale Methods for Distributionally Robust
        Optimization*, NeurIPS 2020, https://arxiv.org/abs/2010.05893.

    >>> import numpy as np
    >>> weights = chi_square_weights(np.array([0.0, 1.0, 2.0]), radius=0.25)
    >>> [f"{weight:.4f}" for weight in weights]
    ['0.0447', '0.3333', '0.6220']
    """
    if not 0.0 <= radius < math.inf:
        raise ValueError(f"radius must be finite and not negative; got {radius}")
    losses, counted = _losses_and_mask(losses, where, axes=1)
    count = jnp.maximum(counted.sum(axis=-1, keepdims=True), 1)
    if radius == 0.0:
        return counted / count
    # From the largest loss down, so that the digits of what lies near it are kept.
    top = jnp.max(losses, axis=-1, keepdims=True, where=counted, initial=-jnp.inf)
    below = jnp.where(counted, losses - jnp.where(counted, top, 0.0), 0.0)
    mean = below.sum(axis=-1, keepdims=True) / count
    squares = jnp.square(jnp.where(counted, below - mean, 0.0))
    spread = jnp.sqrt(squares.sum(axis=-1, keepdims=True) / count)
    # Where no example loses its weight, the left end is the solution; else it is left of it.
    left = jnp.minimum(below.min(axis=-1, keepdims=True), mean - spread / math.sqrt(2 * radius))
    left = jnp.where(left < 0.0, left, -1.0)

    def excess(threshold: jax.Array) -> jax.Array:
        return jnp.where(counted, jax.nn.relu(1.0 - below / threshold), 0.0)

    def halve(_, ends: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        inside, outside = ends
        middle = (inside + outside) / 2.0
        weights = excess(middle)
        centre = weights.sum(axis=-1, keepdims=True) / count
        deviations = jnp.where(counted, weights / centre - 1.0, 0.0)
        fits = jnp.square(deviations).sum(axis=-1, keepdims=True) <= 2.0 * radius * count
        return jnp.where(fits, middle, inside), jnp.where(fits, outside, middle)

    threshold, _ = jax.lax.fori_loop(0, 60, halve, (left, jnp.zeros_like(left)))
    weights = excess(threshold)
    total = weights.sum(axis=-1, keepdims=True)
    return weights / jnp.where(total > 0.0, total, 1.0)


def kl_weights(
    losses: ArrayLike, *, temperature: float, where: ArrayLike | None = None
) -> jax.Array:
    """Weights of the worst distribution under a penalty for its divergence from the uniform one.

        max_w sum_i w_i v_i - lambda KL(w || 1/n) = lambda log mean_i exp(v_i / lambda)

    w = softmax(v / lambda): the largest loss alone as lambda tends to 0, uniform as it grows. The
    right side, the tilted risk, is what is minimised; sum_i w_i v_i has its gradient, not its value.

    Use it where hard examples are to count more, all by one smooth rule.

    Args:
        losses: v `[..., n]`, floating. No gradient.
        temperature: lambda, positive, in units of the loss.
        where: `[..., n]`, the examples that count; n is their number.

    Returns:
        Float32 `[..., n]`, of sum one over the last axis, or zero if no example counts.

    Raises:
        TypeError: losses that are not floating.
        ValueError: shapes that do not fit, a temperature that is not positive.

    References:
        Levy, Carmon, Duchi, Sidford, *Large-Scale Methods for Distributionally Robust
        Optimization*, NeurIPS 2020, https://arxiv.org/abs/2010.05893.

    >>> import numpy as np
    >>> weights = kl_weights(np.array([0.1, 2.0, 0.5]), temperature=1.0)
    >>> [f"{weight:.4f}" for weight in weights]
    ['0.1090', '0.7285', '0.1625']
    """
    if not temperature > 0.0:
        raise ValueError(f"temperature must be positive; got {temperature}")
    losses, counted = _losses_and_mask(losses, where, axes=1)
    top = jnp.max(losses, axis=-1, keepdims=True, where=counted, initial=-jnp.inf)
    tilted = jnp.where(counted, jnp.exp(jnp.where(counted, losses - top, 0.0) / temperature), 0.0)
    total = tilted.sum(axis=-1, keepdims=True)
    return tilted / jnp.where(total > 0.0, total, 1.0)


def _losses_and_mask(
    losses: ArrayLike, where: ArrayLike | None, *, axes: int = 0
) -> tuple[jax.Array, jax.Array]:
    """Float32 losses without a gradient, zero where they do not count, and which do."""
    losses = jax.lax.stop_gradient(floating(losses, "losses"))
    if losses.ndim < axes:
        raise ValueError(f"losses have shape {losses.shape}; expected [..., n]")
    where = mask_of_shape(where, losses.shape)
    counted = jnp.ones(losses.shape, bool) if where is None else where
    return zero_unless(where, losses), counted


def _check_fraction(fraction: float) -> None:
    if not 0.0 < fraction <= 1.0:
        raise ValueError(f"fraction must lie in (0, 1]; got {fraction}")
