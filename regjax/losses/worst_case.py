"""Training for the worst class: its risks, the multipliers, the costs and the loss with them.

One round of distributionally robust distillation (or, with one-hot targets, of class DRO):

    sums, weights = class_risk_sums(held_out_logits, held_out_targets)   # added over the batches
    multipliers = exponentiated_gradient(multipliers, sums / weights, step_size=0.1)
    costs = robust_costs(multipliers, prior)
    losses = cost_weighted_distillation(logits, targets, costs)          # some training steps

Everywhere z are the logits, q the targets, pi is the prior, lambda the multipliers, c the costs.
The risks belong to held-out examples: on a training set that is fitted they are all near zero and
the multipliers stand still. `targets` are probabilities, a teacher's softmax(logits / T) or a
one-hot, and the `prior` is their mean, at that same T.

After Wang, Narasimhan, Zhou, Hooker, Lukasik, Menon, *Robust Distillation for Worst-class
Performance: On the Interplay Between Teacher and Student Objectives*, UAI 2023,
https://arxiv.org/abs/2206.06479. Only its abstract was at hand and no public code was found: the
formulas are a reconstruction, whose consequences are tested, and no result of the paper is claimed.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from regjax.losses.checks import check_range, floating, mask_of_shape, per_class, zero_unless
from regjax.losses.labelled import logits_and_labels


def cost_weighted_distillation(
    logits: ArrayLike,
    targets: ArrayLike,
    costs: ArrayLike,
    *,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Cross-entropy that puts the costs of the classes into its margins, on soft targets.

        loss = sum_y q_y log(1 + sum_{j != y} exp(log(c_y / c_j) - (z_y - z_j)))
             = -sum_y q_y log softmax(z - log c)_y

    The minimiser is z = log q + log c up to a constant, whose argmax is that of c_y q_y: the best
    decision where mistakes on class y cost c_y. Weighting the cross-entropy by the costs has hardly
    an effect on a network that can fit all examples; do not do both, it would square the costs.
    Costs of one value are plain distillation, c = 1 / pi is `logit_adjusted`.

    Use it with `robust_costs` for the worst class, or with costs of mistakes that are known.

    Args:
        logits: z `[..., K]`, floating.
        targets: q `[..., K]`, floating, probabilities. No gradient.
        costs: c `[K]`, positive; a common factor does not matter. No gradient.
        where: `[...]`, the examples that count.

    Returns:
        Float32 `[...]`, one loss per example.

    Raises:
        TypeError: logits or targets that are not floating.
        ValueError: shapes that do not fit, costs that are not positive.

    References:
        Wang et al., UAI 2023, https://arxiv.org/abs/2206.06479, reconstructed, see the module.

        A constant factor of 1 / K that may stand before the sum is left out.

    >>> import numpy as np
    >>> logits, targets = np.array([2.0, 1.0, 0.1]), np.array([0.7, 0.2, 0.1])
    >>> print(f"{cost_weighted_distillation(logits, targets, [1.0, 1.0, 4.0]):.4f}")
    0.8689
    """
    logits, targets, where = _logits_and_targets(logits, targets, where)
    costs = jax.lax.stop_gradient(per_class(costs, "costs", logits.shape[-1]))
    losses = optax.losses.safe_softmax_cross_entropy(logits - jnp.log(costs), targets)
    return zero_unless(where, losses)


