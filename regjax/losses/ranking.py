"""Pairwise ranking losses of a list of scores, with one label or several.

Each function compares all pairs of a list, `[..., N, N]` in memory, and returns one number per
list. A batch is one list, or a list per query. For a softmax over the list,
`optax.losses.ranking_softmax_loss(scores, labels, where=..., reduce_fn=None)`.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from regjax.losses.checks import floating, mask_of_shape, numbers_of_shape, zero_unless

Surrogate: TypeAlias = Literal["logistic", "hinge", "squared_hinge", "zero_one"]


def pairwise_ranking(
    scores: ArrayLike,
    relevance: ArrayLike,
    *,
    surrogate: Surrogate = "logistic",
    margin: float = 1.0,
    cost: Literal["difference", "uniform"] = "difference",
    where: ArrayLike | None = None,
) -> jax.Array:
    """Cost of the pairs in the wrong order; for binary labels, a surrogate of one minus the AUC.

        loss = sum_{i, j: y_i > y_j} c_ij phi(f_i - f_j) / sum_{i, j: y_i > y_j} c_ij

        logistic: phi(z) = log(1 + exp(-z))        hinge: max(0, m - z)
        squared_hinge: max(0, m - z)^2             zero_one: [z < 0] + [z = 0] / 2

    With costs y_i - y_j, the best ranking is that by E[y | x]; with uniform ones it is not, in
    general, and need not be Pareto-optimal for the labels that y sums up.

    Use it where the order of a list counts and not the scores.

    Args:
        scores: f `[..., N]`, floating.
        relevance: y `[..., N]`, binary or graded.
        surrogate: phi. `"zero_one"` is the metric itself, without a gradient.
        margin: m, of the hinges, in the units of the scores.
        cost: c_ij = y_i - y_j, or 1.
        where: `[..., N]`, the items that count.

    Returns:
        Float32 `[...]`, one loss per list; zero for a list without two different labels.

    Raises:
        TypeError: scores that are not floating.
        ValueError: shapes that do not fit; an unknown surrogate or cost.

    References:
        Lukasik et al., *Bipartite ranking from multiple labels: on loss versus label aggregation*,
        ICML 2025, https://arxiv.org/abs/2504.11284.

        With costs y_i - y_j and the logistic surrogate, `rax.pairwise_logistic_loss` with
        `labeldiff` weights is this up to a constant.

    >>> import numpy as np
    >>> scores, labels = np.array([2.0, 0.5, 1.0]), np.array([1, 0, 0])
    >>> print(f"{pairwise_ranking(scores, labels):.4f}")
    0.2573
    >>> print(f"{1 - pairwise_ranking(scores, np.array([0, 1, 1]), surrogate='zero_one'):.4f}")
    0.0000
    """
    scores, where = _scores(scores, where)
    relevance = zero_unless(where, numbers_of_shape(relevance, "relevance", scores.shape))
    differences = relevance[..., :, None] - relevance[..., None, :]
    if cost == "difference":
        costs = jnp.maximum(differences, 0.0)
    elif cost == "uniform":
        costs = (differences > 0.0).astype(jnp.float32)
    else:
        raise ValueError(f"cost must be 'difference' or 'uniform'; got {cost!r}")
    if where is not None:
        costs = jnp.where(where[..., :, None] & where[..., None, :], costs, 0.0)
    total = costs.sum(axis=(-2, -1))
    losses = jnp.sum(costs * _pair_losses(scores, surrogate, margin), axis=(-2, -1))
    return losses / jnp.where(total > 0.0, total, 1.0)


def label_aggregation(
    scores: ArrayLike,
    labels: ArrayLike,
    *,
    weights: ArrayLike | None = None,
    surrogate: Surrogate = "logistic",
    margin: float = 1.0,
    cost: Literal["difference", "uniform"] = "difference",
    where: ArrayLike | None = None,
) -> jax.Array:
    """Ranking by several binary labels through their sum.

        loss = pairwise_ranking(f, sum_k a_k y_k)

    The best ranking is that by sum_k a_k eta_k(x), with eta_k(x) = P(y_k = 1 | x), however rare a
    label is; items whose labels have one sum are left unordered.

    Use it to rank by several labels, none of which is to decide alone because it is rare.

    Args:
        scores: f `[..., N]`, floating.
        labels: y `[..., N, K]`, binary.
        weights: a `[K]`, not negative; one, if not given.
        surrogate, margin, cost: as for `pairwise_ranking`.
        where: `[..., N]`, the items that count.

    Returns:
        Float32 `[...]`, one loss per list; zero for a list in which all sums are the same.

    Raises:
        TypeError, ValueError: as `pairwise_ranking`.

    References:
        Lukasik et al., ICML 2025, https://arxiv.org/abs/2504.11284, proposition 5.4.

    >>> import numpy as np
    >>> scores, labels = np.array([2.0, 0.5, 1.0]), np.array([[1, 1], [0, 1], [0, 0]])
    >>> print(f"{label_aggregation(scores, labels):.4f}")
    0.4505
    """
    scores, where = _scores(scores, where)
    labels, weights = _labels(labels, weights, scores, where)
    return pairwise_ranking(
        scores, labels @ weights, surrogate=surrogate, margin=margin, cost=cost, where=where
    )


def loss_aggregation(
    scores: ArrayLike,
    labels: ArrayLike,
    *,
    weights: ArrayLike | None = None,
    surrogate: Surrogate = "logistic",
    margin: float = 1.0,
    normalize: bool = True,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Ranking by several binary labels through the sum of their losses.

        loss = sum_k a_k mean_{i, j: y_ik = 1, y_jk = 0} phi(f_i - f_j)

    The best ranking is that by sum_k a_k / (pi_k (1 - pi_k)) eta_k(x), with eta_k(x) =
    P(y_k = 1 | x) of mean pi_k: where labels are deterministic, the rarer one alone decides
    between items with one label each. That comes from the mean over each label's own pairs.

    Use it to rank by several labels where each label's own AUC is what is added up.

    Args:
        scores: f `[..., N]`, floating.
        labels: y `[..., N, K]`, binary.
        weights: a `[K]`; one, if not given.
        surrogate, margin: as for `pairwise_ranking`.
        normalize: divide by each label's own number of pairs. If not, by the number N^2 of all, for
            all labels alike, and the best ranking is that by sum_k a_k eta_k(x).
        where: `[..., N]`, the items that count.

    Returns:
        Float32 `[...]`, one loss per list. A label without a positive or a negative item adds zero.

    Raises:
        TypeError: scores that are not floating.
        ValueError: shapes that do not fit; an unknown surrogate.

    References:
        Lukasik et al., ICML 2025, https://arxiv.org/abs/2504.11284, propositions 5.2 and 6.1.

    >>> import numpy as np
    >>> scores, labels = np.array([2.0, 0.5, 1.0]), np.array([[1, 1], [0, 1], [0, 0]])
    >>> print(f"{loss_aggregation(scores, labels):.4f}")
    0.9010
    """
    scores, where = _scores(scores, where)
    labels, weights = _labels(labels, weights, scores, where)
    negatives = zero_unless(where, 1.0 - labels)
    if normalize:
        pairs = labels.sum(axis=-2) * negatives.sum(axis=-2)
        weights = weights * jnp.where(pairs > 0.0, 1.0 / jnp.where(pairs > 0.0, pairs, 1.0), 0.0)
    else:
        counts = jnp.full(scores.shape[:-1], scores.shape[-1])
        if where is not None:
            counts = jnp.maximum(where.sum(axis=-1), 1)
        weights = weights / jnp.square(counts.astype(jnp.float32))[..., None]
    costs = jnp.einsum("...ik,...jk,...k->...ij", labels, negatives, weights, precision="highest")
    return jnp.sum(costs * _pair_losses(scores, surrogate, margin), axis=(-2, -1))


