"""A teacher of k tokens and a tail: a divergence, below the full one, and equal to it for k = V."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import special

from regjax.losses.distillation import distillation
from regjax.losses.top_k_teacher import teacher_top_k, top_k_distillation

V = 6
KINDS = ("forward", "reverse", "jensen_shannon", "skew")
BETA = (("beta", 0.3),)


def logits(bound=10.0):
    return hnp.arrays(np.float32, (4, V), elements=st.floats(-bound, bound, width=32))


@functools.partial(jax.jit, static_argnames="options")
def all_kinds(student, kept, options=()):
    return jnp.stack([top_k_distillation(student, *kept, kind=k, **dict(options)) for k in KINDS])


@jax.jit
def by_k_and_whole(student, teacher):
    """Losses [V + 1, kinds, 4] for k from 1 to V, and the full ones."""
    each = [all_kinds(student, teacher_top_k(teacher, k), BETA) for k in range(1, V + 1)]
    whole = jnp.stack([distillation(student, teacher, kind=k, **dict(BETA)) for k in KINDS])
    return jnp.stack([*each, whole])


@settings(deadline=None, max_examples=30)
@given(logits(), logits())
def test_the_loss_grows_with_k_to_the_full_one(student, teacher):
    losses = by_k_and_whole(student, teacher)
    full = losses[-1]
    assert np.all(losses >= 0.0)
    # Each bucket is a coarser view of the next: only rounding may be in the way.
    for fewer, more in itertools.pairwise(losses):
        assert np.all(fewer <= more + 1e-6 + 1e-5 * np.abs(full))
    np.testing.assert_allclose(losses[-2], full, rtol=1e-5, atol=1e-6)


@settings(deadline=None, max_examples=20)
@given(logits(30.0), st.integers(1, V))
def test_what_is_kept_of_the_teacher(teacher, k):
    kept = teacher_top_k(teacher, k, temperature=2.0)
    exact = special.log_softmax(teacher.astype(np.float64) / 2, axis=-1)
    ordered = -np.sort(-exact, axis=-1)
    np.testing.assert_allclose(kept.log_probs, ordered[:, :k], rtol=1e-6, atol=2e-6)
    np.testing.assert_array_equal(
        kept.log_probs, jnp.take_along_axis(jax.nn.log_softmax(teacher / 2), kept.tokens, -1)
    )
    with np.errstate(divide="ignore"):
        tail = np.log(np.exp(ordered[:, k:]).sum(-1))
    np.testing.assert_allclose(kept.log_tail, tail, rtol=1e-6, atol=2e-6)
    assert kept.tokens.dtype == jnp.int32


def test_without_its_tail_the_teacher_is_completed_to_one():
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(size=(2, 5, V)).astype(np.float32)
    for k in (1, V):
        kept = teacher_top_k(teacher, k)
        np.testing.assert_allclose(
            all_kinds(student, kept[:2]), all_kinds(student, kept), rtol=1e-5, atol=1e-5
        )


def test_a_tail_below_float32_is_seen_if_it_is_given_and_finite_if_not():
    student = np.array([0.0, 0.0, 0.0], np.float32)
    teacher = np.array([0.0, -30.0, -31.0], np.float32)
    tokens, log_probs, log_tail = teacher_top_k(teacher, 1)
    exact = special.logsumexp([-30.0, -31.0])
    np.testing.assert_allclose(log_tail, exact, rtol=1e-6)
    reverse = 2 / 3 * (np.log(2 / 3) - exact) + 1 / 3 * np.log(1 / 3)
    found = top_k_distillation(student, tokens, log_probs, log_tail, kind="reverse")
    np.testing.assert_allclose(found, reverse, rtol=1e-6)
    value, gradient = jax.value_and_grad(
        lambda z: top_k_distillation(z, tokens, log_probs, kind="reverse")
    )(student)
    floor = 2 / 3 * (np.log(2 / 3) - np.log(2.0**-21)) + 1 / 3 * np.log(1 / 3)
    np.testing.assert_allclose(value, floor, rtol=1e-5)
    assert np.isfinite(gradient).all()
    forward = top_k_distillation(student, tokens, log_probs)
    np.testing.assert_allclose(forward, np.log(3), rtol=1e-5)


def test_a_student_without_a_tail_is_not_infinitely_far_by_rounding():
    student = np.array([1.0, 0.5, -np.inf, -np.inf], np.float32)
    teacher = np.array([0.3, 0.1, -np.inf, -np.inf], np.float32)
    for kept in (teacher_top_k(teacher, 2), teacher_top_k(teacher, 2)[:2]):
        expected = [distillation(student[:2], teacher[:2], kind=kind) for kind in KINDS]
        np.testing.assert_allclose(all_kinds(student, kept), expected, rtol=1e-5)
        gradients = jax.jacrev(all_kinds)(student, kept)
        assert np.isfinite(gradients).all()
    wide = teacher_top_k(np.zeros(4, np.float32), 2)
    assert top_k_distillation(student, *wide) == np.inf


def test_probabilities_rounded_in_a_cache_keep_it_a_divergence():
    rng = np.random.default_rng(1)
    teacher = rng.normal(size=(200, V)).astype(np.float32) * 3
    loss = jax.jit(top_k_distillation)
    for k in (3, V):
        tokens, log_probs, log_tail = teacher_top_k(teacher, k)
        rounded = log_probs.astype(jnp.bfloat16)
        for tail in (None, log_tail.astype(jnp.bfloat16)):
            losses = loss(teacher, tokens, rounded, tail)
            assert losses.dtype == jnp.float32
            assert np.all(losses >= 0.0)
            # Log-probabilities of up to 18, eight bits each: off by up to 1/16, then squared.
            assert np.max(losses) < 0.01


def test_renormalised_it_is_the_divergence_on_the_k_tokens_and_blind_to_the_rest():
    rng = np.random.default_rng(2)
    student, teacher = rng.normal(size=(2, 5, V)).astype(np.float32)
    kept = teacher_top_k(teacher, 3)
    of_kept = jnp.take_along_axis(student, kept.tokens, -1)
    expected = [distillation(of_kept, kept.log_probs, kind=kind) for kind in KINDS]
    found = all_kinds(student, kept, (("tail", "renormalize"),))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)
    away = student + 5.0 * np.all(np.arange(V) != kept.tokens[..., None], axis=-2)
    np.testing.assert_allclose(
        top_k_distillation(away, *kept, tail="renormalize"),
        top_k_distillation(student, *kept, tail="renormalize"),
        rtol=1e-5,
    )
    assert np.all(top_k_distillation(away, *kept) > top_k_distillation(student, *kept))


def test_negative_tokens_are_padding():
    rng = np.random.default_rng(3)
    student, teacher = rng.normal(size=(2, 5, V)).astype(np.float32)
    kept = teacher_top_k(teacher, 2)
    padded = (
        np.pad(kept.tokens, ((0, 0), (0, 2)), constant_values=-1),
        np.pad(kept.log_probs, ((0, 0), (0, 2)), constant_values=np.nan),
    )

    @jax.jit
    def all_ways(z, tokens, log_probs):
        """Losses of both tails, with and without the teacher's, and their gradients."""
        ways = [("bucket", None), ("bucket", kept.log_tail), ("renormalize", None)]
        return [
            jax.value_and_grad(
                lambda z, tail=tail, given=given: top_k_distillation(
                    z, tokens, log_probs, given, tail=tail
                ).sum()
            )(z)
            for tail, given in ways
        ]

    expected = jax.tree.leaves(all_ways(student, *kept[:2]))
    found = jax.tree.leaves(all_ways(student, *padded))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_tokens_beyond_the_vocabulary_give_nan():
    log_probs = np.log(np.array([[0.5, 0.2], [0.5, 0.2]], np.float32))
    losses = top_k_distillation(np.zeros((2, V), np.float32), np.array([[0, V], [0, 1]]), log_probs)
    np.testing.assert_array_equal(np.isnan(losses), [True, False])


