"""Ranking from several labels: what is best by brute force, what is learned, and its AUCs."""

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from regjax.errors import InputError
from regjax.methods.bipartite_ranking import best_scores
from regjax.metrics import Undefined
from regjax.objectives.classification import LabelAggregation, LossAggregation
from regjax.ranking_metrics import aucs, ranking_report


class Outputs(NamedTuple):
    logits: jax.Array
    features: jax.Array


# Items (y1, y2) of probability .45, .45, .05 and .05: of the two labels the second is rare.
KINDS = np.array([[0, 0], [1, 0], [0, 1], [1, 1]])
KIND = np.repeat(np.arange(4), [18, 18, 2, 2])
LABELS = KINDS[KIND]


def loss_of(objective, scores, labels=LABELS):
    outputs = Outputs(jnp.asarray(scores, jnp.float32)[:, None], jnp.zeros((len(scores), 2)))
    total, weight = objective(outputs, {"labels": jnp.asarray(labels)}, {})["loss"]
    return total / weight


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        (best_scores(KINDS, "loss", priors=[0.5, 0.1]), (0.91, 1.0)),
        (best_scores(KINDS, "label"), (0.955, 0.875)),
        (KINDS[:, 0], (1.0, 0.5)),
        (KINDS[:, 1], (0.5, 1.0)),
        (KINDS[:, 0] * KINDS[:, 1], (0.55, 0.75)),
    ],
    ids=["loss aggregation", "label aggregation", "first label", "second label", "product"],
)
def test_aucs_of_the_example(scores, expected):
    scores = np.asarray(scores)[KIND]
    np.testing.assert_allclose(aucs(scores, LABELS), expected, atol=1e-12)
    report = ranking_report(scores, LABELS, ["common", "rare"])
    np.testing.assert_allclose(
        [report[f"auc/{name}"] for name in ("common", "rare")], expected, atol=1e-12
    )
    assert report["auc_min"] == pytest.approx(min(expected))
    assert report["auc_gap"] == pytest.approx(abs(expected[0] - expected[1]))
    assert report["auc_mean"] == pytest.approx(sum(expected) / 2)
    # The loss of ranks is what is left of the AUCs.
    lost = loss_of(LossAggregation((0.3, 2.0), "zero_one"), scores)
    assert lost == pytest.approx(0.3 * (1 - expected[0]) + 2 * (1 - expected[1]), abs=1e-6)


def every_ranking(objective, kind, labels):
    """All orders of the kinds, and the loss of each."""
    orders = np.array(list(itertools.permutations(range(kind.max() + 1))))
    found = jax.jit(jax.vmap(lambda scores: loss_of(objective, scores, labels)))(orders[:, kind])
    return orders, np.asarray(found)


def test_the_best_of_all_rankings_of_the_example():
    orders, found = every_ranking(LossAggregation(surrogate="zero_one"), KIND, LABELS)
    assert [order.tolist() for order in orders[found < found.min() + 1e-6]] == [[0, 1, 2, 3]]
    orders, found = every_ranking(LabelAggregation(surrogate="zero_one"), KIND, LABELS)
    best = [order.tolist() for order in orders[found < found.min() + 1e-6]]
    assert best == [[0, 1, 2, 3], [0, 2, 1, 3]]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("count", [2, 3])