def _pair_losses(scores: jax.Array, surrogate: Surrogate, margin: float) -> jax.Array:
    """phi(f_i - f_j) `[..., N, N]`."""
    differences = scores[..., :, None] - scores[..., None, :]
    if surrogate == "logistic":
        return jax.nn.softplus(-differences)
    if surrogate == "hinge":
        return jax.nn.relu(margin - differences)
    if surrogate == "squared_hinge":
        return jnp.square(jax.nn.relu(margin - differences))
    if surrogate == "zero_one":
        return 0.5 - 0.5 * jnp.sign(differences)
    raise ValueError(
        f"surrogate must be 'logistic', 'hinge', 'squared_hinge' or 'zero_one'; got {surrogate!r}"
    )


def _scores(scores: ArrayLike, where: ArrayLike | None) -> tuple[jax.Array, jax.Array | None]:
    scores = floating(scores, "scores")
    if scores.ndim < 1:
        raise ValueError("scores must have shape [..., N]; got a scalar")
    where = mask_of_shape(where, scores.shape)
    # Before the arithmetic as well as after it: the gradient of an ignored NaN would be NaN.
    return zero_unless(where, scores), where


def _labels(
    labels: ArrayLike, weights: ArrayLike | None, scores: jax.Array, where: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Float32 labels `[..., N, K]` and weights `[K]`."""
    labels = jnp.asarray(labels, jnp.float32)
    if labels.ndim < 2 or labels.shape[:-1] != scores.shape:
        raise ValueError(f"labels have shape {labels.shape}; expected {scores.shape} and K")
    count = labels.shape[-1]
    if weights is None:
        weights = jnp.ones(count)
    return zero_unless(where, labels), numbers_of_shape(weights, "weights", (count,))
