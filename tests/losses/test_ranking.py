"""Ranking losses: AUC by scikit-learn, the example of two labels, and the best orders."""

import itertools

import jax
import numpy as np
import optax
import pytest
from sklearn.metrics import roc_auc_score

from regjax.losses.ranking import label_aggregation, loss_aggregation, pairwise_ranking

# (y1, y2) with probabilities .45, .45, .05, .05.
PATTERNS = np.array([[0, 0], [1, 0], [0, 1], [1, 1]])
POPULATION = np.repeat(PATTERNS, [9, 9, 1, 1], axis=0)


def auc(scores, labels):
    return 1 - pairwise_ranking(scores, labels, surrogate="zero_one")


def test_binary_labels_give_the_auc_of_scikit_learn():
    rng = np.random.default_rng(0)
    for _ in range(5):
        scores = rng.integers(0, 6, size=30).astype(np.float32)
        labels = rng.permutation(np.arange(30) < 8)
        expected = roc_auc_score(labels, scores)
        for cost in ("difference", "uniform"):
            found = 1 - pairwise_ranking(scores, labels, surrogate="zero_one", cost=cost)
            np.testing.assert_allclose(found, expected, rtol=2e-6)
        both = [f(scores, labels[:, None]) for f in (loss_aggregation, label_aggregation)]
        np.testing.assert_allclose(both, [pairwise_ranking(scores, labels)] * 2, rtol=2e-6)


def test_the_example_of_two_labels_has_its_aucs():
    expected = {
        "loss": ([0, 1, 2, 3], [0.91, 1.0]),
        "label": ([0, 1, 1, 2], [0.955, 0.875]),
        "first": (PATTERNS[:, 0], [1.0, 0.5]),
        "second": (PATTERNS[:, 1], [0.5, 1.0]),
        "product": (PATTERNS.prod(-1), [0.55, 0.75]),
    }
    for of_pattern, aucs in expected.values():
        scores = np.repeat(np.asarray(of_pattern, np.float32), [9, 9, 1, 1])
        np.testing.assert_allclose([auc(scores, y) for y in POPULATION.T], aucs, atol=1e-6)
        found = loss_aggregation(scores, POPULATION, surrogate="zero_one", weights=[1.0, 3.0])
        np.testing.assert_allclose(found, (1 - np.array(aucs)) @ [1, 3], atol=2e-6)


def losses_of_orders(function, points, labels, **options):
    """The zero-one loss of every order of the points, each of which stands for several items."""
    orders = np.array(list(itertools.permutations(range(points.max() + 1))), np.float32)
    losses = jax.jit(jax.vmap(lambda f: function(f, labels, surrogate="zero_one", **options)))(
        orders[:, points]
    )
    return orders, np.asarray(losses)


def bayes_order(function, points, labels, **options):
    orders, losses = losses_of_orders(function, points, labels, **options)
    best = np.flatnonzero(losses < losses.min() + 1e-6)
    return orders[best]


def population(eta, rng):
    """Eight items of every point, of which 8 eta have each label, and the points of the items."""
    labels = [[rng.permutation(8) < 8 * share for share in row] for row in eta]
    items = np.concatenate(np.swapaxes(np.array(labels, np.float32), 1, 2))
    return items, np.repeat(np.arange(len(eta)), 8)


@pytest.mark.parametrize("size", [(5, 2), (4, 3)], ids=["two labels", "three labels"])
@pytest.mark.parametrize("seed", range(3))
def test_the_best_orders_are_those_of_the_stated_scorers(seed, size):
    rng = np.random.default_rng(seed)
    eta = rng.choice(np.arange(1, 8), size=size, replace=True) / 8
    labels, points = population(eta, rng)
    weights = np.array([1.0, 1.7, 0.6])[: size[1]]
    pi = labels.mean(0)
    stated = {
        "normalized": eta @ (weights / (pi * (1 - pi))),
        "plain": eta @ weights,
        "sum": eta @ weights,
    }
    found = {
        "normalized": bayes_order(loss_aggregation, points, labels, weights=weights),
        "plain": bayes_order(loss_aggregation, points, labels, weights=weights, normalize=False),
        "sum": bayes_order(label_aggregation, points, labels, weights=weights),
    }
    for name, scorer in stated.items():
        assert len(found[name]) >= 1
        for order in found[name]:
            gaps = np.subtract.outer(scorer, scorer)
            ranks = np.subtract.outer(order, order)
            assert (ranks[gaps > 1e-9] > 0).all(), name


def test_with_labels_of_one_frequency_both_aggregations_have_the_same_best_order():
    # Columns of one sum, rows of different ones.
    eta = np.array([[4, 3], [4, 6], [6, 5], [5, 7], [5, 3]]) / 8
    labels, points = population(eta, np.random.default_rng(0))
    by_loss = bayes_order(loss_aggregation, points, labels)
    by_sum = bayes_order(label_aggregation, points, labels)
    assert len(by_loss) == 1
    np.testing.assert_array_equal(by_loss, by_sum)


