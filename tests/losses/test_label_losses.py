"""What holds for every loss of logits and labels, each against its formula in float64 NumPy."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from regjax.losses.early_learning import early_learning
from regjax.losses.label_distribution import label_distributionally_robust
from regjax.losses.long_tail import ldam, logit_adjusted, softmax_focal, vector_scaling
from regjax.losses.noise_robust import (
    active_passive,
    bootstrapping,
    generalized_cross_entropy,
    normalized_cross_entropy,
    reverse_cross_entropy,
    squentropy,
    symmetric_cross_entropy,
)
from regjax.losses.smoothing import label_smearing
from regjax.losses.tokens import token_cross_entropy
from regjax.losses.worst_case import cost_weighted_distillation

K = 4
COUNTS = np.array([50.0, 30.0, 15.0, 5.0])
COSTS = np.array([0.25, 2 / 3, 1.5, 4.0])
MATRIX = np.array([[0.7, 0.2, 0.1, 0], [0, 0.9, 0.1, 0], [0.3, 0.1, 0.5, 0.1], [0.2, 0, 0.2, 0.6]])
TARGETS = np.array(
    [[0.5, 0.3, 0.1, 0.1], [0.0, 0.6, 0.2, 0.2], [0.2, 0.2, 0.2, 0.4], [0.1, 0.0, 0.1, 0.8]]
)


def log_softmax(z):
    z = z - z.max()
    return z - np.log(np.exp(z).sum())


def log_rest(z, y):
    others = np.delete(log_softmax(z), y)
    return others.max() + np.log(np.exp(others - others.max()).sum())


def entropy(z):
    return -np.sum(np.exp(log_softmax(z)) * log_softmax(z))


def ce(z, y):
    return -log_softmax(z)[y]


def gce(q):
    return lambda z, y: -np.expm1(-q * ce(z, y)) / q


def rce(z, y):
    return np.log(1e-4) * np.expm1(-ce(z, y))


def nce(z, y):
    return ce(z, y) / -log_softmax(z).sum()


def forward(column):
    def loss(z, y):
        possible = column(y) > 0
        log_terms = np.log(column(y)[possible]) + log_softmax(z)[possible]
        top = log_terms.max()
        return -top - np.log(np.exp(log_terms - top).sum())

    return loss


def ldr(z, y, temperature, margin):
    v = z - z[y] + margin * (np.arange(K) != y)
    top = v.max()
    return top + temperature * np.log(np.mean(np.exp((v - top) / temperature)))


def sym(a):
    return lambda y: (1 - a) * np.eye(K)[y] + a / K


def with_rows(loss, rows):
    """A loss with an array `[..., K]` per example, here one row of `rows` per label."""
    rows = jnp.asarray(rows)

    def of_labels(z, y, where=None):
        return loss(z, y, jnp.take(rows, y, axis=0), where=where)

    return of_labels


def distilled(z, y, targets, *, where=None):
    del y
    return cost_weighted_distillation(z, targets, COSTS, where=where)


P = functools.partial
CASES = {
    "cross_entropy": (token_cross_entropy, ce),
    "smoothed_cross_entropy": (
        P(token_cross_entropy, label_smoothing=0.3),
        lambda z, y: -sym(0.3)(y) @ log_softmax(z),
    ),
    "smoothing": (P(label_smearing, rate=0.3), lambda z, y: -sym(0.3)(y) @ log_softmax(z)),
    "negative_smoothing": (P(label_smearing, rate=-2.0), lambda z, y: -sym(-2)(y) @ log_softmax(z)),
    "backward": (
        P(label_smearing, rate=0.3, kind="backward"),
        lambda z, y: -sym(-0.3 / 0.7)(y) @ log_softmax(z),
    ),
    "forward": (P(label_smearing, rate=0.3, kind="forward"), forward(sym(0.3))),
    "forward_at_zero": (P(label_smearing, rate=0.0, kind="forward"), ce),
    "complementary": (
        P(label_smearing, rate=4 / 3, kind="forward"),
        lambda z, y: np.log(3) - log_rest(z, y),
    ),
    "smoothing_matrix": (
        P(label_smearing, rate=MATRIX),
        lambda z, y: -MATRIX[y] @ log_softmax(z),
    ),
    "backward_matrix": (
        P(label_smearing, rate=MATRIX, kind="backward"),
        lambda z, y: -np.linalg.inv(MATRIX)[y] @ log_softmax(z),
    ),
    "forward_matrix": (
        P(label_smearing, rate=MATRIX, kind="forward"),
        forward(lambda y: MATRIX[:, y]),
    ),
    "gce": (generalized_cross_entropy, gce(0.7)),
    "gce_at_zero": (P(generalized_cross_entropy, q=0.0), ce),
    "truncated_gce": (
        P(generalized_cross_entropy, threshold=0.2),
        lambda z, y: min(gce(0.7)(z, y), (1 - 0.2**0.7) / 0.7),
    ),
    "reverse": (reverse_cross_entropy, rce),
    "symmetric": (symmetric_cross_entropy, lambda z, y: 0.1 * ce(z, y) + rce(z, y)),
    "normalized": (normalized_cross_entropy, nce),
    "active_passive": (
        P(active_passive, active_weight=2.0, passive_weight=0.5),
        lambda z, y: 2 * nce(z, y) + 0.5 * rce(z, y),
    ),
    "soft_bootstrapping": (
        P(bootstrapping, label_weight=0.7),
        lambda z, y: 0.7 * ce(z, y) + 0.3 * entropy(z),
    ),
    "hard_bootstrapping": (
        P(bootstrapping, kind="hard"),
        lambda z, y: 0.8 * ce(z, y) + 0.2 * -log_softmax(z).max(),
    ),
    "squentropy": (
        squentropy,
        lambda z, y: ce(z, y) + np.sum(np.delete(z, y) ** 2) / (K - 1),
    ),
    "early_learning": (
        with_rows(early_learning, TARGETS),
        lambda z, y: ce(z, y) + 3 * np.log(max(np.exp(log_softmax(z)) @ (1 - TARGETS[y]), 1e-4)),
    ),
    "ldr": (
        P(label_distributionally_robust, temperature=0.5, margin=0.7),
        P(ldr, temperature=0.5, margin=0.7),
    ),
    "logit_adjusted": (
        P(logit_adjusted, counts=COUNTS, tau=1.5),
        lambda z, y: ce(z + 1.5 * np.log(COUNTS), y),
    ),
    "ldam": (
        P(ldam, counts=COUNTS, scale=5.0),
        lambda z, y: ce(5 * (z - 0.5 * (COUNTS / 5) ** -0.25 * np.eye(K)[y]), y),
    ),
    "focal": (
        softmax_focal,
        lambda z, y: np.exp(2 * log_rest(z, y)) * ce(z, y),
    ),
    "vector_scaling": (
        P(vector_scaling, counts=COUNTS, gamma=0.4),
        lambda z, y: ce(z * (COUNTS / 50) ** 0.4 + np.log(COUNTS), y),
    ),
    "cost_weighted": (
        with_rows(distilled, TARGETS),
        lambda z, y: -TARGETS[y] @ log_softmax(z - np.log(COSTS)),
    ),
}
LOSSES = {name: loss for name, (loss, _) in CASES.items()}
WITH_LABELS = {name: loss for name, loss in LOSSES.items() if name != "cost_weighted"}

# Of a vocabulary of one token, too.
TOKENS = ("cross_entropy", "smoothed_cross_entropy")

LOGITS = np.array(
    [
        [2.0, 1.0, 0.1, -1.0],
        [0.3, 2.5, -0.4, 0.8],
        [-1.2, 0.6, 1.9, 0.2],
        [3.1, -2.0, 0.7, 2.2],
        [0.4, 0.1, -0.3, 0.9],
        [-0.8, 1.4, 0.5, -2.6],
    ],
    np.float32,
)
LABELS = np.array([0, 1, 2, 3, 0, 2])
ALL = np.ones(6, bool)
NONE = np.zeros(6, bool)


@functools.cache
def compiled(name):
    loss = LOSSES[name]

    def total(z, y, where):
        losses = loss(z, y, where=where)
        return losses.sum(), losses

    gradient = jax.jit(jax.grad(total, has_aux=True))

    def of(z, y=LABELS, where=ALL):
        gradients, losses = gradient(z, y, where)
        return losses, gradients

    return of


def central_differences(formula, z, y, step=1e-5):
    moves = step * np.eye(K)
    return np.array([(formula(z + e, y) - formula(z - e, y)) / (2 * step) for e in moves])


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_those_of_the_formula_in_float64(name):
    formula = CASES[name][1]
    for labels in (LABELS, (LABELS + 1) % K):
        losses, gradients = compiled(name)(LOGITS, labels)
        exact = LOGITS.astype(np.float64)
        expected = [formula(z, y) for z, y in zip(exact, labels, strict=True)]
        np.testing.assert_allclose(losses, expected, rtol=5e-6, atol=1e-6)
        slopes = [central_differences(formula, z, y) for z, y in zip(exact, labels, strict=True)]
        np.testing.assert_allclose(gradients, slopes, rtol=2e-5, atol=3e-6)


@pytest.mark.parametrize("name", CASES)
def test_examples_that_do_not_count_have_zero_loss_and_gradient_even_if_not_finite(name):
    where = np.array([True, False, True, False, False, True])
    broken = np.array(LOGITS)
    broken[1], broken[3], broken[4] = np.nan, np.inf, [-np.inf, 0, np.nan, np.inf]
    labels = np.where(where, LABELS, -100)
    losses, gradients = compiled(name)(broken, labels, where)
    expected, slopes = compiled(name)(LOGITS)
    np.testing.assert_array_equal(losses, np.where(where, expected, 0.0))
    np.testing.assert_array_equal(gradients, np.where(where[:, None], slopes, 0.0))
    losses, gradients = compiled(name)(np.full_like(LOGITS, np.nan), labels, NONE)
    np.testing.assert_array_equal(losses, np.zeros(6))
    np.testing.assert_array_equal(gradients, np.zeros((6, K)))


def test_examples_that_do_not_count_leave_the_gradient_of_a_trained_parameter():
    where = np.array([True, False, True, False, False, True])

    def total(rate, z, y, **options):
        return label_smearing(z, y, rate, **options).sum()

    labels = np.where(where, LABELS, -100)
    slope = jax.grad(total)(0.2, LOGITS, labels, where=where)
    expected = jax.grad(total)(0.2, LOGITS[where], LABELS[where])
    np.testing.assert_allclose(slope, expected, rtol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_extreme_logits_have_finite_losses_and_gradients(name):
    formula = CASES[name][1]
    extreme = np.concatenate([1e4 * np.eye(K)[:3], -1e4 * np.eye(K)[:3]]).astype(np.float32)
    extreme[1, 3] = -1e4
    for labels in ([0, 1, 2, 0, 1, 2], [1, 2, 3, 3, 3, 3], [3, 3, 0, 2, 0, 1]):
        losses, gradients = compiled(name)(extreme, np.array(labels))
        expected = [formula(z.astype(float), y) for z, y in zip(extreme, labels, strict=True)]
        np.testing.assert_allclose(losses, expected, rtol=5e-6, atol=1e-6)
        assert np.isfinite(gradients).all()


@pytest.mark.parametrize("name", CASES)
def test_bfloat16_logits_are_read_in_float32(name):
    half = jnp.asarray(LOGITS, jnp.bfloat16)
    losses, gradients = compiled(name)(half)
    chex.assert_type([losses, gradients], [jnp.float32, jnp.bfloat16])
    expected, slopes = compiled(name)(half.astype(jnp.float32))
    np.testing.assert_allclose(losses, expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(
        gradients.astype(jnp.float32), slopes, rtol=2**-8, atol=1e-6
    )  # one rounding to eight bits


@pytest.mark.parametrize("name", CASES)
def test_one_loss_per_example_whatever_the_leading_shape(name):
    loss = LOSSES[name]
    losses, _ = compiled(name)(LOGITS)
    single = jax.jit(loss)
    looped = [single(z, y) for z, y in zip(LOGITS, LABELS, strict=True)]
    chex.assert_shape(looped, ())
    np.testing.assert_allclose(looped, losses, rtol=2e-6, atol=1e-6)
    np.testing.assert_allclose(
        jax.jit(jax.vmap(loss))(LOGITS, LABELS), losses, rtol=2e-6, atol=1e-6
    )
    shaped = loss(LOGITS.reshape(2, 3, K), LABELS.reshape(2, 3))
    chex.assert_shape(shaped, (2, 3))
    np.testing.assert_allclose(shaped, losses.reshape(2, 3), rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("name", WITH_LABELS)
def test_labels_out_of_range_give_nan_and_only_there(name):
    labels = np.array([0, -1, 2, 4, 0, -100])
    losses, _ = compiled(name)(LOGITS, labels)
    np.testing.assert_array_equal(np.isnan(losses), (labels < 0) | (labels >= K))


@pytest.mark.parametrize("name", CASES)
def test_shapes_and_types_that_do_not_fit_raise(name):
    loss = LOSSES[name]
    with pytest.raises(TypeError, match="logits must be floating; got int"):
        loss(LOGITS.astype(int), LABELS)
    with pytest.raises(ValueError, match=r"where has shape \(6, 1\)"):
        loss(LOGITS, LABELS, where=ALL[:, None])
    with pytest.raises(ValueError, match=r"labels have shape \(5,\)|targets \(5, 4\)"):
        loss(LOGITS, LABELS[:5])
    if name in WITH_LABELS and name != "early_learning":
        with pytest.raises(TypeError, match="labels must be integers; got float"):
            loss(LOGITS, LABELS.astype(np.float32))
    if name in WITH_LABELS and name not in ("early_learning", *TOKENS):
        with pytest.raises(ValueError, match=r"logits have shape \(6, 1\).*K at least 2"):
            loss(LOGITS[:, :1], LABELS)
