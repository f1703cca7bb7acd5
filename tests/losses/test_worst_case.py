"""Training for the worst class: computed fixtures, a toy saddle point, what a shift can reach."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from regjax.losses.long_tail import logit_adjusted
from regjax.losses.worst_case import (
    class_risk_sums,
    cost_weighted_distillation,
    exponentiated_gradient,
    post_shift,
    robust_costs,
)

Z = np.array([2.0, 1.0, 0.1, -1.0], np.float32)
Q = np.array([0.8564440567, 0.0703012092, 0.0520804167, 0.0211743173])
COSTS = np.array([0.25, 2 / 3, 1.5, 4.0])
TEACHER = np.array([[0.8, 0.15, 0.05], [0.5, 0.4, 0.1], [0.4, 0.3, 0.3]])
PRIOR = TEACHER.mean(axis=0)

close = functools.partial(np.testing.assert_allclose, rtol=2e-6, atol=2e-7)


def test_cost_weighted_values():
    close(robust_costs([0.1, 0.2, 0.3, 0.4], [0.4, 0.3, 0.2, 0.1]), COSTS)
    per_label = cost_weighted_distillation(np.tile(Z, (4, 1)), np.eye(4), COSTS)
    close(per_label, [0.1535744442, 2.1344036972, 3.8453339134, 5.9261631664])
    close(cost_weighted_distillation(Z, Q, COSTS), 0.6073281328)


def test_costs_are_margins():
    for y in range(4):
        others = np.arange(4) != y
        margins = np.log(COSTS[y] / COSTS) - (float(Z[y]) - Z.astype(float))
        expected = np.log1p(np.sum(np.exp(margins)[others]))
        close(cost_weighted_distillation(Z, np.eye(4)[y], COSTS), expected)


def test_equal_costs_are_distillation_and_inverse_priors_are_logit_adjustment():
    soft = Q @ (np.log(np.exp(Z.astype(float)).sum()) - Z)
    close(cost_weighted_distillation(Z, Q, np.full(4, 3.0)), soft)
    close(soft, 0.6820899553)
    prior = np.array([0.5, 0.3, 0.15, 0.05])
    for y in range(4):
        adjusted = logit_adjusted(Z, y, prior)
        close(cost_weighted_distillation(Z, np.eye(4)[y], 1 / prior), adjusted)
        close(logit_adjusted(Z, y, 1 / COSTS), cost_weighted_distillation(Z, np.eye(4)[y], COSTS))


def test_the_minimiser_takes_the_decision_of_least_cost():
    best = jnp.log(Q) + jnp.log(COSTS)
    slope = jax.grad(lambda z: cost_weighted_distillation(z, Q, COSTS))(best)
    close(slope, np.zeros(4), atol=5e-7)


def test_an_impossible_class_of_no_target_has_no_cost():
    logits = jnp.array([1.0, 0.0, -jnp.inf])
    loss, slope = jax.value_and_grad(cost_weighted_distillation)(
        logits, np.array([0.5, 0.5, 0.0]), np.ones(3)
    )
    close(loss, np.log(1 + np.exp(1.0)) - 0.5)
    assert np.isfinite(slope).all()


def test_an_impossible_class_of_no_target_has_no_risk():
    logits = jnp.array([[1.0, 0.0, -jnp.inf], [0.0, 0.0, 0.0]])
    targets = np.array([[0.5, 0.5, 0.0], [0.0, 0.5, 0.5]])
    sums, weights = class_risk_sums(logits, targets)
    normalizer = np.log(1 + np.exp(1.0))
    close(sums, [0.5 * (normalizer - 1), 0.5 * (normalizer + np.log(3)), 0.5 * np.log(3)])
    close(weights, [0.5, 1.0, 0.5])


def test_only_the_logits_have_a_gradient():
    targets, costs = jnp.asarray(Q), jnp.asarray(COSTS)
    np.testing.assert_array_equal(
        jax.grad(cost_weighted_distillation, argnums=1)(Z, targets, costs), 0.0
    )
    np.testing.assert_array_equal(
        jax.grad(cost_weighted_distillation, argnums=2)(Z, targets, costs), 0.0
    )


def test_targets_that_do_not_count_may_be_anything():
    logits, targets = np.array([Z, np.full(4, np.inf)]), np.array([Q, np.full(4, np.nan)])
    where = np.array([True, False])
    losses = cost_weighted_distillation(logits, targets, COSTS, where=where)
    close(losses, [0.6073281328, 0.0])
    sums, weights = class_risk_sums(logits, targets, where=where)
    close(weights, Q)
    close(sums, Q * [0.4493130024, 1.4493130024, 2.3493130024, 3.4493130024])
    slope = jax.grad(lambda z: class_risk_sums(z, targets, where=where)[0].sum())(logits)
    close(slope[0], np.exp(Z) / np.exp(Z).sum() - Q, atol=5e-7)
    np.testing.assert_array_equal(slope[1], 0.0)
    none = np.zeros(2, bool)
    for found in class_risk_sums(logits, targets, where=none):
        np.testing.assert_array_equal(found, 0.0)
    slope = jax.grad(lambda z: class_risk_sums(z, targets, where=none)[0].sum())(logits)
    np.testing.assert_array_equal(slope, 0.0)


def test_tradeoff_costs():
    costs = functools.partial(robust_costs, [0.2, 0.3, 0.5], [0.6, 0.3, 0.1])
    close(costs(tradeoff=0.0), [5 / 9, 10 / 9, 10 / 3])
    close(costs(tradeoff=0.5), [0.4444444, 1.0555556, 4.1666667])
    close(costs(), [1 / 3, 1.0, 5.0])
    close(robust_costs(PRIOR, PRIOR), np.ones(3))


def test_exponentiated_gradient_values():
    step = functools.partial(exponentiated_gradient, np.full(3, 1 / 3), np.array([0.5, 1.0, 2.0]))
    close(step(step_size=0.01), [0.3311120587, 0.3327717648, 0.3361161766])
    close(step(step_size=1.0), [0.1402443832, 0.2312238976, 0.6285317192])
    close(step(step_size=0.0), np.full(3, 1 / 3))
    close(step(step_size=1e4), [0.0, 0.0, 1.0])
    close(step(step_size=1e4, floor=0.1), [0.1, 0.1, 0.8])


def test_exponentiated_gradient_identities():
    start = np.array([0.2, 0.5, 0.3, 0.0])
    risks = np.array([1.0, -2.0, 0.5, 3.0])
    new = exponentiated_gradient(start, risks, step_size=0.7)
    close(exponentiated_gradient(start, risks + 50.0, step_size=0.7), new, rtol=1e-5)
    close(new, start * np.exp(0.7 * risks) / np.sum(start * np.exp(0.7 * risks)))
    assert new[3] == 0.0
    masked = exponentiated_gradient(
        start, np.where(risks > 0, risks, np.nan), step_size=0.7, where=risks > 0
    )
    close(masked, exponentiated_gradient(start, np.maximum(risks, 0.0), step_size=0.7))
    slope = jax.grad(lambda r: exponentiated_gradient(start, r, step_size=1.0)[0])(risks)
    np.testing.assert_array_equal(slope, 0.0)


def test_risks_of_the_standard_and_the_balanced_solution():
    close(PRIOR, [0.5666667, 0.2833333, 0.15], atol=5e-8)
    for costs, expected in (
        (np.ones(3), [0.524473, 1.190913, 1.647193]),
        (1 / PRIOR, [0.974376, 1.053485, 0.966372]),
    ):
        sums, weights = class_risk_sums(np.log(costs * TEACHER), TEACHER)
        close(sums / weights, expected, atol=1e-6)


def test_zero_one_risks_and_sums_over_batches():
    logits = np.random.default_rng(0).normal(size=(2, 7, 3))
    targets = np.random.default_rng(1).dirichlet(np.ones(3), (2, 7))
    for loss in ("cross_entropy", "zero_one"):
        whole = class_risk_sums(logits, targets, loss=loss)
        parts = [class_risk_sums(logits[i], targets[i], loss=loss) for i in range(2)]
        for total, first, second in zip(whole, *parts, strict=True):
            close(total, first + second)
    sums, weights = class_risk_sums(logits, targets, loss="zero_one")
    wrong = np.argmax(logits, axis=-1)[..., None] != np.arange(3)
    close(sums / weights, (targets * wrong).sum((0, 1)) / targets.sum((0, 1)))


def test_the_toy_saddle_point_has_equal_risks():
    """Two thousand rounds, each with an exact inner solution."""

    def round_of(multipliers, _):
        scores = jnp.log(robust_costs(multipliers, PRIOR) * TEACHER)
        sums, weights = class_risk_sums(scores, TEACHER)
        return exponentiated_gradient(multipliers, sums / weights, step_size=0.05), sums / weights

    multipliers, risks = jax.lax.scan(round_of, jnp.full(3, 1 / 3), length=2000)
    close(multipliers, [0.32498, 0.35299, 0.32203], atol=1e-4)
    close(risks[-1], np.full(3, 0.998897), atol=1e-5)


def looped_shift(scores, labels, tradeoff, step_size, steps):
    classes = scores.shape[1]
    prior = np.bincount(labels, minlength=classes) / len(labels)

    def accuracies(shift):
        right = np.argmax(scores + shift, axis=1) == labels
        return np.array([right[labels == k].mean() for k in range(classes)])

    def objective(shift):
        each = accuracies(shift)
        return (1 - tradeoff) * each.mean() + tradeoff * each.min()

    best = np.zeros(classes)
    multipliers = np.full(classes, 1 / classes)
    for _ in range(steps):
        shift = np.log((1 - tradeoff) / classes + tradeoff * multipliers) - np.log(prior)
        if objective(shift) > objective(best) + 1e-9:
            best = shift
        multipliers = multipliers * np.exp(step_size * (1 - accuracies(shift)))
        multipliers /= multipliers.sum()
    return best - best.mean()


@functools.cache
def compiled_shift(tradeoff):
    return jax.jit(functools.partial(post_shift, tradeoff=tradeoff, steps=60))


def long_tailed_scores(seed):
    rng = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(3), rng.choice(3, 57, p=[0.7, 0.2, 0.1])])
    scores = np.log(rng.dirichlet(np.ones(3), 60)) + 1.5 * np.eye(3)[labels] + [1.0, 0.5, 0.0]
    return scores.astype(np.float32), labels


@pytest.mark.parametrize("tradeoff", [0.5, 1.0])
def test_a_learned_shift_is_that_of_a_loop(tradeoff):
    moved = 0
    for seed in range(6):
        scores, labels = long_tailed_scores(seed)
        shift = compiled_shift(tradeoff)(scores, labels)
        expected = looped_shift(scores.astype(float), labels, tradeoff, 0.1, 60)
        close(shift, expected, rtol=2e-5, atol=2e-6)
        moved += np.any(expected != 0.0)
    assert moved >= 5


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**32 - 1), tradeoff=st.sampled_from([0.5, 1.0]))
def test_a_learned_shift_is_never_worse_than_none(seed, tradeoff):
    scores, labels = long_tailed_scores(seed)
    shift = np.asarray(compiled_shift(tradeoff)(scores, labels))

    def objective(shifted):
        right = np.argmax(shifted, axis=1) == labels
        each = np.array([right[labels == k].mean() for k in range(3)])
        return (1 - tradeoff) * each.mean() + tradeoff * each.min()

    assert objective(scores + shift) >= objective(scores) - 1e-6
    close(shift.mean(), 0.0, atol=1e-6)


def test_a_learned_shift_finds_the_threshold_of_two_classes():
    """Scores of two normals at one and two: the best worst-class accuracy is that of a search."""
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], [900, 100])
    gap = rng.normal(size=1000) + labels
    scores = np.stack([np.full(1000, 2.0), gap], axis=-1).astype(np.float32)

    def worst(shift):
        predicted = gap + shift > 2.0
        return min(np.mean(~predicted[labels == 0]), np.mean(predicted[labels == 1]))

    shift = post_shift(scores, labels, step_size=0.5, steps=500)
    searched = max(worst(shift) for shift in np.linspace(-3, 3, 3001))
    assert worst(0.0) < 0.2
    assert worst(float(shift[1] - shift[0])) >= searched - 0.01


def test_a_learned_shift_of_examples_that_count_and_classes_that_occur():
    scores = np.log([[0.9, 0.1, 0.0001], [0.8, 0.2, 0.0001], [0.6, 0.4, 0.0001], [0.5, 0.4, 0.1]])
    labels = np.array([0, 0, 1, 2])
    where = np.array([True, True, True, False])
    broken = np.where(where[:, None], scores, np.nan)
    shift = post_shift(broken, np.where(where, labels, -100), where=where)
    assert np.isfinite(shift).all()
    assert np.argmax(scores + shift, axis=-1)[:3].tolist() == [0, 0, 1]


def test_input_that_does_not_fit_raises():
    with pytest.raises(ValueError, match=r"\(4,\) and targets \(3,\); expected one shape"):
        cost_weighted_distillation(Z, Q[:3], COSTS)
    with pytest.raises(TypeError, match="targets must be floating; got int"):
        class_risk_sums(Z, Q.astype(int))
    with pytest.raises(ValueError, match=r"costs must be positive; got \[1.0, -1.0"):
        cost_weighted_distillation(Z, Q, [1.0, -1.0, 1.0, 1.0])
    with pytest.raises(ValueError, match=r"costs have shape \(3,\); expected \(4,\)"):
        cost_weighted_distillation(Z, Q, COSTS[:3])
    with pytest.raises(ValueError, match="'cross_entropy' or 'zero_one'; got 'hinge'"):
        class_risk_sums(Z, Q, loss="hinge")
    with pytest.raises(ValueError, match=r"multipliers have shape \(2,\) and risks \(3,\)"):
        exponentiated_gradient(np.ones(2) / 2, np.ones(3), step_size=1.0)
    with pytest.raises(TypeError, match="risks must be floating"):
        exponentiated_gradient(np.ones(2) / 2, np.ones(2, int), step_size=1.0)
    with pytest.raises(ValueError, match=r"floor must lie in \[0, 1/2\]; got 0.6"):
        exponentiated_gradient(np.ones(2) / 2, np.ones(2), step_size=1.0, floor=0.6)
    with pytest.raises(ValueError, match=r"tradeoff must lie in \[0, 1\]; got 2"):
        robust_costs([0.5, 0.5], [0.5, 0.5], tradeoff=2)
    with pytest.raises(ValueError, match=r"prior must be positive; got \[1.0, 0.0\]"):
        robust_costs([0.5, 0.5], [1.0, 0.0])
    with pytest.raises(ValueError, match=r"multipliers have shape \(1, 2\); expected \[K\]"):
        robust_costs([[0.5, 0.5]], [0.5, 0.5])
    with pytest.raises(ValueError, match=r"log_probs have shape \(4,\); expected \[N, K\]"):
        post_shift(Z, 0)
    with pytest.raises(ValueError, match=r"steps must lie in \[1, inf\); got 0"):
        post_shift(Z[None], np.array([0]), steps=0)
