"""Losses for bags of examples of which only the mean response is known."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from regjax.losses.checks import check_range, floating, mask_of_shape, numbers_of_shape, zero_unless


def aggregate_response(
    predictions: ArrayLike,
    responses: ArrayLike,
    *,
    instance_weight: ArrayLike = 0.0,
    loss: Literal["squared", "binary_cross_entropy"] = "squared",
    where: ArrayLike | None = None,
) -> jax.Array:
    """Loss of a bag's mean response: of the mean prediction, of every prediction, or between.

        bag level:       l(mean_i f_i, y)
        instance level:  mean_i l(f_i, y)
        loss = (1 - rho) bag + rho instance

    The loss is convex, so the instance level is never below the bag level: for the squared error it
    is the bag level plus the variance of the predictions in the bag, which makes rho the strength
    of a regularisation towards bags of one prediction. Bags of one example have one loss, the usual.

    Use it where of a bag of examples only the mean response may be known, for privacy say.

    Args:
        predictions: f `[..., N]`, floating: N examples in each bag. For binary cross-entropy these
            are logits, and the bag's prediction is the mean of their probabilities.
        responses: y `[...]`, the mean response of the examples that count; a proportion, from 0 to
            1, for binary cross-entropy.
        instance_weight: rho, from 0, the bag level, to 1, the instance level.
        loss: l, (f - y)^2 or -y log sigmoid(f) - (1 - y) log(1 - sigmoid(f)).
        where: `[..., N]`, the examples in each bag. An empty bag has a loss of zero.

    Returns:
        Float32 `[...]`, one loss per bag.

    Raises:
        TypeError: predictions that are not floating.
        ValueError: shapes that do not fit; a weight out of range; an unknown `loss`.

    References:
        Javanmard, Chen, Mirrokni, Badanidiyuru, Fu, *Learning from Aggregate responses: Instance
        Level versus Bag Level Loss Functions*, ICLR 2024, https://openreview.net/forum?id=E60SIDItyT.
        Only its abstract was at hand: that the interpolation is linear in rho is ours, and for the
        squared error the regularised form that the abstract speaks of.

    >>> import numpy as np
    >>> predictions = np.array([1.0, 2.0, 6.0])
    >>> for weight in (0.0, 0.5, 1.0):
    ...     print(f"{aggregate_response(predictions, 2.0, instance_weight=weight):.4f}")
    1.0000
    3.3333
    5.6667
    """
    check_range(instance_weight, "instance_weight", 0.0, 1.0)
    predictions = floating(predictions, "predictions")
    if predictions.ndim < 1:
        raise ValueError("predictions must have shape [..., N]; got a scalar")
    where = mask_of_shape(where, predictions.shape)
    counts = jnp.full(predictions.shape[:-1], float(predictions.shape[-1]))
    if where is not None:
        counts = where.sum(axis=-1).astype(jnp.float32)
    filled = counts > 0.0
    responses = numbers_of_shape(responses, "responses", predictions.shape[:-1])
    responses = zero_unless(filled, responses)
    predictions = zero_unless(where, predictions)
    divisors = jnp.maximum(counts, 1.0)
    if loss == "squared":
        # The variance instead of the mean square: a difference of large numbers has few digits.
        means = predictions.sum(axis=-1) / divisors
        spread = zero_unless(where, jnp.square(predictions - means[..., None]))
        losses = optax.losses.squared_error(means, responses)
        losses += instance_weight * spread.sum(axis=-1) / divisors
    elif loss == "binary_cross_entropy":
        of_bag = -responses * _log_mean_sigmoid(predictions, where, divisors)
        of_bag -= (1.0 - responses) * _log_mean_sigmoid(-predictions, where, divisors)
        each = optax.losses.sigmoid_binary_cross_entropy(
            predictions, jnp.broadcast_to(responses[..., None], predictions.shape)
        )
        of_instances = zero_unless(where, each).sum(axis=-1) / divisors
        losses = (1.0 - instance_weight) * of_bag + instance_weight * of_instances
    else:
        raise ValueError(f"loss must be 'squared' or 'binary_cross_entropy'; got {loss!r}")
    return zero_unless(filled, losses)


def _log_mean_sigmoid(logits: jax.Array, where: jax.Array | None, divisors: jax.Array) -> jax.Array:
    log_probs = jax.nn.log_sigmoid(logits)
    if where is not None:
        # An empty bag keeps its zeros: an infinite log times its response has a gradient of NaN.
        left_out = ~where & jnp.any(where, axis=-1, keepdims=True)
        log_probs = jnp.where(left_out, -jnp.inf, log_probs)
    return jax.nn.logsumexp(log_probs, axis=-1) - jnp.log(divisors)