def test_the_best_of_all_rankings_is_the_known_one(seed, count):
    """Five kinds of items, each ten with labels of their own: eta_k is the share of ones."""
    random = np.random.default_rng(10 * count + seed)
    ones = np.array([random.permutation(11)[:5] for _ in range(count)]).T
    ones[:, -1] = np.maximum(ones[:, -1] // 3, [0, 1, 0, 1, 2])  # rare
    kind = np.repeat(np.arange(5), 10)
    labels = np.concatenate([np.arange(10)[:, None] < row for row in ones]).astype(int)
    eta = ones / 10
    weights = tuple(random.uniform(0.5, 2.0, size=count).tolist())
    for objective, aggregation in (
        (LossAggregation(weights, "zero_one"), "loss"),
        (LossAggregation(weights, "zero_one", normalize=False), "label"),
        (LabelAggregation(weights, "zero_one"), "label"),
    ):
        orders, found = every_ranking(objective, kind, labels)
        best = best_scores(eta, aggregation, weights=weights)
        assert np.diff(np.sort(best)).min() > 1e-3, "two kinds are as good as one another"
        assert orders[found.argmin()].tolist() == best.argsort().argsort().tolist()


@pytest.mark.parametrize(
    ("objective", "expected"),
    [(LossAggregation(), (0.91, 1.0)), (LabelAggregation(), (0.955, 0.875))],
    ids=["loss", "label"],
)
def test_what_is_learned_is_the_best_ranking(objective, expected):
    optimizer = optax.adam(0.1)

    def step(state, _):
        scores, moments = state
        slope = jax.grad(lambda scores: loss_of(objective, scores))(scores)
        updates, moments = optimizer.update(slope, moments)
        return (optax.apply_updates(scores, updates), moments), None

    start = jnp.zeros(len(LABELS))
    (scores, _), _ = jax.lax.scan(step, (start, optimizer.init(start)), length=100)
    # Items of one sum are equal but for rounding.
    np.testing.assert_allclose(aucs(np.round(scores, 4), LABELS), expected, atol=1e-12)


def test_runs_side_by_side_differ_in_weights():
    random = np.random.default_rng(0)
    scores, labels = random.normal(size=12), random.integers(2, size=(12, 3))
    runs = [
        LossAggregation((1.0, 0.2, 3.0), "hinge"),
        LossAggregation((0.5, 2.0, 0.0), "hinge", 2.0),
    ]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(jnp.asarray(leaves)), *runs)
    slopes = jax.grad(lambda s, o: loss_of(o, s, labels))
    found = jax.vmap(slopes, in_axes=(None, 0))(jnp.asarray(scores, jnp.float32), stacked)
    for i, run in enumerate(runs):
        expected = slopes(jnp.asarray(scores, jnp.float32), run)
        assert np.isfinite(expected).all() and np.abs(expected).max() > 0
        np.testing.assert_allclose(found[i], expected, rtol=1e-5, atol=1e-7)


def test_one_label_is_one_problem():
    random = np.random.default_rng(1)
    scores, labels = random.normal(size=20), random.integers(2, size=(20, 1))
    for surrogate in ("logistic", "hinge", "zero_one"):
        one, other = (
            loss_of(make(surrogate=surrogate), scores, labels)
            for make in (LossAggregation, LabelAggregation)
        )
        np.testing.assert_allclose(one, other, rtol=1e-6)
    ranks = loss_of(LossAggregation(surrogate="zero_one"), scores, labels)
    assert 1 - ranks == pytest.approx(aucs(scores, labels)[0], abs=1e-6)


def test_a_label_of_one_value_has_no_auc():
    report = ranking_report([0.1, 0.2, 0.3], [[0, 1], [1, 1], [0, 1]], "ab")
    assert report["auc/a"] == 0.5
    for name in ("auc/b", "auc_mean", "auc_min", "auc_gap"):
        assert isinstance(report[name], Undefined)
        assert report[name].reason == "label 1 has items of one value only"
    assert "1 of 2 scores" in aucs([np.nan, 1.0], [[0], [1]])[0].reason


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: loss_of(LossAggregation((1.0,)), np.zeros(40)), "weights has 1 numbers"),
        (lambda: loss_of(LabelAggregation(), np.zeros(40), KIND), r"labels \[B, K\]"),
        (
            lambda: LossAggregation()(
                Outputs(jnp.zeros((40, 2)), jnp.zeros((40, 2))), {"labels": jnp.asarray(LABELS)}, {}
            ),
            "one output",
        ),
        (lambda: aucs([0.1, 0.2], [[0], [2]]), "zeros and ones"),
        (lambda: best_scores([[0.0, 0.5]], "loss"), "priors are"),
    ],
)
def test_what_cannot_be_ranked_is_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()
