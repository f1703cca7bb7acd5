"""Probabilities of grid values against softmax products in float64, and their invariances."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from regjax.losses import expected_score, grid_log_probs, grid_mass
from regjax.scores import ScoreGrid, TokenGrid

VALUES = np.array([1.0, 2.0, 3.0, 4.0, 5.0], np.float32)
SINGLE = TokenGrid(
    tokens=np.array([[6], [1], [4], [0], [3]], np.int32), mask=np.ones((5, 1), bool), values=VALUES
)
# 1, 1.5, 10 and 20: of one, two and three tokens, padded with a token that is in use.
MULTI = TokenGrid(
    tokens=np.array([[1, 7, 0], [1, 5, 0], [1, 0, 7], [2, 0, 7]], np.int32),
    mask=np.array([[1, 1, 0], [1, 1, 0], [1, 1, 1], [1, 1, 1]], bool),
    values=np.array([1.0, 1.5, 10.0, 20.0], np.float32),
)
V = 8


def softmax(z):
    z = np.asarray(z, np.float64)
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def brute_force_probs(logits, codec):
    """One value, one token, one factor at a time."""
    probs = np.ones(logits.shape[:-3] + (len(codec.values),))
    for k in range(len(codec.values)):
        for t in range(codec.tokens.shape[1]):
            if codec.mask[k, t]:
                probs[..., k] *= softmax(logits[..., k, t, :])[..., codec.tokens[k, t]]
    return probs


def floats(shape, bound=12.0):
    return hnp.arrays(np.float32, shape, elements=st.floats(-bound, bound, width=32))


@settings(deadline=None, max_examples=30)
@given(floats((2, 3, V)))
def test_single_token_probabilities_are_the_full_softmax_at_the_grids_tokens(logits):
    expected = softmax(logits)[..., SINGLE.tokens[:, 0]]
    np.testing.assert_allclose(np.exp(grid_log_probs(logits, SINGLE)), expected, rtol=5e-6)
    np.testing.assert_allclose(grid_mass(logits, SINGLE), expected.sum(-1), rtol=2e-6)
    np.testing.assert_allclose(expected_score(logits, SINGLE), expected @ VALUES, rtol=2e-6)
    normalized = expected / expected.sum(-1, keepdims=True)
    log_probs = grid_log_probs(logits, SINGLE, normalize=True)
    np.testing.assert_allclose(np.exp(log_probs), normalized, rtol=5e-6)
    np.testing.assert_allclose(
        expected_score(logits, SINGLE, normalize=True), normalized @ VALUES, rtol=2e-6
    )


@settings(deadline=None, max_examples=30)
@given(floats((2, 4, 3, V)))
def test_multi_token_probabilities_are_products_of_softmaxes(logits):
    expected = brute_force_probs(logits, MULTI)
    np.testing.assert_allclose(np.exp(grid_log_probs(logits, MULTI)), expected, rtol=2e-5)
    np.testing.assert_allclose(grid_mass(logits, MULTI), expected.sum(-1), rtol=2e-5)
    np.testing.assert_allclose(expected_score(logits, MULTI), expected @ MULTI.values, rtol=2e-5)
    normalized = expected / expected.sum(-1, keepdims=True)
    log_probs = grid_log_probs(logits, MULTI, normalize=True)
    np.testing.assert_allclose(np.exp(log_probs), normalized, rtol=2e-5)


@pytest.mark.parametrize("normalize", [False, True])
def test_the_three_forms_of_a_grid_agree(normalize):
    logits = np.random.default_rng(0).normal(size=(3, 4, 3, V)).astype(np.float32)
    log_probs = grid_log_probs(logits, MULTI)
    expected = expected_score(logits, MULTI, normalize=normalize)
    assert expected.shape == (3,)
    for values in (MULTI.values, list(MULTI.values), jnp.asarray(MULTI.values)):
        got = expected_score(log_probs, values, normalize=normalize)
        np.testing.assert_array_equal(got, expected)
    grid = ScoreGrid.of(MULTI.values.tolist())
    np.testing.assert_array_equal(expected_score(log_probs, grid, normalize=normalize), expected)


def test_a_single_token_grid_equals_the_same_grid_padded_to_two_tokens():
    logits = np.random.default_rng(1).normal(size=(2, V)).astype(np.float32)
    padded = TokenGrid(
        tokens=np.pad(SINGLE.tokens, ((0, 0), (0, 1))),
        mask=np.pad(SINGLE.mask, ((0, 0), (0, 1))),
        values=VALUES,
    )
    candidates = np.broadcast_to(logits[:, None, None], (2, 5, 2, V))
    np.testing.assert_allclose(
        grid_log_probs(candidates, padded), grid_log_probs(logits, SINGLE), rtol=1e-6
    )


def test_unnormalized_score_is_mass_times_normalized_score():
    logits = np.random.default_rng(2).normal(size=(50, V)) * 3
    product = grid_mass(logits, SINGLE) * expected_score(logits, SINGLE, normalize=True)
    np.testing.assert_allclose(expected_score(logits, SINGLE), product, rtol=2e-6)


def test_a_constant_on_all_logits_changes_nothing_and_on_the_grid_only_the_mass():
    logits = np.random.default_rng(3).integers(-4, 5, size=(20, V)).astype(np.float32)
    for shift in (3.0, -1024.0, 8192.0):
        np.testing.assert_array_equal(
            grid_log_probs(logits + shift, SINGLE), grid_log_probs(logits, SINGLE)
        )
    on_grid = np.zeros(V, np.float32)
    on_grid[SINGLE.tokens[:, 0]] = 2.0
    np.testing.assert_array_equal(
        expected_score(logits + on_grid, SINGLE, normalize=True),
        expected_score(logits, SINGLE, normalize=True),
    )
    odds = grid_mass(logits, SINGLE) / (1 - grid_mass(logits, SINGLE))
    shifted = grid_mass(logits + on_grid, SINGLE) / (1 - grid_mass(logits + on_grid, SINGLE))
    np.testing.assert_allclose(shifted, np.exp(2.0) * odds, rtol=1e-4)


def test_normalized_score_is_affine_equivariant_and_unnormalized_only_scales():
    logits = np.random.default_rng(4).normal(size=(20, V))
    scaled = TokenGrid(SINGLE.tokens, SINGLE.mask, 3 * VALUES)
    moved = TokenGrid(SINGLE.tokens, SINGLE.mask, 3 * VALUES + 7)
    plain, mass = expected_score(logits, SINGLE), grid_mass(logits, SINGLE)
    np.testing.assert_allclose(expected_score(logits, scaled), 3 * plain, rtol=2e-6)
    np.testing.assert_allclose(expected_score(logits, moved), 3 * plain + 7 * mass, rtol=2e-6)
    normalized = expected_score(logits, SINGLE, normalize=True)
    np.testing.assert_allclose(
        expected_score(logits, moved, normalize=True), 3 * normalized + 7, rtol=2e-6
    )


def test_a_grid_of_the_five_alone_predicts_five_times_its_probability():
    codec = TokenGrid(np.array([[3]], np.int32), np.ones((1, 1), bool), np.array([5.0]))
    logits = np.random.default_rng(5).normal(size=(10, V))
    np.testing.assert_allclose(expected_score(logits, codec), 5 * softmax(logits)[:, 3], rtol=2e-6)
    np.testing.assert_array_equal(expected_score(logits, codec, normalize=True), np.full(10, 5.0))


@settings(deadline=None, max_examples=30)
@given(floats((2, 5), 6.0))
def test_scores_differ_by_at_most_the_range_times_half_the_l1_distance(logits):
    first, second = np.exp(np.asarray(grid_log_probs(logits, VALUES, normalize=True), np.float64))
    scores = np.asarray(expected_score(logits, VALUES, normalize=True), np.float64)
    assert abs(scores[0] - scores[1]) <= 4 * np.abs(first - second).sum() / 2 + 1e-5


def test_that_bound_is_attained_by_moving_mass_from_end_to_end():
    pmf = np.array([[0.3, 0.1, 0.2, 0.2, 0.2], [0.2, 0.1, 0.2, 0.2, 0.3]])
    scores = expected_score(np.log(pmf), VALUES)
    np.testing.assert_allclose(scores[1] - scores[0], 4 * 0.2 / 2, rtol=2e-6)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_extreme_logits_are_exact_and_have_finite_gradients(scale, normalize):
    logits = np.zeros((V, V), np.float32) + scale * np.eye(V, dtype=np.float32)
    scores = expected_score(logits, SINGLE, normalize=normalize)
    expected = np.zeros(V)
    for row in range(V):
        alive = np.arange(V) == row if scale > 0 else np.arange(V) != row
        probs = (alive / alive.sum())[SINGLE.tokens[:, 0]]
        if normalize:
            # With the winner off the grid, its five tied losers share the mass.
            probs = probs / probs.sum() if probs.sum() else np.full(5, 0.2)
        expected[row] = probs @ VALUES
    np.testing.assert_allclose(scores, expected, rtol=2e-6)
    gradients = jax.grad(lambda z: expected_score(z, SINGLE, normalize=normalize).sum())(logits)
    assert np.isfinite(gradients).all()
    if scale > 0:
        assert not np.any(gradients[SINGLE.tokens[:, 0]])


@pytest.mark.parametrize("normalize", [False, True])
def test_a_probability_of_exactly_zero_has_a_zero_gradient(normalize):
    logits = np.array([0.0, -np.inf, 1.0, 0.5, -np.inf, 2.0, -1.0, 0.0], np.float32)
    score, gradient = jax.value_and_grad(lambda z: expected_score(z, SINGLE, normalize=normalize))(
        jnp.asarray(logits)
    )
    probs = softmax(logits)
    on_grid = np.zeros(V)
    on_grid[SINGLE.tokens[:, 0]] = VALUES
    if normalize:
        probs = probs * (on_grid > 0) / probs[on_grid > 0].sum()
    np.testing.assert_allclose(score, probs @ on_grid, rtol=1e-6)
    expected = probs * (on_grid - probs @ on_grid)
    np.testing.assert_allclose(gradient, expected, rtol=5e-6, atol=1e-7)
    assert gradient[1] == gradient[4] == 0.0


def test_no_mass_at_all_is_zero_unnormalized_and_uniform_normalized():
    impossible = jnp.full(5, -jnp.inf)
    assert grid_mass(impossible, VALUES) == 0.0
    assert expected_score(impossible, VALUES) == 0.0
    for normalize, expected in ((False, 0.0), (True, 3.0)):
        score, gradient = jax.value_and_grad(
            lambda z, n=normalize: expected_score(z, VALUES, normalize=n)
        )(impossible)
        np.testing.assert_allclose(score, expected, rtol=1e-6)
        np.testing.assert_array_equal(gradient, np.zeros(5))


def test_padding_of_candidates_is_ignored_even_when_it_is_nan():
    logits = np.random.default_rng(6).normal(size=(2, 4, 3, V)).astype(np.float32)
    broken = np.where(MULTI.mask[..., None], logits, np.nan).astype(np.float32)
    total = jax.jit(jax.value_and_grad(lambda z: expected_score(z, MULTI).sum()))
    whole, gradient = total(logits)
    masked, masked_gradient = total(broken)
    assert whole == masked
    np.testing.assert_array_equal(gradient, masked_gradient)
    np.testing.assert_array_equal(masked_gradient[:, ~MULTI.mask], 0.0)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(
    ("codec", "shape"), [(SINGLE, (2, 3, V)), (MULTI, (2, 3, 4, 3, V)), (VALUES, (2, 3, 5))]
)
def test_examples_that_do_not_count_are_zero_in_every_form_of_a_grid(codec, shape, normalize):
    logits = np.random.default_rng(10).normal(size=shape).astype(np.float32)
    where = np.array([[1, 0, 1], [0, 0, 1]], bool)
    broken = logits.copy()
    broken[~where] = np.nan

    @jax.jit
    def both(z, where):
        def total(z):
            log_probs = grid_log_probs(z, codec, normalize=normalize, where=where)
            score = expected_score(z, codec, normalize=normalize, where=where)
            found = score, grid_mass(z, codec, where=where), log_probs.sum(-1)
            return sum(x.sum() for x in found), found

        return jax.grad(total, has_aux=True)(z)

    slopes, found = both(broken, where)
    expected_slopes, expected = both(logits, np.ones_like(where))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, np.where(where, other, 0.0), rtol=1e-6)
    np.testing.assert_array_equal(slopes[~where], 0.0)
    np.testing.assert_allclose(slopes[where], expected_slopes[where], rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"where has shape \(3,\); expected \(2, 3\)"):
        grid_mass(logits, codec, where=where[0])


def test_nan_in_the_logits_is_not_hidden():
    logits = np.zeros(V, np.float32)
    logits[2] = np.nan  # off the grid
    assert np.isnan(expected_score(logits, SINGLE))
    assert np.isnan(expected_score(np.full(5, np.nan), VALUES, normalize=True))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(("codec", "shape"), [(SINGLE, (3, V)), (MULTI, (3, 4, 3, V))])
def test_half_precision_logits_are_read_in_float32(codec, shape, dtype):
    logits = jnp.asarray(np.random.default_rng(7).normal(size=shape) * 4, dtype)
    scores = expected_score(logits, codec)
    chex.assert_type(scores, jnp.float32)
    np.testing.assert_array_equal(scores, expected_score(logits.astype(jnp.float32), codec))
    gradient_of = jax.jit(jax.grad(lambda z: expected_score(z, codec).sum()))
    gradient = gradient_of(logits)
    assert gradient.dtype == dtype
    exact = gradient_of(logits.astype(jnp.float32))
    np.testing.assert_array_equal(gradient, exact.astype(dtype))


@pytest.mark.parametrize(("codec", "shape"), [(SINGLE, (3, V)), (MULTI, (3, 4, 3, V))])
def test_the_grid_passes_through_jit_and_vmap_as_an_argument(codec, shape):
    logits = np.random.default_rng(8).normal(size=shape).astype(np.float32)
    expected = expected_score(logits, codec)
    np.testing.assert_allclose(jax.jit(expected_score)(logits, codec), expected, rtol=1e-6)
    mapped = jax.vmap(expected_score, in_axes=(0, None))(logits, codec)
    np.testing.assert_allclose(mapped, expected, rtol=1e-6)


def test_a_token_beyond_the_vocabulary_raises_on_the_host_and_is_nan_on_the_device():
    logits = np.zeros((2, 6), np.float32)
    with pytest.raises(ValueError, match=r"grid value 1.0 .* tokens \[6\].* vocabulary of 6"):
        expected_score(logits, SINGLE)
    on_device = jax.tree.map(jnp.asarray, SINGLE)
    assert np.isnan(jax.jit(expected_score)(logits, on_device)).all()
    with pytest.raises(ValueError, match=r"tokens \[1, 7\].* vocabulary of 7"):
        expected_score(np.zeros((4, 3, 7), np.float32), MULTI)


def test_padding_may_hold_any_token():
    codec = TokenGrid(np.where(MULTI.mask, MULTI.tokens, 99), MULTI.mask, MULTI.values)
    logits = np.random.default_rng(9).normal(size=(4, 3, V)).astype(np.float32)
    np.testing.assert_array_equal(expected_score(logits, codec), expected_score(logits, MULTI))
    gradient_of = jax.jit(jax.grad(expected_score))
    np.testing.assert_array_equal(gradient_of(logits, codec), gradient_of(logits, MULTI))


@pytest.mark.parametrize(
    ("logits", "codec", "error", "message"),
    [
        (np.zeros((2, V), np.int32), SINGLE, TypeError, r"floating; got int32 of shape \(2, 8\)"),
        (np.float32(1.0), SINGLE, ValueError, r"\[\.\.\., V\]; got a scalar"),
        (np.zeros((2, V)), MULTI, ValueError, r"\[\.\.\., 4, 3, V\]; got shape \(2, 8\)"),
        (np.zeros((3, 4, V)), MULTI, ValueError, r"\[\.\.\., 4, 3, V\]; got shape \(3, 4, 8\)"),
        (np.zeros((2, V)), VALUES, ValueError, r"\[\.\.\., 5\]; got shape \(2, 8\).*TokenGrid"),
        (np.zeros((5, 1)), VALUES[:, None], ValueError, r"shape \[K\]; got shape \(5, 1\)"),
    ],
)
@pytest.mark.parametrize("function", [grid_log_probs, grid_mass, expected_score])
def test_shapes_and_types_that_do_not_fit_raise(function, logits, codec, error, message):
    with pytest.raises(error, match=message):
        function(logits, codec)