def test_the_rarer_label_dictates_and_with_one_normaliser_the_heavier_one():
    points = np.repeat(np.arange(4), [9, 9, 1, 1])
    pi = POPULATION.mean(0)
    np.testing.assert_allclose(1 / (pi * (1 - pi)), [4, 11.1111], rtol=1e-5)
    order = bayes_order(loss_aggregation, points, POPULATION, weights=[1.0, 0.9])
    np.testing.assert_array_equal(order, [[0, 1, 2, 3]])
    order = bayes_order(loss_aggregation, points, POPULATION, weights=[1.0, 0.9], normalize=False)
    np.testing.assert_array_equal(order, [[0, 2, 1, 3]])
    # (1, 0) and (0, 1) have one sum: their order is free.
    both = bayes_order(label_aggregation, points, POPULATION)
    assert {tuple(order) for order in both} == {(0, 1, 2, 3), (0, 2, 1, 3)}


def test_costs_weigh_pairs_by_their_difference():
    scores, grades = np.array([0.0, 1.0, 3.0], np.float32), np.array([2, 1, 0])
    phi = np.log1p(np.exp([1.0, 3.0, 2.0]))
    found = pairwise_ranking(scores, grades)
    np.testing.assert_allclose(found, (phi[0] + 2 * phi[1] + phi[2]) / 4, rtol=2e-6)
    found = pairwise_ranking(scores, grades, cost="uniform")
    np.testing.assert_allclose(found, phi.mean(), rtol=2e-6)


def test_lists_with_one_class_are_zero_with_zero_gradients_and_the_other_label_still_counts():
    scores = np.random.default_rng(1).normal(size=(2, 6)).astype(np.float32)
    labels = np.stack([np.ones((2, 6)), np.arange(12).reshape(2, 6) % 2], axis=-1)
    for cost in ("difference", "uniform"):
        loss, slope = jax.value_and_grad(
            lambda f, cost=cost: pairwise_ranking(f, labels[..., 0], cost=cost).sum()
        )(scores)
        assert loss == 0.0
        np.testing.assert_array_equal(slope, np.zeros((2, 6)))
    total = loss_aggregation(scores, labels)
    np.testing.assert_allclose(total, pairwise_ranking(scores, labels[..., 1]), rtol=2e-6)
    slope = jax.grad(lambda f: loss_aggregation(f, labels[..., :1]).sum())(scores)
    np.testing.assert_array_equal(slope, np.zeros((2, 6)))


def test_only_differences_of_scores_count_and_the_gradient_sums_to_zero():
    scores = np.random.default_rng(2).normal(size=12).astype(np.float32)
    labels = np.arange(24).reshape(12, 2) % 5 < 2
    for function in (loss_aggregation, label_aggregation):
        np.testing.assert_allclose(
            function(scores + 8, labels), function(scores, labels), rtol=2e-6
        )
        assert abs(jax.grad(lambda f, function=function: function(f, labels))(scores).sum()) < 1e-6


def test_of_one_positive_the_softmax_of_optax_bounds_the_pairs():
    """log(1 + sum_j exp(z_j)) against sum_j log(1 + exp(z_j)), one positive: the list loss is less."""
    scores, labels = np.array([0.3, 1.0, -0.5, 2.0], np.float32), np.array([1, 0, 0, 0])
    listwise = optax.losses.ranking_softmax_loss(scores, labels.astype(float), reduce_fn=None)
    pairs = 3 * pairwise_ranking(scores, labels)
    assert pairs / 3 < listwise < pairs


def test_what_does_not_fit_raises_by_name():
    scores = np.zeros(3)
    with pytest.raises(ValueError, match=r"relevance have shape \(2,\); expected \(3,\)"):
        pairwise_ranking(scores, np.ones(2))
    with pytest.raises(ValueError, match=r"labels have shape \(3,\); expected \(3,\) and K"):
        loss_aggregation(scores, np.ones(3))
    with pytest.raises(ValueError, match=r"weights have shape \(3,\); expected \(2,\)"):
        label_aggregation(scores, np.ones((3, 2)), weights=[1, 1, 1])
    with pytest.raises(ValueError, match=r"surrogate must be .*got 'exp'"):
        loss_aggregation(scores, np.ones((3, 2)), surrogate="exp")
    with pytest.raises(ValueError, match="cost must be 'difference' or 'uniform'; got 'log'"):
        pairwise_ranking(scores, np.ones(3), cost="log")
    with pytest.raises(ValueError, match="scores must have shape"):
        pairwise_ranking(1.0, 1.0)
