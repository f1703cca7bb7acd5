"""Metrics against SciPy, scikit-learn, integration by brute force, and what they must not do."""

import json
import pickle

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import cohen_kappa_score, mean_absolute_error, root_mean_squared_error

from regjax.errors import InputError
from regjax.metrics import (
    Interval,
    Undefined,
    accuracy_within,
    bootstrap,
    coverage,
    crps,
    kendall,
    mae,
    mean_grid_mass,
    pearson,
    quadratic_weighted_kappa,
    regression_report,
    rmse,
    spearman,
)

GRID = np.arange(1.0, 6.0)
P = np.array([0.35, 0.05, 0.05, 0.25, 0.30])
PAIR_METRICS = {
    "rmse": rmse,
    "mae": mae,
    "pearson": pearson,
    "spearman": spearman,
    "kendall": kendall,
    "accuracy_within": accuracy_within,
    "kappa": lambda p, t: quadratic_weighted_kappa(p, t, GRID),
}
CORRELATIONS = {name: PAIR_METRICS[name] for name in ("pearson", "spearman", "kendall")}

pairs = st.lists(
    st.tuples(st.integers(4, 20).map(lambda i: i / 4), st.floats(1, 5)), min_size=2, max_size=30
).map(lambda rows: tuple(np.array(rows).T))


# Independent implementations.


@given(pairs)
@settings(deadline=None, max_examples=60)
def test_errors_and_correlations_against_scipy_and_scikit_learn(pair):
    p, t = pair
    np.testing.assert_allclose(rmse(p, t), root_mean_squared_error(t, p), rtol=1e-12)
    np.testing.assert_allclose(mae(p, t), mean_absolute_error(t, p), rtol=1e-12)
    if np.ptp(p) > 1e-6 and np.ptp(t) > 1e-6:
        np.testing.assert_allclose(pearson(p, t), np.corrcoef(p, t)[0, 1], rtol=1e-6, atol=1e-9)
        tau = scipy.stats.kendalltau(p, t).statistic
        np.testing.assert_allclose(kendall(p, t), tau, rtol=1e-12)
        if len(p) > 2:
            rho = scipy.stats.spearmanr(p, t).statistic
            np.testing.assert_allclose(spearman(p, t), rho, rtol=1e-9, atol=1e-12)


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=2, max_size=30))
@settings(deadline=None, max_examples=60)
def test_kappa_against_scikit_learn(rows):
    p, t = np.array(rows).T
    if np.ptp(np.array(rows)):
        expected = cohen_kappa_score(t, p, weights="quadratic", labels=[1, 2, 3, 4, 5])
        np.testing.assert_allclose(
            quadratic_weighted_kappa(p, t, GRID), expected, rtol=1e-9, atol=1e-12
        )


def test_kappa_rounds_both_sides_to_the_grid():
    rounded = quadratic_weighted_kappa([1, 3, 5, 2], [1, 3, 4, 3], GRID)
    assert quadratic_weighted_kappa([0.2, 2.5, 9, 2.49], [1.4, 3.2, 4, 2.8], GRID) == rounded
    tenths = quadratic_weighted_kappa([0.1, 0.3, 0.5, 0.2], [0.1, 0.3, 0.4, 0.3], GRID / 10)
    assert tenths == pytest.approx(rounded, rel=1e-12)


def test_kappa_of_a_constant_is_chance():
    assert quadratic_weighted_kappa([3, 3, 3], [1, 3, 5], GRID) == 0
    assert quadratic_weighted_kappa([1, 5], [5, 1], GRID) == -1