def test_what_was_kept_gets_no_gradient():
    student = np.zeros(V, np.float32)
    kept = teacher_top_k(np.arange(V, dtype=np.float32), 2)
    gradients = jax.grad(
        lambda log_probs, log_tail: top_k_distillation(student, kept.tokens, log_probs, log_tail),
        (0, 1),
    )(kept.log_probs, kept.log_tail)
    for gradient in gradients:
        np.testing.assert_array_equal(gradient, np.zeros_like(gradient))


Z, TWO = np.zeros((3, V), np.float32), np.zeros((3, 2), np.int32)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((Z, Z[:, :2], Z[:, :2]), {}, TypeError, "tokens must be integers; got float32"),
        ((Z, TWO, TWO), {}, TypeError, "log_probs must be floating; got int32"),
        ((Z, TWO, Z[:, :3]), {}, ValueError, r"tokens \(3, 2\) and log_probs \(3, 3\)"),
        ((Z[:2], TWO, Z[:, :2]), {}, ValueError, r"student has shape \(2, 6\)"),
        ((Z, TWO, Z[:, :2], Z[:, :2]), {}, ValueError, r"log_tail has shape \(3, 2\); .*\(3,\)"),
        ((Z, TWO, Z[:, :2]), {"tail": "none"}, ValueError, "tail must be .*'none'"),
        ((Z, TWO, Z[:, :2]), {"kind": "other"}, ValueError, "kind must be .*'other'"),
        ((Z, TWO, Z[:, :2]), {"temperature": 0}, ValueError, "temperature must be positive"),
    ],
)
def test_input_that_does_not_fit_raises(arguments, options, error, message):
    with pytest.raises(error, match=message):
        top_k_distillation(*arguments, **options)


def test_k_out_of_range_raises():
    for k in (0, V + 1):
        with pytest.raises(ValueError, match=rf"k must lie in 1..V; got {k}"):
            teacher_top_k(Z, k)
