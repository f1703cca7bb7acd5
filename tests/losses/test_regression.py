"""Losses on a score grid: published formulas' values, gradients, limits and identities.

Values printed with eight to ten digits were computed in float64 from the papers' formulas.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats

from regjax import decisions
from regjax.losses import (
    expected_risk,
    expected_score,
    grid_log_probs,
    grid_mass,
    histogram_levels,
    number_token,
    raft,
    soft_label_loss,
    token_cross_entropy,
    two_hot,
)
from regjax.scores import TokenGrid

VALUES = np.array([1.0, 2.0, 3.0, 4.0, 5.0], np.float32)
FIRST_FIVE = TokenGrid(np.arange(5, dtype=np.int32)[:, None], np.ones((5, 1), bool), VALUES)
DIGITS = np.arange(10, dtype=np.float32)
# The digits as tokens 9, 8, ..., 0 of a vocabulary of twelve.
DIGIT_TOKENS = TokenGrid(
    np.arange(9, -1, -1, dtype=np.int32)[:, None], np.ones((10, 1), bool), DIGITS
)
UNEVEN = np.array([-3.0, 0.0, 0.5, 4.0, 20.0], np.float32)
MULTI = TokenGrid(
    tokens=np.array([[1, 5, 0], [2, 0, 0], [1, 0, 4]], np.int32),
    mask=np.array([[1, 1, 0], [1, 0, 0], [1, 1, 1]], bool),
    values=np.array([1.5, 2.0, 10.0], np.float32),
)
Z = np.array([0.5, -0.2, 1.0, 0.3, -0.7, 2.0], np.float32)

close = functools.partial(np.testing.assert_allclose, rtol=2e-6, atol=2e-7)


@functools.cache
def compiled(function, **options):
    return jax.jit(jax.value_and_grad(functools.partial(function, **options)))


def value_and_gradient(function, logits, target, codec, /, **options):
    codec = jnp.asarray(codec) if isinstance(codec, list) else codec
    return compiled(function, **options)(jnp.asarray(logits), target, codec)


def probability_rows(count, size, seed):
    return np.random.default_rng(seed).dirichlet(np.ones(size), count)


def targets_and_log_probs(size, bound=6.0):
    return st.tuples(
        hnp.arrays(np.float32, (4,), elements=st.floats(-5, 25, width=32)),
        hnp.arrays(np.float32, (4, size), elements=st.floats(-bound, bound, width=32)),
    )


# Reference values and gradients.


def test_uniform_logits():
    value, gradient = value_and_gradient(raft, np.zeros(8), 4.0, FIRST_FIVE)
    close(expected_score(np.zeros(8), FIRST_FIVE), 1.875)
    close(value, 4.515625)
    expected = [0.46484375, -0.06640625, -0.59765625, -1.12890625, -1.66015625]
    close(gradient, expected + 3 * [0.99609375])
    value, gradient = value_and_gradient(raft, np.zeros(8), 4.0, FIRST_FIVE, normalize=True)
    close(expected_score(np.zeros(8), FIRST_FIVE, normalize=True), 3.0)
    close(value, 1.0)
    close(gradient, [0.8, 0.4, 0.0, -0.4, -0.8, 0.0, 0.0, 0.0])


def test_spread_logits_unnormalized():
    probs = np.exp(grid_log_probs(Z, FIRST_FIVE))
    close(probs, [0.11432595, 0.05677259, 0.18849162, 0.09360217, 0.03443431])
    close(1 - probs.sum(), 0.51237336)
    close(grid_mass(Z, FIRST_FIVE), 0.4876266437)
    close(expected_score(Z, FIRST_FIVE), 1.3399262454)
    value, gradient = value_and_gradient(raft, Z, 4.0, FIRST_FIVE)
    close(value, 7.0759923799)
    close(
        gradient,
        [0.20675365, -0.19936771, -1.66472735, -1.32465649, -0.67050952, 3.65250741],
    )
    close(np.sum(gradient), 0.0, atol=2e-6)
    # The loss of a model before training is the squared error of its decision without training.
    close(value, (decisions.mean(probs, VALUES) - 4.0) ** 2)


def test_spread_logits_normalized():
    close(expected_score(Z, FIRST_FIVE, normalize=True), 2.7478528148)
    value, gradient = value_and_gradient(raft, Z, 4.0, FIRST_FIVE, normalize=True)
    close(value, 1.5678725734)
    close(gradient[:5], [1.02623689, 0.21804833, -0.24408671, -0.60192066, -0.39827785])
    assert gradient[5] == 0.0
    close(expected_risk(Z, 4.0, FIRST_FIVE), 3.0329553221)
    close(expected_risk(Z, 4.0, FIRST_FIVE) - value, 1.4650827487)


def test_spread_logits_cross_entropy():
    close(token_cross_entropy(Z, 3), 2.3687017081)
    close(token_cross_entropy(Z[:5], 3), 1.6504964677)


def test_risks_of_the_decision_rules():
    log_probs = np.log([0.35, 0.05, 0.05, 0.25, 0.30])
    close(expected_score(log_probs, VALUES), 3.10)
    for decision, squared, absolute in ((1.0, 7.30, 2.10), (3.1, 2.89, 1.59), (4.0, 3.70, 1.50)):
        close(expected_risk(log_probs, decision, VALUES), squared)
        close(expected_risk(log_probs, decision, VALUES, loss="absolute"), absolute)


def test_number_token_on_uniform_digits():
    logits = np.append(np.zeros(10), [np.log(5.0), np.log(5.0)])
    close(grid_mass(logits, DIGIT_TOKENS), 0.5)
    close(number_token(logits, 4.0, DIGIT_TOKENS), 2.5)
    close(number_token(logits, 4.0, DIGIT_TOKENS, kind="mse"), 0.25)
    close(number_token(logits, 4.0, DIGIT_TOKENS, reweigh=True), 5.795)
    close(
        number_token(logits, 4.0, DIGIT_TOKENS, kind="mse", reweigh=True),
        0.5 * 0.25 + 1.01 * 81 * 0.5,
    )


def test_squashed_distances_of_the_number_token_loss():
    with np.errstate(divide="ignore"):
        sure = np.log(np.eye(10)[[0, 1, 5, 9]])
    close(number_token(sure, np.zeros(4), DIGITS, squash=2.0), [0.0, 1.0, 1.5, 2.0])
    # The digits' own distances, from 1 to 9, are a factor of nine.
    log_probs = np.log(probability_rows(6, 10, seed=7))
    labels = np.array([0, 3, 9, 5, 5, 1])
    close(
        number_token(log_probs, labels, DIGITS, squash=9.0), number_token(log_probs, labels, DIGITS)
    )
    # In any order of the values; in any unit; continuous next to a value; of two values, one.
    order = np.random.default_rng(8).permutation(10)
    close(
        number_token(log_probs[:, order], 7 * labels, 7 * DIGITS[order], squash=3.0),
        number_token(log_probs, labels, DIGITS, squash=3.0),
    )
    close(number_token(sure[0], 1e-4, DIGITS, squash=3.0), 1e-4)
    close(number_token(np.log([0.25, 0.75]), 2.0, [2.0, 5.0], squash=3.0), 0.75)
    close(number_token(np.log([0.25, 0.5, 0.25]), 2.0, [2.0, 5.0, 5.0], squash=3.0), 0.75)
    half = np.log(np.full(10, 0.05))
    distances = 1 + (np.array([4, 3, 2, 1, 1, 2, 3, 4, 5]) - 1) / 8
    close(
        number_token(half, 4.0, DIGITS, squash=2.0, reweigh=True),
        0.5 * distances.sum() / 10 + 1.01 * 2.0 * 0.5,
    )


def test_number_token_mse_has_a_spurious_minimum_and_wasserstein_has_not():
    halves = np.where(np.isin(DIGITS, [0, 8]), 0.0, -np.inf).astype(np.float32)
    value, gradient = value_and_gradient(number_token, halves, 4.0, DIGITS, kind="mse")
    assert value == 0.0
    np.testing.assert_array_equal(gradient, np.zeros(10))
    close(number_token(halves, 4.0, DIGITS), 4.0)


# Identities.


@settings(deadline=None, max_examples=40)
@given(targets_and_log_probs(len(UNEVEN)))
def test_expected_risk_is_raft_plus_the_variance(case):
    targets, log_probs = case
    probs = np.exp(np.asarray(log_probs, np.float64))
    probs /= probs.sum(-1, keepdims=True)
    variance = probs @ UNEVEN.astype(np.float64) ** 2 - (probs @ UNEVEN) ** 2
    error = raft(log_probs, targets, UNEVEN, normalize=True)
    risk = expected_risk(log_probs, targets, UNEVEN)
    np.testing.assert_allclose(risk, error + variance, rtol=1e-5, atol=1e-4)
    assert np.all(error <= risk + 1e-3)


@settings(deadline=None, max_examples=40)
@given(targets_and_log_probs(len(UNEVEN)))
def test_number_token_is_the_wasserstein_distance_with_the_true_gaps(case):
    targets, log_probs = case
    weights = np.exp(np.asarray(log_probs, np.float64))
    expected = [
        stats.wasserstein_distance(UNEVEN, [target], u_weights=row)
        for target, row in zip(targets, weights, strict=True)
    ]
    losses = number_token(log_probs, targets, UNEVEN)
    np.testing.assert_allclose(losses, expected, rtol=5e-6, atol=1e-5)
    predictions = expected_score(log_probs, UNEVEN, normalize=True)
    assert np.all(losses >= np.abs(predictions - targets) - 1e-4)


def test_on_unit_gaps_number_token_is_the_sum_of_differences_of_cumulative_sums():
    probs = probability_rows(20, 10, seed=2)
    targets = np.arange(20) % 10
    target_cdf = targets[:, None] <= DIGITS
    expected = np.abs(np.cumsum(probs, -1) - target_cdf).sum(-1)
    close(number_token(np.log(probs), targets, DIGITS), expected)


@settings(deadline=None, max_examples=25)
@given(
    hnp.arrays(np.float32, (4, 12), elements=st.floats(-6, 6, width=32)),
    hnp.arrays(np.int32, (4,), elements=st.integers(0, 9)),
)
def test_number_token_is_absolute_risk_and_its_mse_is_normalized_raft(logits, targets):
    np.testing.assert_array_equal(
        number_token(logits, targets, DIGIT_TOKENS),
        expected_risk(logits, targets, DIGIT_TOKENS, loss="absolute"),
    )
    np.testing.assert_array_equal(
        number_token(logits, targets, DIGIT_TOKENS, kind="mse"),
        raft(logits, targets, DIGIT_TOKENS, normalize=True),
    )


def test_expected_risk_of_log_probabilities_is_linear_in_the_probabilities():
    first, second = probability_rows(2, 5, seed=3)
    for loss in ("squared", "absolute", "huber"):
        risks = expected_risk(
            np.log([first, second, 0.3 * first + 0.7 * second]),
            np.full(3, 2.7),
            VALUES,
            loss=loss,
        )
        close(risks[2], 0.3 * risks[0] + 0.7 * risks[1])


def test_the_minimiser_of_the_risk_is_one_hot_at_the_value_nearest_to_the_mean():
    labels = np.array([1.0, 2.0, 2.0, 5.0, 5.0, 5.0])  # mean 10/3
    rows = np.concatenate([np.eye(5), probability_rows(200, 5, seed=4)])
    with np.errstate(divide="ignore"):
        log_probs = np.log(rows)
    risks = jax.vmap(lambda row: expected_risk(jnp.tile(row, (6, 1)), labels, VALUES).mean())(
        jnp.asarray(log_probs)
    )
    assert np.argmin(risks) == 2
    assert np.sum(risks <= risks[2]) == 1


def test_the_minimiser_of_the_wasserstein_loss_is_one_hot_at_the_median():
    labels = np.array([1.0, 2.0, 2.0, 2.0, 5.0, 5.0, 5.0])
    rows = np.concatenate([np.eye(5), probability_rows(200, 5, seed=5)])
    with np.errstate(divide="ignore"):
        log_probs = np.log(rows)
    losses = jax.vmap(lambda row: number_token(jnp.tile(row, (7, 1)), labels, VALUES).mean())(
        jnp.asarray(log_probs)
    )
    assert VALUES[np.argmin(losses)] == np.median(labels) == 2.0
    assert np.sum(losses <= losses[1]) == 1


def test_raft_is_stationary_and_zero_at_every_distribution_with_the_targets_mean():
    rows = [[0.25, 0.0, 0.0, 0.0, 0.75], [0.0, 0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.5, 0.0, 0.5]]
    with np.errstate(divide="ignore"):
        log_probs = np.log(rows).astype(np.float32)
    for normalize in (False, True):
        for row in log_probs:
            value, gradient = value_and_gradient(raft, row, 4.0, VALUES, normalize=normalize)
            close(value, 0.0)
            close(gradient, np.zeros(5), atol=2e-6)


def test_the_error_of_several_answers_is_that_of_their_mean_plus_their_variance():
    log_probs = np.log(probability_rows(40, 5, seed=9))
    predictions = np.asarray(expected_score(log_probs, VALUES), np.float64)
    errors = raft(log_probs, np.full(40, 3.7), VALUES)
    close(errors.mean(), (predictions.mean() - 3.7) ** 2 + predictions.var())
    # Of certain answers the mean score is the mean of the digits that they would be decoded to.
    digits = np.random.default_rng(10).integers(0, 5, 40)
    with np.errstate(divide="ignore"):
        sure = np.log(np.eye(5)[digits])
    close(expected_score(sure, VALUES).mean(), VALUES[digits].mean())


def test_the_ends_of_the_range_reach_every_real_target():
    share = (3.7 - 1.0) / (5.0 - 1.0)
    close(raft(np.log([1 - share, share]), 3.7, [1.0, 5.0], normalize=True), 0.0)


@pytest.mark.parametrize("label", range(5))
def test_all_grid_losses_and_cross_entropy_vanish_at_the_right_one_hot(label):
    logits = np.full(8, -1e4, np.float32)
    logits[label] = 1e4
    target = VALUES[label]
    losses = [
        raft(logits, target, FIRST_FIVE),
        raft(logits, target, FIRST_FIVE, normalize=True),
        expected_risk(logits, target, FIRST_FIVE),
        expected_risk(logits, target, FIRST_FIVE, normalize=False),
        number_token(logits, target, FIRST_FIVE),
        number_token(logits, target, FIRST_FIVE, kind="mse"),
        number_token(logits, target, FIRST_FIVE, reweigh=True),
        token_cross_entropy(logits, label),
        soft_label_loss(logits, two_hot(target, FIRST_FIVE), FIRST_FIVE),
        soft_label_loss(
            logits, histogram_levels(target, np.arange(0.5, 6.0), sigma=1e-3), FIRST_FIVE
        ),
    ]
    np.testing.assert_array_equal(losses, np.zeros(10))


def test_at_a_wrong_one_hot_raft_is_large_without_gradient_and_cross_entropy_is_not():
    logits = np.full(8, -1e4, np.float32)
    logits[0] = 1e4
    value, gradient = value_and_gradient(raft, logits, 5.0, FIRST_FIVE)
    assert value == 16.0
    np.testing.assert_array_equal(gradient, np.zeros(8))
    gradient = jax.grad(lambda z: token_cross_entropy(z, 4))(jnp.asarray(logits))
    np.testing.assert_array_equal(gradient, [1, 0, 0, 0, -1, 0, 0, 0])


def test_the_absolute_loss_has_a_zero_gradient_at_its_minimum():
    log_probs = np.log([0.5, 0.5]).astype(np.float32)
    value, gradient = value_and_gradient(raft, log_probs, 2.0, [1.0, 3.0], loss="absolute")
    assert value == 0.0
    np.testing.assert_array_equal(gradient, [0.0, 0.0])


def test_huber_is_half_the_square_inside_delta_and_delta_times_the_distance_far_outside():
    log_probs = np.log(probability_rows(20, 5, seed=6))
    targets = np.linspace(0, 8, 20)
    squared = raft(log_probs, targets, VALUES)
    absolute = raft(log_probs, targets, VALUES, loss="absolute")
    close(raft(log_probs, targets, VALUES, loss="huber", delta=100.0), squared / 2)
    tiny = raft(log_probs, targets, VALUES, loss="huber", delta=1e-3)
    np.testing.assert_allclose(tiny, 1e-3 * (absolute - 0.5e-3), rtol=1e-5)


def test_leaving_the_grid_lowers_the_unnormalized_risk_but_never_the_reweighed_loss():
    off_grid = np.zeros((50, 6), np.float32)
    off_grid[:, 5] = np.linspace(-10, 10, 50)
    off_grid[:, 0] = 30.0  # the worst value for a target of 5
    targets = np.full(50, 5.0)
    off_grid[:, 5] += 30.0
    assert np.all(np.diff(expected_risk(off_grid, targets, FIRST_FIVE, normalize=False)) < 0)
    close(expected_risk(off_grid, targets, FIRST_FIVE), np.full(50, 16.0))
    for kind in ("wasserstein", "mse"):
        losses = number_token(off_grid, targets, FIRST_FIVE, kind=kind, reweigh=True)
        assert np.all(np.diff(losses) > 0)
