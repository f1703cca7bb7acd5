"""RAIL's decision rules: reference numbers, independent implementations, limits and identities."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from regjax.decisions import (
    decide,
    from_samples,
    mean,
    median,
    minimum_bayes_risk,
    mode,
    temper,
    tempering_weights,
)
from regjax.errors import InputError

GRID = np.arange(1.0, 6.0)
P = np.array([0.35, 0.05, 0.05, 0.25, 0.30])

RULES = {
    "mean": lambda p, v: mean(p, v, normalize=True),
    "median": median,
    "mode": mode,
    "squared": lambda p, v: minimum_bayes_risk(p, v, squared),
}


def squared(truth, prediction):
    return (truth - prediction) ** 2


def absolute(truth, prediction):
    return abs(truth - prediction)


def wrong(truth, prediction):
    return jnp.where(truth == prediction, 0.0, 1.0)


def lists_of(elements, sizes):
    """Lists of few different lengths: every new shape is compiled again."""
    return st.sampled_from(sizes).flatmap(lambda n: st.lists(elements, min_size=n, max_size=n))


def counts():
    return lists_of(st.integers(0, 20), [1, 2, 7]).filter(any)


# The reference distribution.


def test_reference_decisions():
    np.testing.assert_allclose(mean(P, GRID), 3.10, rtol=1e-6)
    assert float(median(P, GRID)) == 4
    assert float(mode(P, GRID)) == 1


@pytest.mark.parametrize(
    ("prediction", "square", "distance"), [(1.0, 7.30, 2.10), (3.1, 2.89, 1.59), (4.0, 3.70, 1.50)]
)
def test_reference_risks_show_each_rule_best_at_its_own_loss(prediction, square, distance):
    np.testing.assert_allclose(np.sum(P * squared(GRID, prediction)), square, rtol=1e-12)
    np.testing.assert_allclose(np.sum(P * absolute(GRID, prediction)), distance, rtol=1e-12)
    fine = np.linspace(1, 5, 401)
    best = minimum_bayes_risk(P, GRID, squared, candidates=fine)
    np.testing.assert_allclose(best, 3.10, atol=1e-6)
    assert float(minimum_bayes_risk(P, GRID, absolute, candidates=fine)) == 4
    assert float(minimum_bayes_risk(P, GRID, wrong)) == 1


@pytest.mark.parametrize(
    ("temperature", "expected", "middle"),
    [(0.25, 2.6332099907, 1), (0.5, 2.9821428571, 4), (2, 3.0903994111, 4), (4, 3.0556848012, 3)],
)
def test_reference_tempered_decisions(temperature, expected, middle):
    tempered = temper(P, temperature)
    np.testing.assert_allclose(mean(tempered, GRID), expected, rtol=1e-6)
    assert float(median(tempered, GRID)) == middle


def test_reference_uniform_logits_over_a_larger_vocabulary():
    p = jax.nn.softmax(jnp.zeros(8))[:5]
    assert float(mean(p, GRID)) == 1.875
    assert float(mean(p, GRID, normalize=True)) == 3.0


def test_reference_mass_below_one():
    p = jax.nn.softmax(jnp.array([0.5, -0.2, 1.0, 0.3, -0.7, 2.0]))[:5]
    np.testing.assert_allclose(mean(p, GRID), 1.3399262454, rtol=1e-6)
    np.testing.assert_allclose(mean(p, GRID, normalize=True), 2.7478528148, rtol=1e-6)


# The facts about them.


@given(counts(), st.floats(-10, 10))
@settings(deadline=None, max_examples=30)
def test_excess_squared_risk_is_the_squared_distance_from_the_mean(n, prediction):
    p, v = np.array(n) / sum(n), np.arange(len(n)) * 1.5 - 2
    centre = float(mean(p, v))
    excess = np.sum(p * squared(v, prediction)) - np.sum(p * squared(v, centre))
    np.testing.assert_allclose(excess, (prediction - centre) ** 2, rtol=1e-5, atol=1e-4)


@given(counts())
@settings(deadline=None, max_examples=40)
def test_closed_forms_are_minimum_bayes_risk(n):
    p, v = np.array(n) / sum(n), np.arange(len(n)) * 1.5 - 2
    assert float(median(p, v)) == float(minimum_bayes_risk(p, v, absolute))
    assert float(mode(p, v)) == float(minimum_bayes_risk(p, v, wrong))


@pytest.mark.parametrize("name", RULES)
def test_temperature_to_zero_tends_to_the_mode(name):
    assert float(RULES[name](temper(P, 1e-3), GRID)) == pytest.approx(1, abs=1e-6)


def test_temperature_to_infinity_tends_to_the_average_of_the_support():
    assert float(mean(temper(P, np.inf), GRID)) == 3.0
    assert float(mean(temper([0.5, 0.0, 0.5, 0.0, 0.0], np.inf), GRID)) == 2.0
    np.testing.assert_array_equal(temper([0.9, 0.0, 0.1], 1e6)[1], 0.0)


@pytest.mark.parametrize("shift", [1e-4, 0.01, 0.2])
def test_a_nearly_right_model_may_decode_to_an_error_of_half_the_range(shift):
    """The truth is even between 0 and N; the decoded value is N, however small the shift to it."""
    values = np.array([0.0, 1000.0])
    decoded = mode(np.array([0.5 - shift, 0.5 + shift]), values)
    assert float((decoded - mean([0.5, 0.5], values)) ** 2) == 500.0**2


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("k", range(5))
def test_all_rules_agree_on_one_hot(rule, k):
    assert float(rule(np.eye(5)[k], GRID)) == GRID[k]


def test_mean_of_samples_is_unbiased_with_variance_over_their_number():
    drawn = np.array(list(itertools.product(GRID, repeat=3)))
    chance = np.prod(np.array(list(itertools.product(P, repeat=3))), axis=1)
    estimates = np.asarray(mean(*from_samples(drawn)[:2]), np.float64)
    np.testing.assert_allclose(chance @ estimates, 3.10, rtol=1e-6)
    np.testing.assert_allclose(chance @ (estimates - 3.10) ** 2, 2.89 / 3, rtol=1e-6)


def test_mean_has_the_highest_correlation_of_all_functions_of_the_input():
    numbers = np.random.default_rng(0).integers(1, 9, size=(6, 5))
    p = numbers / numbers.sum(axis=1, keepdims=True)
    # Every (x, y) as often as it happens, all x equally often.
    joint = (p / 6).ravel()
    y = np.tile(GRID, 6)

    def correlation(f):
        x = np.repeat(f, 5)
        a, b = x - joint @ x, y - joint @ y
        return joint @ (a * b) / np.sqrt((joint @ a**2) * (joint @ b**2))

    best = np.asarray(mean(p, GRID), np.float64)
    ceiling = np.sqrt(np.var(best) / (joint @ (y - joint @ y) ** 2))
    np.testing.assert_allclose(correlation(best), ceiling, rtol=1e-6)
    for rule in (median, mode):
        assert correlation(np.asarray(rule(p, GRID))) < ceiling
    for other in np.random.default_rng(1).normal(size=(50, 6)):
        assert correlation(other) < ceiling


def test_median_and_mode_follow_a_relabelling_of_the_grid_and_the_mean_does_not():
    labels = GRID**3
    assert float(median(P, labels)) == 4**3
    assert float(mode(P, labels)) == 1
    assert abs(float(mean(P, labels)) - 3.1**3) > 10


@given(counts(), st.floats(0.01, 1.0))
@settings(deadline=None, max_examples=30)
def test_only_the_unnormalised_mean_depends_on_the_mass(n, mass):
    p, v = np.array(n) / sum(n), np.arange(len(n)) + 1.0
    for rule in (median, mode):
        assert float(rule(mass * p, v)) == float(rule(p, v))
    assert float(minimum_bayes_risk(mass * p, v, absolute)) == float(median(p, v))
    np.testing.assert_allclose(mean(mass * p, v), mass * mean(p, v), rtol=1e-5)
    np.testing.assert_allclose(mean(mass * p, v, normalize=True), mean(p, v), rtol=1e-5)


# Independent implementations.


@given(
    lists_of(st.integers(-3, 6), [1, 2, 9, 20]),
    st.randoms(use_true_random=False),
)
@settings(deadline=None, max_examples=60)
def test_sample_rules_against_numpy_and_scipy(samples, random):
    samples = np.array(samples) / 2
    weights = np.array([random.randint(1, 9) for _ in samples])
    plain, weighted = from_samples(samples), from_samples(samples, weights)
    np.testing.assert_allclose(mean(*plain[:2]), np.mean(samples), rtol=1e-5, atol=1e-6)
    assert float(median(*plain[:2])) == np.quantile(samples, 0.5, method="inverted_cdf")
    assert float(mode(*plain[:2])) == scipy.stats.mode(samples).mode
    np.testing.assert_allclose(
        mean(*weighted[:2]), np.average(samples, weights=weights), rtol=1e-5, atol=1e-6
    )
    repeated = np.repeat(samples, weights)
    assert float(median(*weighted[:2])) == np.quantile(repeated, 0.5, method="inverted_cdf")
    assert float(mode(*weighted[:2])) == scipy.stats.mode(repeated).mode


@given(counts())
@settings(deadline=None, max_examples=40)
def test_a_grid_and_its_samples_decide_alike_in_any_order(n):
    v = np.arange(len(n)) * 0.5
    order = np.random.default_rng(0).permutation(len(n))
    samples = np.full(140, np.nan)
    samples[: sum(n)] = np.repeat(v, n)
    drawn = from_samples(np.random.default_rng(1).permutation(samples))

    def nearest_mean(p, values):
        return minimum_bayes_risk(p, values, squared, candidates=v)

    for rule in (RULES["mean"], median, mode, nearest_mean):
        decision = float(rule(n, v))
        assert float(rule(np.array(n)[order], v[order])) == pytest.approx(decision, rel=1e-6)
        assert float(rule(drawn.probabilities, drawn.values)) == pytest.approx(decision, rel=1e-5)


def test_half_the_mass_on_each_side_is_a_tie_for_the_lower_value_despite_rounding():
    for k in (2, 10, 14, 20, 46, 100):
        v = np.arange(k)
        assert float(median(np.full(k, 1 / k), v)) == k // 2 - 1
        assert float(mode(np.full(k, 1 / k), v)) == 0
    samples = np.tile([3.0, 1.0], 10)
    drawn = from_samples(samples, np.full(20, 0.05))
    assert float(median(drawn.probabilities, drawn.values)) == 1
    assert float(mode(drawn.probabilities, drawn.values)) == 1


def test_squared_error_over_samples_is_the_sample_nearest_their_mean():
    samples = np.random.default_rng(0).normal(size=(50, 16))
    decision = minimum_bayes_risk(*from_samples(samples)[:2], squared)
    nearest = np.argmin(abs(samples - samples.mean(axis=1, keepdims=True)), axis=1)
    np.testing.assert_allclose(decision, samples[np.arange(50), nearest], rtol=1e-6)


# Minimum Bayes risk in general.


def test_a_skewed_loss_gives_the_quantile():
    def pinball(truth, prediction):
        return jnp.maximum(0.9 * (truth - prediction), 0.1 * (prediction - truth))

    n = np.random.default_rng(2).integers(1, 50, size=(20, 11))
    expected = [np.quantile(np.repeat(np.arange(11), row), 0.9, method="inverted_cdf") for row in n]
    p = n / n.sum(axis=1, keepdims=True)
    np.testing.assert_array_equal(minimum_bayes_risk(p, np.arange(11), pinball), expected)


def test_infinite_loss_excludes_candidates_but_not_at_probability_zero():
    def forbids_overshooting(truth, prediction):
        return jnp.where(prediction > truth, jnp.inf, truth - prediction)

    p = np.array([[0.0, 0.0, 0.5, 0.0, 0.5], [1e-6, 0.0, 0.5, 0.0, 0.5]])
    np.testing.assert_array_equal(minimum_bayes_risk(p, GRID, forbids_overshooting), [3.0, 1.0])


def test_candidates_differ_from_item_to_item():
    candidates = np.array([[1.0, 2.0, 5.0], [4.5, 5.0, 5.5]])
    decision = minimum_bayes_risk(P, GRID, squared, candidates=candidates)
    np.testing.assert_array_equal(decision, [2.0, 4.5])


def test_decide_names_the_rules():
    assert float(decide(P, GRID)) == float(mean(P, GRID))
    assert float(decide(0.5 * P, GRID, normalize=True)) == pytest.approx(3.1, rel=1e-6)
    assert float(decide(P, GRID, "absolute_error")) == 4
    assert float(decide(P, GRID, "zero_one")) == 1
    assert float(decide(P, GRID, squared)) == 3
    with pytest.raises(InputError, match=r"'mse'.*'squared_error'"):
        decide(P, GRID, "mse")


# Tempering of samples.


def test_weights_temper_the_distribution_that_samples_come_from():
    # Each value as often as its probability says, so the weighted average is exact.
    samples = np.repeat(GRID, [7, 1, 1, 5, 6])
    log_probs = np.log(np.repeat(P, [7, 1, 1, 5, 6]))
    for temperature in (0.25, 0.5, 1.0, 2.0, 4.0):
        drawn = from_samples(samples, tempering_weights(log_probs, temperature))
        np.testing.assert_allclose(
            mean(drawn.probabilities, drawn.values),
            mean(temper(P, temperature), GRID),
            rtol=2e-6,
        )


def test_temperature_one_changes_nothing():
    np.testing.assert_allclose(temper(P, 1.0), P, rtol=1e-6)
    np.testing.assert_allclose(tempering_weights(np.log(P), 1.0), np.full(5, 0.2), rtol=1e-6)


def test_tempering_is_by_powers_in_a_row():
    np.testing.assert_allclose(temper(temper(P, 0.5), 3.0), temper(P, 1.5), rtol=1e-5)


def test_samples_without_a_probability_get_no_weight():
    weights = tempering_weights([np.log(0.5), np.nan, -np.inf, np.log(0.25)], 0.5)
    np.testing.assert_allclose(weights, [2 / 3, 0, 0, 1 / 3], rtol=1e-6)
    np.testing.assert_array_equal(tempering_weights([np.nan, -np.inf], 2.0), [0, 0])


def test_unlikely_answers_do_not_underflow():
    np.testing.assert_allclose(
        tempering_weights([-1000.0, -1000.0 + np.log(2)], 0.5), [1 / 3, 2 / 3], rtol=1e-4
    )


@pytest.mark.parametrize("temperature", [0, -1.0, np.nan, [1.0, 0.0]])
@pytest.mark.parametrize("function", [temper, tempering_weights])
def test_temperature_must_be_positive(function, temperature):
    with pytest.raises(InputError, match="above 0"):
        function([0.5, 0.5], temperature)


# Unparsable samples.

UNPARSABLE = np.array([[4.0, np.nan, 5.0, 3.0], [np.nan, np.nan, np.nan, np.nan]])


def test_dropped_samples_leave_the_rest():
    drawn = from_samples(UNPARSABLE)
    np.testing.assert_array_equal(drawn.unparsable, [1, 4])
    for rule in (RULES["mean"], median, mode, RULES["squared"]):
        one, none = rule(drawn.probabilities, drawn.values)
        assert float(one) == pytest.approx(3 if rule is mode else 4, rel=1e-6)
        assert np.isnan(none)


def test_zero_pulls_toward_zero():
    drawn = from_samples(UNPARSABLE, unparsable="zero")
    np.testing.assert_array_equal(drawn.unparsable, [1, 4])
    np.testing.assert_allclose(mean(drawn.probabilities, drawn.values), [3.0, 0.0], rtol=1e-6)
    np.testing.assert_array_equal(median(drawn.probabilities, drawn.values), [3.0, 0.0])


def test_error_says_how_many_and_where():
    with pytest.raises(InputError, match=r"5 of 8 samples .* index \(0, 1\)"):
        from_samples(UNPARSABLE, unparsable="error")
    clean = from_samples([1.0, 2.0], unparsable="error")
    assert float(mean(clean.probabilities, clean.values)) == 1.5
    with pytest.raises(ValueError, match="cannot be traced"):
        jax.jit(lambda s: from_samples(s, unparsable="error"))(UNPARSABLE)
    with pytest.raises(InputError, match="'ignore'"):
        from_samples(UNPARSABLE, unparsable="ignore")


def test_padding_is_not_counted_and_infinity_is():
    drawn = from_samples([2.0, np.inf, np.nan, 4.0], [1.0, 1.0, 0.0, 3.0])
    assert int(drawn.unparsable) == 1
    assert float(mean(drawn.probabilities, drawn.values)) == 3.5


# Shapes, tracing and bad input.


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_batches_jit_and_vmap_give_the_single_decisions(rule):
    p = np.random.default_rng(3).dirichlet(np.ones(5), size=(2, 3)).astype(np.float32)
    single = np.array([[float(rule(p[i, j], GRID)) for j in range(3)] for i in range(2)])
    for batched in (rule, jax.jit(rule), jax.vmap(rule, in_axes=(0, None))):
        decisions = batched(p, GRID)
        assert decisions.shape == (2, 3) and decisions.dtype == jnp.float32
        np.testing.assert_allclose(decisions, single, rtol=1e-6)
    per_item = np.broadcast_to(GRID, p.shape)
    np.testing.assert_allclose(rule(p, per_item), single, rtol=1e-6)
    np.testing.assert_allclose(rule(P, per_item), np.full((2, 3), rule(P, GRID)), rtol=1e-6)


def test_samples_are_traceable_with_their_policy():
    jitted = jax.jit(lambda s: mean(*from_samples(s)[:2], normalize=True))
    np.testing.assert_allclose(jitted(UNPARSABLE), [4.0, np.nan], rtol=1e-6)


def test_half_precision_is_decided_in_float32():
    p = jnp.asarray(P, jnp.bfloat16)
    assert mean(p, GRID).dtype == jnp.float32
    np.testing.assert_allclose(mean(p, GRID), np.sum(np.asarray(p, np.float32) * GRID), rtol=1e-6)


def test_gradient_of_the_mean():
    np.testing.assert_allclose(jax.grad(mean)(jnp.asarray(P), GRID), GRID)
    p = jnp.asarray(0.5 * P)
    gradient = jax.grad(lambda p: mean(p, GRID, normalize=True))(p)
    np.testing.assert_allclose(gradient, (GRID - 3.1) / 0.5, rtol=1e-5)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_no_mass_and_not_a_number_give_not_a_number(rule):
    assert np.isnan(rule(np.zeros(5), GRID))
    assert np.isnan(rule(np.full(5, np.nan), GRID))


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize(("p", "v"), [(P, GRID[:4]), (0.5, 1.0), ([], [])])
def test_shapes_that_do_not_fit_are_named(rule, p, v):
    with pytest.raises(ValueError, match="same last axis"):
        rule(p, v)


def test_weights_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"\(3,\) do not fit samples \(2, 4\)"):
        from_samples(UNPARSABLE, np.ones(3))
