"""Weights of distributionally robust objectives: published values, limits, optimality."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from regjax.losses.example_weights import (
    chi_square_weights,
    cvar_dual,
    cvar_weights,
    group_dro,
    kl_weights,
)

V = np.array([0.5, 0.1, 2.0, 0.2, 1.0])

close = functools.partial(np.testing.assert_allclose, rtol=2e-6, atol=2e-7)

WEIGHTS = {
    "cvar": functools.partial(cvar_weights, fraction=0.45),
    "chi_square": functools.partial(chi_square_weights, radius=0.7),
    "kl": functools.partial(kl_weights, temperature=0.6),
}


@pytest.mark.parametrize(
    ("fraction", "value"),
    [(1, 0.76), (0.8, 0.925), (0.5, 1.3), (0.4, 1.5), (0.3, 5 / 3), (0.2, 2.0), (0.1, 2.0)],
)
def test_conditional_value_at_risk(fraction, value):
    weights = cvar_weights(V, fraction=fraction)
    close(weights @ V, value)
    close(weights.sum(), 1.0)
    assert np.all(weights <= 1 / min(1.0, fraction * 5) + 1e-6)
    # The dual form, minimised over the threshold.
    thresholds = np.linspace(-1, 3, 4001)[:, None]
    dual = cvar_dual(
        np.tile(V, (4001, 1)), np.broadcast_to(thresholds, (4001, 5)), fraction=fraction
    )
    if fraction >= 0.2:
        close(dual.mean(axis=1).min(), value, atol=1e-5)
    else:
        close(dual.mean(axis=1).min(), 2.0, atol=1e-2)


def test_the_worst_have_their_share_and_the_next_the_rest():
    close(cvar_weights(V, fraction=0.5), [0.2, 0.0, 0.4, 0.0, 0.4])
    close(cvar_weights(np.full(4, 3.0), fraction=0.5), [0.5, 0.5, 0.0, 0.0])


def test_gradients_of_the_dual():
    into_losses = jax.grad(lambda v: cvar_dual(v, 0.4, fraction=0.5).sum())(jnp.asarray(V))
    close(into_losses, [2.0, 0.0, 2.0, 0.0, 2.0])
    into_threshold = jax.grad(lambda t: cvar_dual(V, t, fraction=0.5).sum())(0.4)
    close(into_threshold, 5.0 - 3 * 2.0)
    where = np.array([True, False, True, True, False])
    broken = np.where(where, V, np.nan)
    masked = cvar_dual(broken, 0.4, fraction=0.5, where=where)
    close(masked, np.where(where, cvar_dual(V, 0.4, fraction=0.5), 0.0))
    slope = jax.grad(lambda v: cvar_dual(v, 0.4, fraction=0.5, where=where).sum())(broken)
    close(slope, [2.0, 0.0, 2.0, 0.0, 0.0])


@pytest.mark.parametrize(
    ("temperature", "value"), [(0.1, 1.8390607813), (1.0, 1.0355044147), (10.0, 0.7845922935)]
)
def test_tilted_risk(temperature, value):
    weights = np.asarray(kl_weights(V, temperature=temperature), float)
    divergence = np.sum(weights * np.log(5 * np.maximum(weights, 1e-300)))
    close(weights @ V - temperature * divergence, value)
    direct = temperature * np.log(np.mean(np.exp(V / temperature)))
    close(direct, value, rtol=1e-9)


def test_limits_of_the_tilted_weights():
    close(kl_weights(V, temperature=1e-3), np.eye(5)[2])
    close(kl_weights(V, temperature=1e6), np.full(5, 0.2), rtol=1e-5)


def test_limits_of_the_chi_square_ball():
    close(chi_square_weights(V, radius=0.0), np.full(5, 0.2))
    close(chi_square_weights(V, radius=1e-10), np.full(5, 0.2), rtol=1e-4)
    close(chi_square_weights(V, radius=2.0), np.eye(5)[2], atol=1e-5)
    close(chi_square_weights(V, radius=50.0), np.eye(5)[2])
    close(chi_square_weights(np.full(5, 1.3), radius=0.5), np.full(5, 0.2))
    # Two equal largest share the weight.
    close(chi_square_weights(np.array([3.0, 1.0, 3.0]), radius=9.0), [0.5, 0.0, 0.5])


def test_chi_square_weights_where_no_example_loses_its_weight():
    radius = 0.1
    spread = np.sqrt(np.mean((V - V.mean()) ** 2))
    expected = (1 + np.sqrt(2 * radius) * (V - V.mean()) / spread) / 5
    assert expected.min() > 0
    close(chi_square_weights(V, radius=radius), expected)


def sorted_solution(losses, radius):
    """Of the k largest losses the threshold that meets the ball, for the k that it belongs to."""
    top = np.sort(losses)[::-1]
    for k in range(1, len(top) + 1):
        tightness = k * (1 + 2 * radius) / len(top) - 1
        if tightness <= 0:
            continue
        threshold = top[:k].mean() - top[:k].std() / np.sqrt(tightness)
        if threshold < top[k - 1] and (k == len(top) or threshold >= top[k]):
            weights = np.maximum(losses - threshold, 0.0)
            return weights / weights.sum()
    raise AssertionError("no threshold")


@functools.cache
def compiled_ball(radius):
    return jax.jit(functools.partial(chi_square_weights, radius=radius))


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**32 - 1), radius=st.sampled_from([0.05, 0.4, 1.0]))
def test_chi_square_weights_are_the_worst_in_their_ball(seed, radius):
    rng = np.random.default_rng(seed)
    losses = rng.normal(size=5).astype(np.float32)
    weights = np.asarray(compiled_ball(radius)(losses), float)
    close(weights, sorted_solution(losses.astype(float), radius), rtol=1e-4, atol=1e-5)
    assert 0.5 * np.mean((5 * weights - 1) ** 2) <= radius + 1e-5
    others = rng.dirichlet(np.ones(5), 200)
    inside = 0.5 * np.mean((5 * others - 1) ** 2, axis=1) <= radius
    assert np.all(others[inside] @ losses <= weights @ losses + 1e-5)


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_of_the_examples_that_count(name):
    weights = jax.jit(WEIGHTS[name])
    where = np.array([[True, True, False, True, True], [False] * 5, [True] * 5])
    rng = np.random.default_rng(1)
    # Below zero, which is what the losses that do not count are set to.
    losses = np.stack([V, V, rng.normal(size=5)]).astype(np.float32) - 8.0
    broken = np.where(where, losses, np.nan)
    broken[1, 2:] = np.inf
    all_rows = weights(broken, where=where)
    close(all_rows[0][where[0]], WEIGHTS[name](losses[0][where[0]]))
    np.testing.assert_array_equal(all_rows[~where], 0.0)
    close(all_rows.sum(axis=-1), [1.0, 0.0, 1.0])
    close(jax.vmap(weights)(losses), weights(losses))
    close(weights(losses)[2], all_rows[2])
    order = rng.permutation(5)
    close(weights(losses[2][order]), weights(losses[2])[order])


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_have_no_gradient_and_the_objective_has_that_of_the_robust_risk(name):
    def objective(v):
        return jnp.sum(WEIGHTS[name](v) * v)

    losses = jnp.asarray(V, jnp.float32)
    close(jax.grad(objective)(losses), WEIGHTS[name](losses))
    if name == "kl":
        risk = jax.grad(lambda v: 0.6 * jax.nn.logsumexp(v / 0.6))
        close(risk(losses), WEIGHTS[name](losses))
    half = losses.astype(jnp.bfloat16)
    assert WEIGHTS[name](half).dtype == jnp.float32
    close(WEIGHTS[name](half), WEIGHTS[name](half.astype(jnp.float32)))


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_of_large_losses_are_finite_and_do_not_see_a_constant(name):
    extreme = WEIGHTS[name](np.array([1e4, -1e4, 0.0, 1.0, 9999.0]))
    assert np.isfinite(extreme).all()
    close(extreme.sum(), 1.0)
    exact = V.astype(np.float32) * 4  # exact in float32 with the constant added
    exact = np.round(exact * 8) / 8
    close(WEIGHTS[name](exact + 1024), WEIGHTS[name](exact), rtol=1e-5)


# Group DRO.

LOSSES = np.array([1.0, 3.0, 4.0, 0.5, 0.5])
GROUPS = np.array([0, 0, 1, 2, 2])
UNIFORM = np.full(3, 1 / 3)


def test_group_dro_moves_to_the_groups_of_large_mean_loss():
    weights, multipliers = group_dro(LOSSES, GROUPS, UNIFORM, step_size=0.2)
    means = np.array([2.0, 4.0, 0.5])
    expected = np.exp(0.2 * means) / np.exp(0.2 * means).sum()
    close(multipliers, expected)
    close(weights, expected[GROUPS] / np.array([2, 2, 1, 2, 2]))
    close(weights @ LOSSES, expected @ means)
    close(weights.sum(), 1.0)


def test_group_dro_limits():
    weights, multipliers = group_dro(LOSSES, GROUPS, UNIFORM, step_size=0.0)
    close(multipliers, UNIFORM)
    close(weights @ LOSSES, np.mean([2.0, 4.0, 0.5]))
    weights, multipliers = group_dro(LOSSES, GROUPS, UNIFORM, step_size=1e4)
    close(weights @ LOSSES, 4.0)
    weights, _ = group_dro(LOSSES, np.zeros(5, int), np.ones(1))
    close(weights, np.full(5, 0.2))


def test_the_adjustment_steers_the_groups_and_leaves_the_loss():
    counts = np.array([100.0, 400.0, 25.0])
    weights, multipliers = group_dro(
        LOSSES, GROUPS, UNIFORM, step_size=0.1, adjustment=2.0, group_counts=counts
    )
    adjusted = np.array([2.0, 4.0, 0.5]) + 2.0 / np.sqrt(counts)
    expected = np.exp(0.1 * adjusted) / np.exp(0.1 * adjusted).sum()
    close(multipliers, expected)
    close(weights @ LOSSES, expected @ [2.0, 4.0, 0.5])


def test_absent_groups_and_examples_that_do_not_count():
    where = np.array([True, True, False, True, False])
    losses = np.where(where, LOSSES, np.nan)
    groups = np.where(where, GROUPS, -100)
    weights, multipliers = jax.jit(functools.partial(group_dro, step_size=0.5))(
        losses, groups, UNIFORM, where=where
    )
    means = np.array([2.0, 0.0, 0.5])
    expected = np.exp(0.5 * means) / np.exp(0.5 * means).sum()
    close(multipliers, expected)
    close(weights, [expected[0] / 2, expected[0] / 2, 0.0, expected[2], 0.0])
    none, kept = group_dro(losses, groups, UNIFORM, where=np.zeros(5, bool))
    np.testing.assert_array_equal(none, 0.0)
    close(kept, UNIFORM)


def test_groups_in_any_shape_and_out_of_range():
    weights, multipliers = group_dro(LOSSES[:4].reshape(2, 2), GROUPS[:4].reshape(2, 2), UNIFORM)
    flat, same = group_dro(LOSSES[:4], GROUPS[:4], UNIFORM)
    np.testing.assert_array_equal(weights.ravel(), flat)
    np.testing.assert_array_equal(multipliers, same)
    weights, _ = group_dro(LOSSES, np.array([0, -1, 1, 3, 2]), UNIFORM)
    np.testing.assert_array_equal(np.isnan(weights), [False, True, False, True, False])


def test_no_gradient_passes_through_group_dro():
    slope = jax.grad(lambda v: jnp.sum(group_dro(v, GROUPS, UNIFORM, step_size=0.3)[0] * v))
    weights, _ = group_dro(LOSSES, GROUPS, UNIFORM, step_size=0.3)
    close(slope(jnp.asarray(LOSSES, jnp.float32)), weights)


def test_input_that_does_not_fit_raises():
    for name, weights in WEIGHTS.items():
        with pytest.raises(TypeError, match="losses must be floating; got int"):
            weights(np.ones(3, int))
        with pytest.raises(ValueError, match=r"where has shape \(2,\); expected \(3,\)"):
            weights(np.ones(3), where=np.ones(2, bool))
        with pytest.raises(ValueError, match=r"losses have shape \(\); expected \[..., n\]"):
            weights(np.float32(1.0))
        assert name
    for function in (cvar_weights, functools.partial(cvar_dual, threshold=0.0)):
        for fraction in (0.0, 1.1):
            with pytest.raises(ValueError, match=rf"fraction must lie in \(0, 1\]; got {fraction}"):
                function(V, fraction=fraction)
    with pytest.raises(ValueError, match=r"threshold has shape \(2,\); expected \(\) or \(5,\)"):
        cvar_dual(V, np.ones(2), fraction=0.5)
    with pytest.raises(ValueError, match=r"radius must be finite and not negative; got -1.0"):
        chi_square_weights(V, radius=-1.0)
    with pytest.raises(ValueError, match=r"temperature must be positive; got 0.0"):
        kl_weights(V, temperature=0.0)
    with pytest.raises(TypeError, match="groups must be integers; got float"):
        group_dro(LOSSES, LOSSES, UNIFORM)
    with pytest.raises(ValueError, match=r"groups have shape \(4,\), but the losses \(5,\)"):
        group_dro(LOSSES, GROUPS[:4], UNIFORM)
    with pytest.raises(ValueError, match=r"multipliers have shape \(\); expected \[G\]"):
        group_dro(LOSSES, GROUPS, np.float32(1.0))
    with pytest.raises(ValueError, match="an adjustment needs group_counts"):
        group_dro(LOSSES, GROUPS, UNIFORM, adjustment=1.0)
    with pytest.raises(ValueError, match=r"group_counts have shape \(2,\); expected \(3,\)"):
        group_dro(LOSSES, GROUPS, UNIFORM, adjustment=1.0, group_counts=[1, 2])
