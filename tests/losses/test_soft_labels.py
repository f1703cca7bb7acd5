"""Soft labels: published and computed numbers, limits, tails, and what their loss is."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

from regjax.losses import expected_score, raft
from regjax.losses.soft_labels import gaussian_levels, histogram_levels, soft_label_loss, two_hot
from regjax.scores import ScoreGrid, TokenGrid

FIVE = np.arange(1.0, 6.0)
EDGES = np.arange(0.5, 6.0)


@functools.cache
def compiled(**options):
    return jax.jit(lambda mu, s: gaussian_levels(mu, s, FIVE, **options))


def levels(means, deviations, **options):
    return np.asarray(compiled(**options)(means, deviations))


def close(found, expected, atol=1e-6):
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=atol)


def test_two_hot_has_the_mean_of_its_target_at_any_spacing():
    values = np.array([-2.0, 0.5, 1.0, 4.0, 10.0])
    targets = np.array([-2.0, -1.0, 0.5, 0.6, 3.99, 4.0, 10.0], np.float32)
    labels = np.asarray(two_hot(targets, values))
    close(labels @ values, targets)
    close(labels.sum(-1), 1.0)
    assert ((labels > 0).sum(-1) == [1, 2, 1, 2, 2, 1, 1]).all()
    assert (labels >= 0).all()
    close(labels[3], [0, 0.8, 0.2, 0, 0])
    close(two_hot(3.2, FIVE), [0, 0, 0.8, 0.2, 0])


def test_two_hot_of_targets_off_the_range_is_its_end():
    np.testing.assert_array_equal(two_hot([0.0, -1e4, 1e4], FIVE), np.eye(5)[[0, 0, 4]])


def test_two_hot_takes_every_form_of_a_grid():
    expected = two_hot(2.5, FIVE)
    np.testing.assert_array_equal(two_hot(2.5, ScoreGrid.integers(1, 5)), expected)
    np.testing.assert_array_equal(two_hot(2.5, TokenGrid.from_ids(range(5), FIVE)), expected)
    np.testing.assert_array_equal(jax.jit(two_hot)(2.5, jnp.asarray(FIVE)), expected)


def test_gaussian_levels_are_the_computed_ones():
    # Of the levels 5, 4, 3, 2, 1.
    close(
        levels(3.4, 0.6)[::-1],
        [0.03283555, 0.40091297, 0.50006049, 0.06579789, 0.00039310],
    )
    raw = np.array([0.03314388, 0.40043966, 0.49937663, 0.06603622, 0.00077031])
    close(np.diff(stats.norm.cdf(EDGES, 3.4, 0.6))[::-1], raw, atol=1e-8)
    close(levels(3.4, 0.6)[::-1], 1.00212808 * raw - 0.00037886)
    cut = levels(3.4, 0.6, kind="pdf", renormalize=False)
    close(cut[::-1], [0.01796001, 0.40503634, 0.53510099, 0.04284893, 0.0])
    close(cut.sum(), 1.00094628)
    close(levels(3.4, 0.6, kind="pdf"), cut / 1.00094628)
    labels = np.asarray(levels(3.4, 0.6))
    close(labels @ FIVE, 3.4)
    close(np.sqrt(labels @ (FIVE - 3.4) ** 2), 0.66304, atol=5e-6)


def adjusted(mu, s, kind):
    """The formula in float64, without the limit, for means off the middle."""
    densities = stats.norm.pdf(FIVE, mu, s)
    p = np.diff(stats.norm.cdf(EDGES, mu, s)) if kind == "cdf" else densities
    scale = (mu - 3) / (p @ FIVE - 3 * p.sum())
    q = np.maximum(scale * p + (1 - scale * p.sum()) / 5, 0)
    return q / q.sum()


bins = jax.jit(lambda targets, sigma: histogram_levels(targets, EDGES, sigma=sigma))


@pytest.mark.parametrize("kind", ["cdf", "pdf"])
@pytest.mark.parametrize("deviation", [0.3, 0.6, 1.2])
def test_gaussian_levels_follow_the_formula_up_to_and_through_the_middle(kind, deviation):
    offsets = np.array([-0.9, -0.3, -0.02, -0.004, 1e-3, 0.01, 0.05, 0.5])
    means = (3 + offsets).astype(np.float32)
    found = levels(means, np.full(8, deviation), kind=kind, tolerance=np.inf)
    expected = [adjusted(mu, deviation, kind) for mu in means.astype(float)]
    # Next to the middle the scale is a quotient of small numbers, or its limit to second order.
    np.testing.assert_allclose(found, expected, atol=5e-5)
    # 1e-6 beside the middle is well inside float64.
    middle = levels(3.0, deviation, kind=kind, tolerance=np.inf)
    close(middle, adjusted(3 + 1e-6, deviation, kind), atol=2e-6)
    assert np.ptp(middle) > 0.1
    close(np.asarray(middle) @ FIVE, 3.0)


def test_narrow_or_misplaced_gaussians_become_two_hot():
    means = np.array([3.2, 1.05, 7.0, 60.0])
    labels = levels(means, np.array([0.19, 0.6, 0.6, 0.6]))
    close(labels[0], [0, 0, 0.8, 0.2, 0])
    close(labels[2:], np.eye(5)[[4, 4]])
    near = levels(1.05, 0.6, tolerance=0.0)
    close(near, [0.95, 0.05, 0, 0, 0])
    assert np.isfinite(labels).all()
    wide = levels(3.2, 0.19, narrow=0.1, tolerance=np.inf)
    assert abs(wide[2] - 0.8) > 1e-3


def test_gaussian_levels_are_in_units_of_the_values():
    found = gaussian_levels(0.6, 0.15, [0.0, 0.25, 0.5, 0.75, 1.0])
    close(found, gaussian_levels(3.4, 0.6, FIVE))


def test_histogram_levels_are_the_computed_ones():
    cases = {
        (3.2, 0.25): ([0, 0.00255513, 0.8823752, 0.11506957, 1e-7], 3.11251464),
        (3.2, 0.75): ([0.01156054, 0.16382202, 0.48069454, 0.30343673, 0.04048618], 3.19746599),
        (5.0, 0.75): ([0.00000205, 0.00057194, 0.02986067, 0.30734463, 0.66222071], 4.63121003),
    }
    for (target, sigma), (expected, mean) in cases.items():
        labels = bins(target, sigma)
        # The last digit of the tables.
        np.testing.assert_allclose(labels, expected, rtol=2e-6, atol=2e-8)
        close(np.asarray(labels) @ FIVE, mean)
    close(bins(3.2, 2.0) @ FIVE, 3.08172304)


def test_histogram_tails_are_exact_far_beyond_the_edges():
    targets, sigma = np.array([-4.0, 0.5, 9.0, 12.0, 30.0]), 0.75
    found = np.asarray(bins(targets, sigma), np.float64)
    for target, labels in zip(targets, found, strict=True):
        log_cdf = stats.norm.logcdf(EDGES, target, sigma)
        log_sf = stats.norm.logsf(EDGES, target, sigma)
        upper = EDGES[:-1] > target
        larger = np.where(upper, log_sf[:-1], log_cdf[1:])
        logs = larger + np.log(-np.expm1(np.where(upper, log_sf[1:], log_cdf[:-1]) - larger))
        expected = np.exp(logs - np.logaddexp.reduce(logs))
        # float32 rounds the logarithms of the tails, here up to 800.
        slack = 4e-7 * np.abs(logs).max()
        kept = expected > 1e-30
        np.testing.assert_allclose(labels[kept], expected[kept], rtol=max(slack, 2e-6))
    np.testing.assert_array_equal(
        histogram_levels([1e4, -1e4], EDGES, sigma=0.25), np.eye(5)[[4, 0]]
    )


def test_a_narrow_histogram_is_the_one_hot_of_the_bin():
    labels = histogram_levels([0.6, 2.4, 3.2, 5.4], EDGES, sigma=1e-3)
    np.testing.assert_array_equal(labels, np.eye(5)[[0, 1, 2, 4]])
    each = histogram_levels([3.2, 5.0], EDGES, sigma=np.array([0.25, 0.75]))
    close(each[1], histogram_levels(5.0, EDGES, sigma=0.75))


def test_the_loss_is_that_of_optax_on_a_vocabulary_that_is_the_grid():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(4, 5)), rng.dirichlet(np.ones(5), 4)
    codec = TokenGrid.from_ids(range(5), FIVE)
    close(
        soft_label_loss(logits, labels, codec), optax.losses.softmax_cross_entropy(logits, labels)
    )
    found = soft_label_loss(logits, labels, codec, kind="kl")
    close(found, optax.losses.kl_divergence(jax.nn.log_softmax(logits), labels))
    # Adding to the grid's logits does not change what is normalised over it.
    wide = np.concatenate([logits + 3.0, rng.normal(size=(4, 2))], axis=1)
    codec = TokenGrid.from_ids(range(5), FIVE)
    close(
        soft_label_loss(wide, labels, codec, normalize=True),
        soft_label_loss(logits, labels, FIVE, normalize=True),
    )
    assert (soft_label_loss(wide, labels, codec) > found).all()


def test_kl_is_zero_for_equal_distributions_and_the_loss_reads_several_tokens():
    codec = TokenGrid(
        tokens=np.array([[1, 3], [2, 0], [0, 0]], np.int32),
        mask=np.array([[1, 1], [1, 0], [1, 0]], bool),
        values=np.array([1.0, 2.0, 3.0]),
    )
    logits = np.random.default_rng(1).normal(size=(2, 3, 2, 4))
    log_p = jax.nn.log_softmax(logits)
    of_texts = np.stack(
        [log_p[:, 0, 0, 1] + log_p[:, 0, 1, 3], log_p[:, 1, 0, 2], log_p[:, 2, 0, 0]], axis=-1
    )
    labels = np.asarray(jax.nn.softmax(of_texts))
    close(soft_label_loss(logits, labels, codec), -(labels * of_texts).sum(-1))
    close(soft_label_loss(logits, labels, codec, kind="kl", normalize=True), 0.0)


def test_two_hot_cross_entropy_has_the_mean_that_raft_looks_for():
    targets = np.array([1.3, 3.0, 4.6, 2.2])
    labels = np.asarray(two_hot(targets, FIVE)).mean(0)
    logits = np.log(labels)
    slope = jax.grad(
        lambda z: soft_label_loss(
            jnp.broadcast_to(z, (4, 5)), two_hot(targets, FIVE), FIVE, normalize=True
        ).sum()
    )
    close(slope(logits), 0.0, atol=2e-6)
    close(expected_score(logits, FIVE, normalize=True), targets.mean())
    pulls = jax.grad(
        lambda z: raft(jnp.broadcast_to(z, (4, 5)), targets, FIVE, normalize=True).sum()
    )
    close(pulls(logits), 0.0, atol=2e-6)


def test_labels_carry_no_gradient():
    def total(y):
        labels = two_hot(y, FIVE) + gaussian_levels(y, 0.6, FIVE)
        return jnp.sum((labels + histogram_levels(y, EDGES, sigma=0.5)) * FIVE)

    assert jax.grad(total)(3.3) == 0.0


def test_what_does_not_fit_raises_by_name():
    with pytest.raises(ValueError, match=r"values must ascend.*\[2.0, 1.0\]"):
        two_hot(1.0, [2.0, 1.0])
    with pytest.raises(ValueError, match=r"values must be evenly spaced"):
        gaussian_levels(1.0, 1.0, [1.0, 2.0, 4.0])
    with pytest.raises(ValueError, match=r"means have shape \(2,\), but deviations \(3,\)"):
        gaussian_levels(np.ones(2), np.ones(3), FIVE)
    with pytest.raises(ValueError, match="kind must be 'cdf' or 'pdf'; got 'erf'"):
        gaussian_levels(1.0, 1.0, FIVE, kind="erf")
    with pytest.raises(ValueError, match="edges must ascend"):
        histogram_levels(1.0, [1.0, 1.0], sigma=1.0)
    with pytest.raises(ValueError, match="sigma must be positive; got 0"):
        histogram_levels(1.0, EDGES, sigma=0)
    with pytest.raises(ValueError, match=r"sigma has shape \(3,\)"):
        histogram_levels(np.ones(2), EDGES, sigma=np.ones(3))
    with pytest.raises(ValueError, match=r"soft_labels have shape \(4,\); expected \[..., 5\]"):
        soft_label_loss(np.zeros(5), np.ones(4), FIVE)
    with pytest.raises(TypeError, match="soft_labels must be floating"):
        soft_label_loss(np.zeros(5), np.ones(5, int), FIVE)
    with pytest.raises(ValueError, match="'cross_entropy' or 'kl'; got 'js'"):
        soft_label_loss(np.zeros(5), np.ones(5), FIVE, kind="js")
