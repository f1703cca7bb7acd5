"""Losses in tiles are the plain ones: value, gradients, memory, and what is left out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.extra import numpy as hnp

from regjax.losses import linear, linear_at_once, linear_teachers
from regjax.losses.distillation import distillation
from regjax.losses.linear_chunks import Tiling, fold
from regjax.losses.linear_rows import projection
from regjax.losses.regression import raft
from regjax.losses.tokens import token_cross_entropy
from regjax.token_grid import TokenGrid
from tests.losses.linear_cases import (
    CASES,
    CODEC,
    HEAD,
    HIDDEN,
    LABELS,
    SHAPE,
    TEACHER_HEAD,
    TEACHER_HIDDEN,
    TOP,
    WEIGHTS,
    WHERE,
    D,
    V,
    plain_cross_entropy,
)

# Neither 21 rows nor 40 columns are a multiple of the first; the last holds all in one tile.
LAYOUTS = [(16, 4), (7, 1), (99, 99)]
# What differs between cases is not how they are divided: a few in every layout, all in the first.
FEW = ("smoothed", "normalised", "jensen_shannon", "top k padded")
MASKS = {"ragged": WHERE, "all": np.ones(SHAPE, bool), "one": np.arange(21).reshape(SHAPE) == 9}


def weighted(loss):
    def with_losses(hidden, head, where):
        losses = loss(hidden, head, where)
        return jnp.sum(losses * WEIGHTS), losses

    return jax.jit(jax.value_and_grad(with_losses, (0, 1), has_aux=True))


@functools.cache
def in_tiles(case, chunk=16, block=4):
    layout = {"chunk": chunk, "block": block}
    return weighted(lambda h, w, where: CASES[case].linear(h, w, where=where, **layout))


@functools.cache
def plain(case):
    def loss(hidden, head, where):
        logits = jnp.matmul(hidden, head, preferred_element_type=jnp.float32)
        return CASES[case].plain(logits, where)

    return weighted(loss)


def assert_close(found, expected, tolerance):
    """Within `tolerance` of the largest entry of each array."""
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype
        one, other = (np.asarray(x, np.float32) for x in (one, other))
        np.testing.assert_allclose(one, other, atol=tolerance * max(1.0, np.abs(other).max()))


@pytest.mark.parametrize(
    ("case", "chunk", "block"),
    [(case, *sizes) for sizes in LAYOUTS for case in (CASES if sizes == LAYOUTS[0] else FEW)],
)
def test_values_and_gradients_are_the_plain_ones(case, chunk, block):
    tiles = in_tiles(case, chunk, block)
    for where in MASKS.values():
        assert_close(tiles(HIDDEN, HEAD, where), plain(case)(HIDDEN, HEAD, where), 1e-5)


@settings(deadline=None, max_examples=20)
@given(hnp.arrays(bool, SHAPE))
def test_any_rows_can_be_left_out(where):
    for case in ("smoothed", "jensen_shannon"):
        assert_close(in_tiles(case)(HIDDEN, HEAD, where), plain(case)(HIDDEN, HEAD, where), 1e-5)


EQUAL = {"plain": {}, "smoothed": {"label_smoothing": 0.2, "z_loss": 0.1, "soft_cap": 1.5}}


@functools.cache
def with_weights(case, form, chunk=16, block=4):
    """Three times the sum of weighted losses, and the losses: every cotangent is three."""

    def loss(hidden, head, weights, where):
        options = EQUAL[case]
        if form == "tiles":
            options = options | {"weights": weights, "chunk": chunk, "block": block}
            losses = linear.linear_cross_entropy(hidden, head, LABELS, where=where, **options)
        else:
            logits = jnp.matmul(hidden, head, preferred_element_type=jnp.float32)
            losses = plain_cross_entropy(logits, where, **options)
            losses *= jnp.where(where, weights, 0.0)
        return 3.0 * jnp.sum(losses), losses

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))


@pytest.mark.parametrize("case", EQUAL)
@pytest.mark.parametrize(("chunk", "block"), LAYOUTS)
def test_weighted_sums_and_their_gradients_are_the_plain_ones(case, chunk, block):
    for where in (*MASKS.values(), np.zeros(SHAPE, bool)):
        arrays = np.where(where[..., None], HIDDEN, np.nan), HEAD, WEIGHTS, where
        found = with_weights(case, "tiles", chunk, block)(*arrays)
        expected = with_weights(case, "plain")(np.nan_to_num(arrays[0]), *arrays[1:])
        assert_close(found, expected, 1e-5)


def test_weighted_sums_in_bfloat16_are_the_plain_ones():
    hidden, head = jnp.asarray(HIDDEN, jnp.bfloat16), jnp.asarray(HEAD, jnp.bfloat16)
    for case in EQUAL:
        (_, losses), found = with_weights(case, "tiles")(hidden, head, WEIGHTS, WHERE)
        (_, exact), expected = with_weights(case, "plain")(hidden, head, WEIGHTS, WHERE)
        assert_close(losses, exact, 1e-5)
        for one, other in zip(found, expected, strict=True):
            assert one.dtype == other.dtype
            one, other = (np.asarray(x, np.float32) for x in (one, other))
            assert np.linalg.norm(one - other) < 1e-2 * np.linalg.norm(other)


def test_only_cotangents_that_differ_make_the_logits_again(monkeypatch):
    def no_tiles(gradient, tiling, projections, rows, kept, cotangents):
        first = projections[0]
        return jnp.full_like(first.hidden, jnp.nan), jnp.full_like(first.head, jnp.nan)

    def weighted_sum(hidden, head, cotangents):
        losses = linear.linear_cross_entropy(hidden, head, LABELS, where=WHERE, block=4)
        return jnp.sum(losses * cotangents)

    def gradients(cotangents):
        return jax.jit(jax.grad(lambda *arrays: weighted_sum(*arrays), (0, 1)))(
            HIDDEN, HEAD, cotangents
        )

    equal = np.where(WHERE, 0.3, WEIGHTS)  # those of rows that do not count matter nothing
    one_differs = np.full(SHAPE, 0.3)
    one_differs[-1, 5] = 0.2
    expected, [expected_of_hidden, _] = gradients(equal), gradients(one_differs)
    monkeypatch.setattr(linear_at_once, "tiled_gradient", no_tiles)
    jax.tree.map(np.testing.assert_array_equal, gradients(equal), expected)
    frozen = jax.jit(jax.grad(lambda h, g: weighted_sum(h, HEAD, g)))
    np.testing.assert_array_equal(frozen(HIDDEN, equal), expected[0])
    np.testing.assert_allclose(frozen(HIDDEN, one_differs), expected_of_hidden, atol=1e-6)
    of_hidden, of_head = gradients(one_differs)
    assert np.isnan(of_hidden[WHERE]).all()
    assert np.isnan(of_head).all()


def test_hits_are_labels_that_no_other_class_equals():
    logits = HIDDEN @ HEAD
    best, second = logits.argmax(-1), np.argsort(logits, axis=-1)[..., -2]
    for labels, expected in ((best, WHERE), (second, np.zeros_like(WHERE)), (best - V, False)):
        losses, hits = linear.linear_cross_entropy_and_hits(
            HIDDEN, HEAD, labels, where=WHERE, weights=np.zeros(SHAPE), chunk=16, block=4
        )
        np.testing.assert_array_equal(hits, np.broadcast_to(expected, SHAPE))
        np.testing.assert_array_equal(losses[~WHERE], 0.0)
    tied = linear.linear_cross_entropy_and_hits(np.zeros((1, D)), HEAD, np.array([0]))[1]
    assert not tied.any()


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_the_formula_in_float64(case):
    hidden, head = HIDDEN[:, :2].astype(np.float64), HEAD.astype(np.float64)

    def value(hidden, head):
        every = HIDDEN.astype(np.float64)
        every[:, :2] = hidden
        return np.sum(np.where(MASK, CASES[case].formula(every @ head), 0.0) * WEIGHTS)

    MASK = np.zeros(SHAPE, bool)
    MASK[:, :2] = True
    (found, _), gradients = in_tiles(case)(HIDDEN, HEAD, MASK)
    np.testing.assert_allclose(found, value(hidden, head), rtol=1e-5, atol=1e-5)
    step = 1e-5
    for position, array in enumerate((hidden, head)):
        differences = np.zeros_like(array)
        for index in np.ndindex(array.shape):
            sides = []
            for sign in (1, -1):
                moved = [hidden.copy(), head.copy()]
                moved[position][index] += sign * step
                sides.append(value(*moved))
            differences[index] = (sides[0] - sides[1]) / (2 * step)
        gradient = np.asarray(gradients[position])
        gradient = gradient[:, :2] if position == 0 else gradient
        np.testing.assert_allclose(gradient, differences, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("case", ["smoothed", "normalised", "jensen_shannon", "top k"])
def test_bfloat16_gives_float32_losses_and_bfloat16_gradients(case):
    hidden, head = jnp.asarray(HIDDEN, jnp.bfloat16), jnp.asarray(HEAD, jnp.bfloat16)
    (value, losses), gradients = in_tiles(case)(hidden, head, WHERE)
    assert losses.dtype == value.dtype == jnp.float32
    # The products are exact in float32: only the gradients are rounded, once more than the plain.
    (_, exact), expected = plain(case)(hidden, head, WHERE)
    assert_close(losses, exact, 1e-5)
    for found, other in zip(gradients, expected, strict=True):
        assert found.dtype == jnp.bfloat16
        found, other = (np.asarray(x, np.float32) for x in (found, other))
        assert np.linalg.norm(found - other) < 1e-2 * np.linalg.norm(other)


def test_one_bfloat16_array_is_not_rounded_to_the_other():
    head = jnp.asarray(HEAD, jnp.bfloat16)
    found = in_tiles("cross-entropy")(HIDDEN, head, WHERE)
    expected = plain("cross-entropy")(HIDDEN, head.astype(jnp.float32), WHERE)
    np.testing.assert_allclose(found[0][1], expected[0][1], atol=1e-5)
    assert [x.dtype for x in found[1]] == [jnp.float32, jnp.bfloat16]
    assert_close(found[1][0], expected[1][0], 1e-5)


def test_gradients_of_many_rows_are_added_in_float32():
    """A thousand rows that each move a column by less than bfloat16 tells from the sum."""
    hidden, head = jnp.ones((1000, 1), jnp.bfloat16), jnp.zeros((1, 2), jnp.bfloat16)
    labels = jnp.zeros(1000, jnp.int32)
    gradient = jax.grad(lambda w: linear.linear_cross_entropy(hidden, w, labels, block=1).sum())(
        head
    )
    np.testing.assert_array_equal(np.asarray(gradient, np.float32), [[-500.0, 500.0]])


@pytest.mark.parametrize("case", CASES)
def test_rows_left_out_influence_nothing(case):
    tiles = in_tiles(case)
    expected = tiles(HIDDEN, HEAD, WHERE)
    np.testing.assert_array_equal(expected[0][1][~WHERE], 0.0)
    np.testing.assert_array_equal(expected[1][0][~WHERE], 0.0)
    for bad in (np.nan, np.inf, -1e30):
        found = tiles(np.where(WHERE[..., None], HIDDEN, bad), HEAD, WHERE)
        jax.tree.map(np.testing.assert_array_equal, found, expected)
    none = tiles(np.full_like(HIDDEN, np.nan), HEAD, np.zeros(SHAPE, bool))
    for array in jax.tree.leaves(none):
        np.testing.assert_array_equal(array, np.zeros_like(array))


def test_rows_left_out_of_the_teacher_influence_nothing():
    def loss(hidden, teacher):
        return linear_teachers.linear_distillation(
            hidden, HEAD, teacher, TEACHER_HEAD, where=WHERE, chunk=16, block=4
        ).sum()

    graded = jax.jit(jax.value_and_grad(loss, (0, 1)))
    bad = np.where(WHERE[..., None], TEACHER_HIDDEN, np.nan)
    found, expected = graded(HIDDEN, bad), graded(HIDDEN, TEACHER_HIDDEN)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    np.testing.assert_array_equal(found[1][1], np.zeros_like(bad))


@pytest.mark.parametrize("case", CASES)
def test_extreme_logits_stay_finite(case):
    largest = np.abs(HIDDEN @ HEAD).max()
    (_, losses), gradients = in_tiles(case)(HIDDEN * 1e4 / largest, HEAD, WHERE)
    (_, expected), _ = plain(case)(HIDDEN * 1e4 / largest, HEAD, WHERE)
    # Logits of 1e4 that are rounded differently differ by 1e-3.
    np.testing.assert_allclose(losses, expected, rtol=1e-5, atol=2e-2)
    assert all(np.isfinite(g).all() for g in gradients)


def test_a_sure_prediction_keeps_its_small_loss():
    """log1p(exp(-40)), of which a difference of logits and their log-sum-exp keeps nothing."""
    hidden, head = np.ones(1, np.float32), np.array([[40.0, 0.0]], np.float32)
    loss = linear.linear_cross_entropy(hidden, head, 0)
    np.testing.assert_allclose(loss, np.exp(-40.0), rtol=1e-5)


def test_divergences_of_equals_are_zero_and_of_neighbours_exact():
    same = linear_teachers.linear_distillation(HIDDEN, HEAD, HIDDEN, HEAD, temperature=100.0)
    np.testing.assert_allclose(same, 0.0, atol=1e-9)
    near = linear_teachers.linear_distillation(HIDDEN, HEAD, 1.01 * HIDDEN, HEAD, temperature=100.0)
    z = HIDDEN.astype(np.float64) @ HEAD
    # T^2 KL tends to half the variance of the difference of the logits.
    np.testing.assert_allclose(near, np.var(0.01 * z, axis=-1) / 2, rtol=0.1)
    plain = distillation(z.astype(np.float32), (1.01 * z).astype(np.float32), temperature=100.0)
    np.testing.assert_allclose(near, plain, rtol=1e-2)


def test_labels_and_ids_out_of_range_give_nan():
    labels = np.array([0, -1, V, -100])
    losses = linear.linear_cross_entropy(HIDDEN[0, :4], HEAD, labels, chunk=16)
    np.testing.assert_array_equal(np.isnan(losses), [False, True, True, True])
    losses = linear_teachers.linear_top_k_distillation(
        HIDDEN[0, :2], HEAD, np.array([[0, V], [0, 1]]), np.log(np.full((2, 2), 0.3))
    )
    np.testing.assert_array_equal(np.isnan(losses), [True, False])
    beyond = TokenGrid.from_ids([0, V], [1.0, 2.0])
    log_probs = linear.linear_grid_log_probs(HIDDEN[0, 0], HEAD, beyond)
    assert np.isnan(log_probs[1])


def test_a_vocabulary_that_is_picked_whole_leaves_no_rest():
    every = TokenGrid.from_ids(list(range(V)), list(range(V)))

    def loss(hidden, head):
        return raft(linear.linear_grid_log_probs(hidden, head, every, chunk=7), 3.0, every.values)

    value, gradients = jax.value_and_grad(loss, (0, 1))(HIDDEN[0, 0], HEAD)
    plain_value, expected = jax.value_and_grad(lambda h, w: raft(h @ w, 3.0, every), (0, 1))(
        HIDDEN[0, 0], HEAD
    )
    np.testing.assert_allclose(value, plain_value, rtol=1e-5)
    for one, other in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kept", [0, 1, 4, 5, 12])
def test_the_loops_end_with_the_rows_that_count(kept):
    student = projection(jnp.zeros((12, D)), HEAD)

    def visit(state, tiles, rows, columns):
        return state[0] + 1, state[1] + columns.fresh.sum()

    zero = jnp.zeros(12, jnp.int32)
    visits, columns = fold(visit, (zero, zero), (student,), (), jnp.int32(kept), Tiling(4, 16))
    visited = np.arange(12) < -(-kept // 4) * 4
    np.testing.assert_array_equal(visits, visited * 3)
    np.testing.assert_array_equal(columns, visited * V)


def temporary(loss, rows, width, vocabulary):
    """Bytes of the compiled step, compiled from shapes alone."""
    shapes = [
        jax.ShapeDtypeStruct((rows, width), jnp.float32),
        jax.ShapeDtypeStruct((width, vocabulary), jnp.float32),
        jax.ShapeDtypeStruct((rows,), jnp.int32),
        jax.ShapeDtypeStruct((rows,), jnp.bool_),
    ]
    return jax.jit(loss).lower(*shapes).compile().memory_analysis().temp_size_in_bytes


def test_temporary_memory_is_that_of_a_block_of_rows_and_of_the_head():
    sizes, logits = (4096, 256, 152_000), 4096 * 152_000 * 4
    head, block = 256 * 152_000 * 4, linear.BLOCK * 152_000 * 4

    def plain(hidden, head, labels, where):
        return token_cross_entropy(hidden @ head, labels, where=where).sum()

    def in_tiles(hidden, head, labels, where):
        return linear.linear_cross_entropy(hidden, head, labels, where=where).sum()

    of_plain = temporary(jax.value_and_grad(plain, (0, 1)), *sizes)
    found = temporary(jax.value_and_grad(in_tiles, (0, 1)), *sizes)
    assert of_plain > 2 * logits
    assert block < found < block + 1.3 * head < of_plain / 7
    # Without a gradient there are tiles alone, and the hidden states once more.
    assert temporary(in_tiles, *sizes) < 0.01 * of_plain


@pytest.mark.parametrize("name", ["teacher_hidden", "teacher_head", "log_probs", "log_tail"])
def test_a_teacher_gets_no_gradient(name):
    def loss(array):
        if name.startswith("teacher"):
            given = {"teacher_hidden": TEACHER_HIDDEN, "teacher_head": TEACHER_HEAD} | {name: array}
            return linear_teachers.linear_distillation(HIDDEN, HEAD, **given).sum()
        given = TOP._asdict() | {name: array}
        return linear_teachers.linear_top_k_distillation(HIDDEN, HEAD, *given.values()).sum()

    at = {
        "teacher_hidden": TEACHER_HIDDEN,
        "teacher_head": TEACHER_HEAD,
        "log_probs": TOP.log_probs,
        "log_tail": TOP.log_tail,
    }[name]
    np.testing.assert_array_equal(jax.grad(loss)(at), np.zeros(at.shape))


BAD = [
    (linear.linear_cross_entropy, (LABELS, HEAD, LABELS), {}, TypeError, "hidden must be floating"),
    (linear.linear_cross_entropy, (HIDDEN, HEAD.T, LABELS), {}, ValueError, r"head \(40, 5\)"),
    (linear.linear_cross_entropy, (HIDDEN, HEAD, WEIGHTS), {}, TypeError, "labels must be integ"),
    (linear.linear_cross_entropy, (HIDDEN, HEAD, LABELS[0]), {}, ValueError, r"labels .*\(7,\)"),
    (linear.linear_cross_entropy, (HIDDEN, HEAD, LABELS), {"chunk": 0}, ValueError, "chunk must"),
    (linear.linear_cross_entropy, (HIDDEN, HEAD, LABELS), {"block": -1}, ValueError, "block must"),
    (linear.linear_cross_entropy, (HIDDEN, HEAD, LABELS), {"soft_cap": 0.0}, ValueError, "cap"),
    (linear.linear_cross_entropy, (HIDDEN, HEAD, LABELS), {"z_loss": -1.0}, ValueError, "z_loss"),
    (
        linear.linear_cross_entropy,
        (HIDDEN, HEAD, LABELS),
        {"label_smoothing": 2},
        ValueError,
        "got 2",
    ),
    (linear.linear_cross_entropy, (HIDDEN, HEAD, LABELS), {"where": WHERE[0]}, ValueError, "where"),
    (
        linear.linear_cross_entropy,
        (HIDDEN, HEAD, LABELS),
        {"weights": HIDDEN},
        ValueError,
        "weights",
    ),
    (
        linear_teachers.linear_distillation,
        (HIDDEN, HEAD, TEACHER_HIDDEN, TEACHER_HEAD[:, 1:]),
        {},
        ValueError,
        "40 logits, teacher .* 39",
    ),
    (
        linear_teachers.linear_distillation,
        (HIDDEN, HEAD, TEACHER_HIDDEN, HEAD),
        {},
        ValueError,
        "teacher_hidden has shape",
    ),
    (
        linear_teachers.linear_distillation,
        (HIDDEN, HEAD, HIDDEN, HEAD),
        {"kind": "other"},
        ValueError,
        "kind must be",
    ),
    (
        linear_teachers.linear_distillation,
        (HIDDEN, HEAD, HIDDEN, HEAD),
        {"temperature": np.ones(3)},
        ValueError,
        r"temperature has shape \(3,\)",
    ),
    (
        linear_teachers.linear_top_k_distillation,
        (HIDDEN, HEAD, TOP.log_probs, TOP.log_probs),
        {},
        TypeError,
        "teacher_ids must be integers",
    ),
    (
        linear_teachers.linear_top_k_distillation,
        (HIDDEN, HEAD, TOP.tokens[0], TOP.log_probs),
        {},
        ValueError,
        "teacher_ids have shape",
    ),
    (
        linear.linear_expected_score,
        (HIDDEN, HEAD, TokenGrid.from_ids([[1, 2], [1, 3]], [1.0, 2.0])),
        {},
        ValueError,
        "up to 2 tokens",
    ),
]


@pytest.mark.parametrize(("loss", "arguments", "options", "error", "message"), BAD)
def test_input_that_does_not_fit_raises(loss, arguments, options, error, message):
    with pytest.raises(error, match=message):
        loss(*arguments, **options)


def test_no_rows_give_no_losses():
    losses = linear.linear_cross_entropy(np.zeros((0, D), np.float32), HEAD, np.zeros(0, int))
    assert losses.shape == (0,)
    scores = linear.linear_expected_score(np.zeros((2, 0, D), np.float32), HEAD, CODEC)
    assert scores.shape == (2, 0)