def class_risk_sums(
    logits: ArrayLike,
    targets: ArrayLike,
    *,
    loss: Literal["cross_entropy", "zero_one"] = "cross_entropy",
    where: ArrayLike | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Sums and weights of the risk of every class, under soft labels.

        risk_k = sum_i q_ik l(k, z_i) / sum_i q_ik

    Add both over micro-batches, devices and hosts before dividing. A class whose weight is zero has
    no risk: leave it out of `exponentiated_gradient` with `where=weights > 0`.

    Use it on held-out examples, for the next step of the multipliers.

    Args:
        logits: z `[..., K]`, floating.
        targets: q `[..., K]`, floating, probabilities. No gradient.
        loss: l, -log softmax(z)_k or 1[k != argmax z]; the step size that suits the multipliers
            differs between the two.
        where: `[...]`, the examples that count.

    Returns:
        The numerators and the denominators, float32 `[K]` each.

    Raises:
        TypeError: logits or targets that are not floating.
        ValueError: shapes that do not fit, an unknown loss.

    References:
        Wang et al., UAI 2023, https://arxiv.org/abs/2206.06479, reconstructed, see the module.

    >>> import numpy as np
    >>> logits = np.log([[0.7, 0.3], [0.4, 0.6]])
    >>> sums, weights = class_risk_sums(logits, np.array([[0.8, 0.2], [0.5, 0.5]]))
    >>> [f"{risk:.4f}" for risk in sums / weights]
    ['0.5719', '0.7089']
    """
    logits, targets, where = _logits_and_targets(logits, targets, where)
    if loss == "cross_entropy":
        losses = -jax.nn.log_softmax(logits)
    elif loss == "zero_one":
        losses = 1.0 - jax.nn.one_hot(jnp.argmax(logits, axis=-1), logits.shape[-1])
    else:
        raise ValueError(f"loss must be 'cross_entropy' or 'zero_one'; got {loss!r}")
    examples = tuple(range(logits.ndim - 1))
    # An impossible class without weight: zero times infinity is NaN.
    weighted = targets * jnp.where(targets == 0.0, 0.0, losses)
    return weighted.sum(axis=examples), targets.sum(axis=examples)


def exponentiated_gradient(
    multipliers: ArrayLike,
    risks: ArrayLike,
    *,
    step_size: ArrayLike,
    floor: ArrayLike = 0.0,
    where: ArrayLike | None = None,
) -> jax.Array:
    """One step of exponentiated-gradient ascent on the simplex.

        lambda_k <- lambda_k exp(gamma R_k) / sum_j lambda_j exp(gamma R_j)

    The weight grows where the risk is large. Adding a constant to all risks changes nothing;
    gamma = 0 changes nothing, and a large gamma leaves the worst alone.

    Use it to maximise over weights of a few risks, of classes, groups or tasks.

    Args:
        multipliers: lambda `[M]`, floating, not negative, of sum one; start from 1 / M.
        risks: R `[M]`, floating. No gradient.
        step_size: gamma.
        floor: the least multiplier, from 0 to 1 / M, by mixing with the uniform distribution. A
            multiplier of zero never comes back. An array, which may be traced, is not checked.
        where: `[M]`, which have a risk; the others count as a risk of zero.

    Returns:
        Float32 `[M]`, of sum one, without a gradient.

    Raises:
        TypeError: arrays that are not floating.
        ValueError: shapes that do not fit, a floor out of range.

    References:
        Sagawa, Koh, Hashimoto, Liang, *Distributionally Robust Neural Networks for Group Shifts*,
        ICLR 2020, https://arxiv.org/abs/1911.08731.

    >>> import numpy as np
    >>> new = exponentiated_gradient(np.full(3, 1 / 3), np.array([0.5, 1.0, 2.0]), step_size=1.0)
    >>> [f"{multiplier:.4f}" for multiplier in new]
    ['0.1402', '0.2312', '0.6285']
    """
    multipliers, risks = floating(multipliers, "multipliers"), floating(risks, "risks")
    if multipliers.ndim != 1 or risks.shape != multipliers.shape:
        raise ValueError(
            f"multipliers have shape {multipliers.shape} and risks {risks.shape}; expected one "
            "shape, [M]"
        )
    count = len(multipliers)
    if isinstance(floor, int | float) and not 0.0 <= floor * count <= 1.0:
        raise ValueError(f"floor must lie in [0, 1/{count}]; got {floor}")
    risks = zero_unless(mask_of_shape(where, risks.shape), risks)
    new = jax.nn.softmax(jnp.log(multipliers) + step_size * risks)
    least = jnp.asarray(floor, jnp.float32)
    return jax.lax.stop_gradient((1.0 - count * least) * new + least)


def robust_costs(
    multipliers: ArrayLike, prior: ArrayLike, *, tradeoff: ArrayLike = 1.0
) -> jax.Array:
    """Costs of the classes, between the balanced and the worst-class objective.

        c_k = ((1 - a) / K + a lambda_k) / pi_k

    a = 0 is the balanced objective, a = 1 the worst class. lambda = pi with a = 1 is the standard
    one.

    Use it to turn multipliers into costs; a says how much of the average to give for the worst
    class.

    Args:
        multipliers: lambda `[K]`, positive, of sum one.
        prior: pi `[K]`, positive: the mean of the targets. Of few examples, smooth it first.
        tradeoff: a, from 0 to 1.

    Returns:
        Float32 `[K]`, for `cost_weighted_distillation`.

    Raises:
        ValueError: shapes that do not fit, a prior that is not positive, a out of range.

    References:
        Wang et al., UAI 2023, https://arxiv.org/abs/2206.06479, reconstructed, see the module.

    >>> [f"{cost:.4f}" for cost in robust_costs([0.2, 0.3, 0.5], [0.6, 0.3, 0.1], tradeoff=0.5)]
    ['0.4444', '1.0556', '4.1667']
    """
    check_range(tradeoff, "tradeoff", 0.0, 1.0)
    tradeoff = jnp.asarray(tradeoff, jnp.float32)
    multipliers = jnp.asarray(multipliers, jnp.float32)
    if multipliers.ndim != 1:
        raise ValueError(f"multipliers have shape {multipliers.shape}; expected [K]")
    count = len(multipliers)
    prior = per_class(prior, "prior", count)
    return ((1.0 - tradeoff) / count + tradeoff * multipliers) / prior


def post_shift(
    log_probs: ArrayLike,
    labels: ArrayLike,
    *,
    tradeoff: float = 1.0,
    step_size: float = 0.1,
    steps: int = 200,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Learns a shift of the classes' scores that serves the worst class, without training.

        argmax_k log p_k + shift_k    maximises    (1 - a) mean_k accuracy_k + a min_k accuracy_k

    Every step takes shift = log c of `robust_costs`, whose argmax is the best decision under costs
    c, and raises the multipliers of the classes of most errors by `exponentiated_gradient`. What
    is returned is the best of all shifts met, the zero shift among them, so on the examples given it
    is never worse than none. A class without examples is left out of both accuracies.

    Use it where the model is not to be trained again, and as a baseline for what trains it.

    Args:
        log_probs: `[N, K]`, floating: log-probabilities or logits of held-out examples.
        labels: `[N]`, integers from 0 to K - 1.
        tradeoff: a, from 0 to 1.
        step_size: of the multipliers.
        steps: their number.
        where: `[N]`, the examples that count.

    Returns:
        The shift, float32 `[K]`, of mean zero, without a gradient. Add it to log-probabilities.

    Raises:
        TypeError: log-probabilities that are not floating, labels that are not integers.
        ValueError: shapes that do not fit, a tradeoff out of range, no steps.

    References:
        A baseline of Wang et al., UAI 2023, https://arxiv.org/abs/2206.06479; how they learn it is
        not known here, the steps and their defaults are ours.

        `weijiaheng/Drops` bounds the distance of the multipliers from a prior instead.

    >>> import numpy as np
    >>> log_probs = np.log([[0.9, 0.1], [0.8, 0.2], [0.6, 0.4]])
    >>> shift = post_shift(log_probs, np.array([0, 0, 1]))
    >>> np.argmax(log_probs + shift, axis=-1).tolist()
    [0, 0, 1]
    """
    check_range(tradeoff, "tradeoff", 0.0, 1.0)
    check_range(steps, "steps", 1)
    scores, labels, where = logits_and_labels(log_probs, labels, where)
    if scores.ndim != 2:
        raise ValueError(f"log_probs have shape {scores.shape}; expected [N, K]")
    scores = jax.lax.stop_gradient(scores)
    classes = scores.shape[-1]
    members = zero_unless(where, jax.nn.one_hot(labels, classes))
    counts = members.sum(axis=0)
    present = counts > 0.0
    prior = jnp.maximum(counts, 1.0) / jnp.sum(jnp.maximum(counts, 1.0))

    def accuracies(shift: jax.Array) -> jax.Array:
        right = jax.nn.one_hot(jnp.argmax(scores + shift, axis=-1), classes) * members
        return right.sum(axis=0) / jnp.maximum(counts, 1.0)

    def objective(accuracy: jax.Array) -> jax.Array:
        mean = jnp.sum(accuracy * present) / jnp.maximum(present.sum(), 1)
        worst = jnp.min(jnp.where(present, accuracy, 1.0))
        return (1.0 - tradeoff) * mean + tradeoff * worst

    def step(state, _):
        multipliers, best_shift, best = state
        shift = jnp.log(robust_costs(multipliers, prior, tradeoff=tradeoff))
        shift -= shift.mean()
        accuracy = accuracies(shift)
        value = objective(accuracy)
        best_shift = jnp.where(value > best, shift, best_shift)
        multipliers = exponentiated_gradient(
            multipliers, 1.0 - accuracy, step_size=step_size, where=present
        )
        return (multipliers, best_shift, jnp.maximum(value, best)), None

    none = jnp.zeros(classes)
    start = (jnp.full(classes, 1.0 / classes), none, objective(accuracies(none)))
    (_, shift, _), _ = jax.lax.scan(step, start, length=steps)
    return shift


def _logits_and_targets(
    logits: ArrayLike, targets: ArrayLike, where: ArrayLike | None
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    logits, targets = floating(logits, "logits"), floating(targets, "targets")
    if logits.ndim < 1 or targets.shape != logits.shape:
        raise ValueError(
            f"logits have shape {logits.shape} and targets {targets.shape}; expected one shape, "
            "[..., K]"
        )
    where = mask_of_shape(where, logits.shape[:-1])
    targets = jax.lax.stop_gradient(targets)
    return zero_unless(where, logits), zero_unless(where, targets), where
