"""Sequences: sums over tokens, returns, and the gradient of a divergence over all sequences."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from regjax.losses.distillation import distillation
from regjax.losses.sequence_distillation import (
    discounted_returns,
    on_policy_distillation,
    sequence_cross_entropy,
    sequence_distillation,
)

REWARDS = np.array([1.5, 1.0, 2.0, 2.0], np.float32)
L, V = 3, 2


def test_returns():
    close = functools.partial(np.testing.assert_allclose, rtol=1e-6)
    close(discounted_returns(REWARDS, gamma=0.5), [2.75, 2.5, 3.0, 2.0])
    # TRL's, not normalised, have gamma^t besides.
    close(0.5 ** np.arange(4) * discounted_returns(REWARDS, gamma=0.5), [2.75, 1.25, 0.75, 0.25])
    close(
        discounted_returns(REWARDS, gamma=0.5, length_normalize=True),
        [1.4666667, 1.4285714, 2.0, 2.0],
    )
    close(discounted_returns(REWARDS, gamma=0.0), REWARDS)
    close(discounted_returns(REWARDS, gamma=1.0), [6.5, 5.0, 4.0, 2.0])
    close(
        discounted_returns(REWARDS, gamma=1.0, length_normalize=True),
        [6.5 / 4, 5 / 3, 2.0, 2.0],
    )


@settings(deadline=None, max_examples=20)
@given(
    hnp.arrays(np.float32, (2, 5), elements=st.floats(-4, 4, width=32)),
    hnp.arrays(bool, (2, 5)),
    st.booleans(),
)
def test_returns_against_their_sums(rewards, where, normalize):
    found = discounted_returns(
        np.where(where, rewards, np.nan), gamma=0.7, length_normalize=normalize, where=where
    )
    expected = np.zeros((2, 5))
    for row, t in zip(*np.nonzero(where), strict=True):
        later = [s for s in range(t, 5) if where[row, s]]
        powers = np.array([0.7 ** (s - t) for s in later])
        expected[row, t] = powers @ rewards[row, later].astype(np.float64)
        expected[row, t] /= powers.sum() if normalize else 1.0
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_padding_does_not_reach_the_returns():
    where = np.array([True, True, False, False])
    found = discounted_returns(REWARDS, gamma=0.5, length_normalize=True, where=where)
    np.testing.assert_allclose(found, [2.0 / 1.5, 1.0, 0.0, 0.0], rtol=1e-6)


def test_a_one_hot_teacher_makes_word_and_sequence_level_equal():
    rng = np.random.default_rng(0)
    student = rng.normal(size=(2, 4, 5)).astype(np.float32)
    tokens = rng.integers(0, 5, (2, 4))
    teacher = np.where(np.arange(5) == tokens[..., None], 0.0, -np.inf).astype(np.float32)
    where = np.array([[1, 1, 1, 0], [1, 0, 0, 0]], bool)
    for options in ({}, {"where": where}, {"where": where, "length_normalize": True}):
        np.testing.assert_allclose(
            sequence_distillation(student, teacher, kind="cross_entropy", **options),
            sequence_cross_entropy(student, tokens, **options),
            rtol=1e-6,
        )


def test_the_mean_over_tokens_is_the_sum_over_their_number():
    rng = np.random.default_rng(1)
    student, teacher = rng.normal(size=(2, 2, 4, 5)).astype(np.float32)
    where = np.array([[1, 1, 1, 0], [0, 0, 0, 0]], bool)
    total = sequence_distillation(student, teacher, where=where)
    mean = sequence_distillation(student, teacher, where=where, length_normalize=True)
    np.testing.assert_allclose(mean, total / np.array([3, 1]), rtol=1e-6)
    each = distillation(student, teacher)
    np.testing.assert_allclose(total, [each[0, :3].sum(), 0.0], rtol=1e-6)


def test_without_discounting_on_policy_is_the_reverse_divergence():
    student = np.array([[2.0, 1.0, 0.1, -1.0]], np.float32)
    teacher = np.array([[3.0, 0.5, 0.2, -0.7]], np.float32)
    for token in range(4):
        value, gradient = jax.value_and_grad(on_policy_distillation)(
            student, teacher, np.array([token])
        )
        np.testing.assert_allclose(value, 0.1658789661, rtol=1e-5)
    expected = jax.grad(lambda z: sequence_distillation(z, teacher, kind="reverse"))(student)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-7)


SEQUENCES = np.array(list(itertools.product(range(V), repeat=L)))


def all_logits(table):
    """Logits [V^L, L, V] of every sequence, from a table with a row for every prefix."""
    prefixes = [
        [
            sum(V**i for i in range(t)) + int(sum(V**i * x for i, x in enumerate(row[:t])))
            for t in range(L)
        ]
        for row in SEQUENCES
    ]
    return table[np.array(prefixes)]


@pytest.mark.parametrize("single_step", [False, True])
def test_its_expected_gradient_is_that_of_the_divergence_of_sequences(single_step):
    rng = np.random.default_rng(2)
    rows = sum(V**t for t in range(L))
    student, teacher = rng.normal(size=(2, rows, V)).astype(np.float32)

    def log_prob(table):
        return -sequence_cross_entropy(all_logits(table), SEQUENCES)

    probs = np.exp(log_prob(student))

    def exact(table):
        log_p = log_prob(table)
        return jnp.sum(jnp.exp(log_p) * (log_p - log_prob(teacher)))

    def estimate(table):
        losses = on_policy_distillation(
            all_logits(table),
            all_logits(teacher),
            SEQUENCES,
            gamma=1.0,
            single_step=single_step,
            length_normalize=False,
        )
        return jnp.sum(probs * losses)

    found, expected = jax.jit(jax.grad(estimate))(student), jax.jit(jax.grad(exact))(student)
    assert np.abs(expected).max() > 0.05
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_length_normalisation_divides_every_return_by_its_weights():
    rng = np.random.default_rng(3)
    student, teacher = rng.normal(size=(2, 4, 3)).astype(np.float32)
    tokens = np.array([0, 2, 1, 1])
    options = {"gamma": 1.0, "single_step": False}
    value = on_policy_distillation(student, teacher, tokens, **options)
    log_p = jax.nn.log_softmax(student)[np.arange(4), tokens]
    rewards = jax.nn.log_softmax(teacher)[np.arange(4), tokens] - log_p
    means = np.array([np.mean(rewards[t:]) for t in range(4)])
    np.testing.assert_allclose(value, -np.sum(means * log_p), rtol=1e-5)


@pytest.mark.parametrize(
    ("function", "arguments", "options", "error", "message"),
    [
        (discounted_returns, (REWARDS,), {"gamma": 1.5}, ValueError, r"gamma .*\[0, 1\]; got 1.5"),
        (discounted_returns, (np.ones(3, int),), {"gamma": 1.0}, TypeError, "rewards must be"),
        (discounted_returns, (np.float32(1),), {"gamma": 1.0}, ValueError, "rewards need"),
        (
            discounted_returns,
            (REWARDS,),
            {"gamma": 1.0, "where": np.ones(3, bool)},
            ValueError,
            r"where has shape \(3,\)",
        ),
        (sequence_distillation, (REWARDS, REWARDS), {}, ValueError, r"\[..., L, V\]"),
        (sequence_cross_entropy, (REWARDS, 1), {}, ValueError, r"\[..., L, V\]"),
        (on_policy_distillation, (REWARDS, REWARDS, 1), {}, ValueError, r"shape \(4,\)"),
        (
            on_policy_distillation,
            (REWARDS[None], REWARDS[None], np.ones(1)),
            {},
            TypeError,
            "labels must be integers",
        ),
    ],
)
def test_input_that_does_not_fit_raises(function, arguments, options, error, message):
    with pytest.raises(error, match=message):
        function(*arguments, **options)