def distance_form(p, values, target):
    p = p / p.sum()
    spread = np.sum(np.outer(p, p) * abs(values[:, None] - values[None, :]))
    return np.sum(p * abs(values - target)) - spread / 2


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=7).filter(any),
    st.lists(st.integers(-8, 30), min_size=7, max_size=7, unique=True),
    st.floats(-5, 12),
)
@settings(deadline=None, max_examples=80)
def test_crps_is_its_distance_form_on_any_grid_for_any_target(n, values, target):
    p, values = np.array(n, float), np.array(values[: len(n)]) / 4
    expected = distance_form(p, values, target)
    np.testing.assert_allclose(crps([p], values, [target]), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("target", [-1.0, 1.0, 2.3, 4.0, 5.0, 7.5])
def test_crps_is_the_integral_of_the_squared_difference(target):
    width = 1e-4
    x = np.arange(-3, 9, width) + width / 2
    f = np.sum(P[:, None] * (GRID[:, None] <= x), axis=0)
    integral = np.sum((f - (target <= x)) ** 2) * width
    np.testing.assert_allclose(crps([P], GRID, [target]), integral, atol=1e-9)


def test_crps_of_one_value_is_the_absolute_error():
    predictions, targets = np.array([0, 3, 4]), np.array([2.5, 4.0, 0.5])
    expected = mae(GRID[predictions], targets)
    assert crps(np.eye(5)[predictions], GRID, targets) == pytest.approx(expected, rel=1e-12)


def test_crps_is_proper_and_indifferent_to_mass_and_order():
    truth = np.array([0.2, 0.3, 0.5])
    targets = np.array([1.0, 2.0, 3.0])

    def expected_score(p):
        return sum(w * crps([p], targets, [y]) for w, y in zip(truth, targets, strict=True))

    best = expected_score(truth)
    for other in np.random.default_rng(0).dirichlet(np.ones(3), size=50):
        assert expected_score(other) > best
    assert expected_score(0.1 * truth) == pytest.approx(best, rel=1e-12)
    shuffled = crps([P[[3, 0, 4, 1, 2]]], [GRID[[3, 0, 4, 1, 2]]], [2.2])
    assert shuffled == pytest.approx(crps([P], GRID, [2.2]), rel=1e-12)


def test_coverage_of_the_true_distribution():
    # Every target as often as the distribution says: shares are exact.
    targets = np.repeat(GRID, [7, 1, 1, 5, 6])
    p = np.tile(P, (20, 1))
    assert coverage(p, GRID, targets, 0.9) == 1.0
    # The quarter and three-quarter points are 1 and 5.
    assert coverage(p, GRID, targets, 0.5) == 1.0
    # CDF .35 .40 .45 .70 1: the 44% and 56% points are 3 and 4.
    assert coverage(p, GRID, targets, 0.12) == pytest.approx(6 / 20)
    assert coverage(p, GRID, targets + 0.5, 0.12) == pytest.approx(1 / 20)


@given(st.lists(st.integers(0, 9), min_size=2, max_size=7).filter(any), st.floats(0.05, 0.95))
@settings(deadline=None, max_examples=60)
def test_a_calibrated_distribution_covers_at_least_the_level(n, level):
    values = np.arange(len(n)) / 2
    targets = np.repeat(values, n)
    p = np.tile(np.array(n) / sum(n), (len(targets), 1)).astype(np.float32)
    assert coverage(p, values, targets, level) >= level - 1e-5


def test_coverage_of_uniform_quantiles():
    # 100 equal values and intervals whose ends are the values at the 5% and 95% points.
    values = np.arange(1.0, 101.0)
    p = np.full((100, 100), 0.01)
    assert coverage(p, values, values, 0.9) == pytest.approx(0.91)
    assert coverage(p.astype(np.float32), values, values, 0.9) == pytest.approx(0.91)


def test_accuracy_within_counts_the_edge_in_despite_rounding():
    targets = np.arange(0, 5, 0.1)
    assert accuracy_within((targets + 0.1).astype(np.float32), targets, 0.1) == 1
    assert accuracy_within(targets + 0.101, targets, 0.1) == 0
    assert accuracy_within([1, 2, 3, 4], [1, 2, 3, 5], 0) == 0.75


def test_mean_grid_mass():
    assert mean_grid_mass([[0.2, 0.3], [0.5, 0.5]]) == pytest.approx(0.75)


# Undefined values.


@pytest.mark.parametrize("metric", CORRELATIONS.values(), ids=CORRELATIONS)
@pytest.mark.parametrize(
    ("predictions", "targets", "reason"),
    [
        ([3.1, 3.1, 3.1], [1, 2, 3], "the predictions are constant"),
        ([1, 2, 3], [0.1, 0.1, 0.1], "the targets are constant"),
        ([1], [2], "a correlation needs at least two items"),
        ([], [], "there are no items"),
        ([1, np.nan, 2], [1, 2, 3], "1 of 3 predictions are not finite"),
        ([1, 2, 3], [1, np.inf, -np.inf], "2 of 3 targets are not finite"),
    ],
)
def test_correlations_say_why_they_are_not_defined(metric, predictions, targets, reason):
    value = metric(predictions, targets)
    assert np.isnan(value) and value.reason == reason


def test_predictions_constant_up_to_rounding_have_no_linear_correlation():
    assert pearson(np.full(4, 0.1) * [1, 1 + 1e-15, 1, 1], [1, 2, 3, 4]).reason.endswith("constant")
    assert pearson([3, 3 + 1e-7, 3, 3], [1, 2, 1, 1]) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("metric", PAIR_METRICS.values(), ids=PAIR_METRICS)
def test_no_items_and_not_finite_are_undefined_everywhere(metric):
    assert metric([], []).reason == "there are no items"
    assert metric([1, -np.inf], [1, 2]).reason == "1 of 2 predictions are not finite"


def test_kappa_and_distributions_say_why_they_are_not_defined():
    assert "one value" in quadratic_weighted_kappa([3, 3], [3.2, 2.9], GRID).reason
    nothing = np.stack([P, np.zeros(5), np.full(5, np.nan)])
    for metric in (crps, coverage):
        assert metric(nothing, GRID, [1, 2, 3]).reason == "2 of 3 distributions have no mass"
        assert metric(np.zeros((0, 5)), GRID, []).reason == "there are no items"
        assert metric([P], GRID, [np.nan]).reason == "1 of 1 targets are not finite"
    assert mean_grid_mass(np.zeros((0, 5))).reason == "there are no items"


def test_undefined_is_a_float_that_can_be_stored():
    undefined = Undefined("why")
    assert isinstance(undefined, float) and undefined != undefined
    assert json.dumps({"r": undefined}) == '{"r": NaN}'
    assert pickle.loads(pickle.dumps(undefined)).reason == "why"
    assert f"{undefined:.3f}" == "nan" and repr(undefined) == "nan (why)"
    assert np.isnan(np.mean([undefined, 1.0]))


@given(
    st.lists(
        st.tuples(*[st.sampled_from([0.0, -1.0, 1.0, 3.0, 1e-9, 1e9, np.nan, np.inf, -np.inf])] * 2)
    )
)
@settings(deadline=None, max_examples=100)
def test_no_input_crashes_or_warns_and_correlations_stay_in_range(rows):
    p, t = np.array(rows, float).reshape(-1, 2).T
    report = regression_report(p, t, values=GRID, not_finite="drop")
    for value in report.values():
        assert isinstance(value, float)
        assert not np.isnan(value) or value.reason
    for name in CORRELATIONS:
        assert np.isnan(report[name]) or abs(report[name]) <= 1 + 1e-12


# Bootstrap.


def test_bootstrap_of_a_mean_of_bits_is_binomial():
    # Binomial(10, 1/2): 2.5% lies inside the jump at 2, 97.5% inside the jump at 8.
    assert scipy.stats.binom.ppf([0.025, 0.975], 10, 0.5).tolist() == [2, 8]
    bits = np.array([0, 1] * 5)
    assert bootstrap(np.mean, bits, resamples=4000) == Interval(0.2, 0.8)


def test_bootstrap_is_scipys_percentile_method_on_the_same_resamples():
    generator = np.random.default_rng(5)
    t = generator.normal(size=40)
    p = t + generator.normal(size=40)
    ours = bootstrap(pearson, p, t, resamples=300, level=0.8, seed=7)
    again = np.random.default_rng(7)
    chosen = [again.integers(40, size=40) for _ in range(300)]
    drawn = [np.corrcoef(p[i], t[i])[0, 1] for i in chosen]
    np.testing.assert_allclose(ours, np.quantile(drawn, [0.1, 0.9]), rtol=1e-9)
    assert ours.low < pearson(p, t) < ours.high
    assert bootstrap(pearson, p, t, resamples=300, level=0.8, seed=7) == ours
    assert bootstrap(pearson, p, t, resamples=300, level=0.8, seed=8) != ours
    wider = bootstrap(pearson, p, t, resamples=300, level=0.99, seed=7)
    assert wider.low < ours.low and ours.high < wider.high


def test_bootstrap_keeps_rows_together():
    generator = np.random.default_rng(6)
    p, t = generator.dirichlet(np.ones(5), size=30), generator.uniform(1, 5, size=30)
    paired = bootstrap(lambda a, b, y: rmse(a, y) - rmse(b, y), t + 0.5, t - 0.5, t, resamples=50)
    np.testing.assert_allclose(paired, [0, 0], atol=1e-12)
    interval = bootstrap(lambda p, t: crps(p, GRID, t), p, t, resamples=200)
    assert interval.low < crps(p, GRID, t) < interval.high


def test_bootstrap_without_a_defined_metric_says_so():
    interval = bootstrap(pearson, [3, 3, 3], [1, 2, 3], resamples=20)
    assert interval.low.reason == "the metric is not defined on 20 of 20 resamples"
    assert bootstrap(rmse, [], []).low.reason == "there are no items"
    # With three items one resample in nine is constant, and only those are left out.
    assert bootstrap(pearson, [1, 2, 3], [1, 2, 3], resamples=200) == pytest.approx((1, 1))


# The report.


def test_report_is_the_metrics_by_name():
    generator = np.random.default_rng(7)
    mass = 0.5 * generator.dirichlet(np.ones(5), size=50)
    targets = generator.uniform(1, 5, size=50)
    predictions = 2 * mass @ GRID
    report = regression_report(predictions, targets, probabilities=mass, values=GRID, tolerance=1)
    assert report == {
        "count": 50.0,
        "not_finite": 0.0,
        "target_std": rmse(np.full(50, targets.mean()), targets),
        "rmse": rmse(predictions, targets),
        "mae": mae(predictions, targets),
        "pearson": pearson(predictions, targets),
        "spearman": spearman(predictions, targets),
        "kendall": kendall(predictions, targets),
        "accuracy_within": accuracy_within(predictions, targets, 1),
        "quadratic_weighted_kappa": quadratic_weighted_kappa(predictions, targets, GRID),
        "crps": crps(mass, GRID, targets),
        "coverage_90": coverage(mass, GRID, targets, 0.9),
        "grid_mass": pytest.approx(0.5),
    }
    assert list(regression_report([1, 2], [1, 3]))[-1] == "accuracy_within"


def test_report_with_intervals_brackets_every_metric():
    generator = np.random.default_rng(8)
    mass = generator.uniform(0.5, 1, size=(60, 1)) * generator.dirichlet(np.ones(5), size=60)
    targets = generator.uniform(1, 5, size=60)
    predictions = targets + generator.normal(size=60)
    report = regression_report(
        predictions, targets, probabilities=mass, values=GRID, intervals=True
    )
    names = [name for name in report if f"{name}_low" in report]
    assert len(names) == 10 and len(report) == 3 + 3 * len(names)
    for name in names:
        assert report[f"{name}_low"] < report[name] < report[f"{name}_high"]
    interval = bootstrap(pearson, predictions, targets)
    assert (report["pearson_low"], report["pearson_high"]) == interval


def test_report_keeps_or_drops_what_is_not_a_number():
    predictions, targets = np.array([1, np.nan, 3, 4.5]), np.array([1, 2, 3, 4.0])
    mass, values = np.tile(P, (4, 1)), np.tile(GRID, (4, 1))
    kept = regression_report(predictions, targets, probabilities=mass, values=values)
    assert kept["count"] == 4 and kept["not_finite"] == 1
    assert kept["rmse"].reason == "1 of 4 predictions are not finite"
    assert kept["crps"] == crps(mass, GRID, targets)
    dropped = regression_report(
        predictions, targets, probabilities=mass, values=values, not_finite="drop"
    )
    assert dropped["count"] == 3 and dropped["not_finite"] == 1
    assert dropped["rmse"] == rmse([1, 3, 4.5], [1, 3, 4])
    assert dropped["crps"] == crps(mass[:3], GRID, [1, 3, 4])


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"predictions \(2,\) and targets \(3,\)"):
        rmse([1, 2], [1, 2, 3])
    with pytest.raises(ValueError, match=r"probabilities \(5,\)"):
        crps(P, GRID, [1.0])
    with pytest.raises(ValueError, match=r"values \(4,\)"):
        coverage([P], GRID[:4], [1.0])
    with pytest.raises(ValueError, match="need their values"):
        regression_report([1, 2], [1, 2], probabilities=[P, P])
    with pytest.raises(ValueError, match=r"\[2, 3\] items"):
        bootstrap(rmse, [1, 2], [1, 2, 3])
    with pytest.raises(InputError, match="level is 90"):
        coverage([P], GRID, [1.0], level=90)
    with pytest.raises(InputError, match="level is 95"):
        bootstrap(rmse, [1, 2], [1, 2], level=95)
