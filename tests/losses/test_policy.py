"""Advantages, the two terms of REAL on a toy that can be enumerated, estimators of KL."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from regjax.losses import expected_score, raft, token_cross_entropy
from regjax.losses.policy import (
    generalized_policy_gradient,
    group_normalized,
    leave_one_out,
    real,
    sampled_kl,
)
from regjax.scores import TokenGrid

REWARDS = np.array([-4.0, -1.0, 0.0, -1.0], np.float32)
# Unnormalised over a vocabulary of two tokens, "1" and "5".
GRID = TokenGrid.from_ids([0, 1], [1.0, 5.0])
A, B = np.float32(0.0), np.array([-1.0, 1.0], np.float32)


def close(found, expected, atol=1e-6):
    np.testing.assert_allclose(found, expected, rtol=5e-6, atol=atol)


def of_real(codec=GRID, **options):
    """`real`, compiled, of logits, targets and log-probabilities."""
    return jax.jit(lambda logits, targets, log_pi: real(logits, targets, codec, log_pi, **options))


def test_advantages_are_the_computed_ones():
    close(leave_one_out(REWARDS), [-10 / 3, 2 / 3, 2, 2 / 3])
    close(group_normalized(REWARDS), [-5 / 3, 1 / 3, 1, 1 / 3])
    close(group_normalized(REWARDS, clip=1.0), [-1, 1 / 3, 1, 1 / 3])


def test_advantages_are_the_difference_from_the_mean_of_the_others():
    rewards = np.random.default_rng(0).normal(size=(3, 6)).astype(np.float32)
    found = leave_one_out(rewards)
    for g, i in itertools.product(range(3), range(6)):
        close(found[g, i], rewards[g, i] - np.delete(rewards[g], i).mean())
    close(found.sum(-1), 0.0, atol=5e-6)
    np.testing.assert_allclose(group_normalized(10 * rewards), group_normalized(rewards), rtol=5e-6)
    close(
        group_normalized(rewards),
        (rewards - rewards.mean(-1, keepdims=True)) / rewards.std(-1, keepdims=True),
    )
    sample = np.std(leave_one_out(rewards), axis=-1, ddof=1, keepdims=True)
    close(group_normalized(rewards, correction=1), found / sample)


@pytest.mark.parametrize("reward", [0.1, -1e4 / 3, 0.0])
def test_equal_rewards_and_single_answers_have_no_advantage(reward):
    for count in (1, 3, 7):
        rewards = np.full((2, count), reward, np.float32)
        for function in (leave_one_out, group_normalized):
            np.testing.assert_array_equal(function(rewards), np.zeros((2, count)))


@pytest.mark.parametrize("function", [leave_one_out, group_normalized])
def test_masked_answers_are_as_if_they_were_not_there(function):
    where = np.array([[1, 0, 1, 1, 0], [0, 0, 0, 1, 0], [0, 0, 0, 0, 0]], bool)
    rewards = np.random.default_rng(1).normal(size=(3, 5)).astype(np.float32)
    junk = np.where(where, rewards, [np.nan, np.inf, -np.inf, np.nan, 1e30]).astype(np.float32)
    found = jax.jit(lambda r: function(r, where=where))(junk)
    close(found[0][where[0]], function(rewards[0][where[0]]))
    np.testing.assert_array_equal(np.asarray(found)[~where], 0.0)
    np.testing.assert_array_equal(found[1:], 0.0)
    half = function(jnp.asarray(rewards, jnp.bfloat16))
    chex.assert_type(half, jnp.float32)
    close(half, function(jnp.asarray(rewards, jnp.bfloat16).astype(jnp.float32)))
    close(jax.vmap(function)(rewards), function(rewards))
    np.testing.assert_array_equal(jax.grad(lambda r: function(r)[0, 0])(rewards), 0.0)


# The toy: reasoning c is 0 or 1 with pi(1) = sigmoid(a), the score 5 has probability sigmoid(b_c).


def parts(a, b, target, label_weight):
    """log pi(c), the logits of the scores [2, 2] and the rewards [2]."""
    log_pi = jax.nn.log_sigmoid(jnp.stack([-a, a]))
    logits = jnp.stack([jnp.zeros(2), b], axis=-1)
    rewards = -jnp.square(1 + 4 * jax.nn.sigmoid(b) - target)
    return log_pi, logits, rewards + label_weight * jax.nn.log_sigmoid(b)


def objective(a, b, target, label_weight):
    log_pi, _, rewards = parts(a, b, target, label_weight)
    return jnp.sum(jnp.exp(log_pi) * rewards)


TOYS = {
    "squared error": (
        (4.0, 0.0),
        -1.8542090681,
        [0.9242343145, 1.5133097142, 0.0595857516],
    ),
    "and label": ((5.0, 1.0), -5.6674707548, [2.0984686291, 2.6652867362, 0.9805041947]),
}
toys = pytest.mark.parametrize("toy", TOYS.values(), ids=TOYS)


def expected_gradient(losses_of, samples):
    """Minus the gradient of the mean loss over all groups of `samples`, weighed by probability."""

    def total(a, b):
        log_pi = jax.nn.log_sigmoid(jnp.stack([-a, a]))
        mean = 0.0
        for group in itertools.product((0, 1), repeat=samples):
            probability = jax.lax.stop_gradient(jnp.exp(log_pi[jnp.array(group)].sum()))
            mean += probability * losses_of(a, b, jnp.array(group)).mean()
        return -mean

    slope_a, slope_b = jax.jit(jax.grad(total, (0, 1)))(A, B)
    return np.array([slope_a, *slope_b])


@toys
def test_both_terms_are_the_exact_gradient_of_the_toy(toy):
    (target, weight), value, gradient = toy
    _, logits, rewards = parts(A, B, target, 0.0)
    close(expected_score(logits, GRID), [2.0757656855, 3.9242343145])
    if target == 4.0:
        close(rewards, [-3.7026776972, -0.0057404391])
    close(objective(A, B, target, weight), value)
    close(np.hstack(jax.grad(objective, (0, 1))(A, B, target, weight)), gradient)

    def losses_of(a, b, group):
        log_pi, _, rewards = parts(a, b, target, weight)
        return generalized_policy_gradient(log_pi[group], rewards[group], rewards[group])

    close(expected_gradient(losses_of, 1), gradient)


@toys
@pytest.mark.parametrize("samples", [2, 3])
def test_leave_one_out_keeps_the_estimate_unbiased(toy, samples):
    (target, weight), _, gradient = toy

    def losses_of(a, b, group):
        log_pi, _, rewards = parts(a, b, target, weight)
        rewards = rewards[group]
        return generalized_policy_gradient(log_pi[group], rewards, leave_one_out(rewards))

    close(expected_gradient(losses_of, samples), gradient, atol=3e-6)


def test_without_the_second_term_the_score_gets_no_gradient_and_equal_rewards_leave_only_it():
    def losses_of(a, b, group, beta):
        log_pi, _, rewards = parts(a, b, 4.0, 0.0)
        rewards = rewards[group]
        return generalized_policy_gradient(
            log_pi[group], rewards, leave_one_out(rewards), reward_weight=beta
        )

    found = expected_gradient(lambda *x: losses_of(*x, 0.0), 2)
    close(found, [0.9242343145, 0.0, 0.0])
    slopes = jax.grad(lambda a, b: losses_of(a, b, jnp.array([1, 1]), 1.0).sum(), (0, 1))(A, B)
    assert slopes[0] == 0.0
    assert slopes[1][1] != 0.0


@toys
def test_real_is_its_parts_and_gives_the_exact_second_term(toy):
    (target, weight), _, gradient = toy

    def losses_of(a, b, group):
        log_pi, logits, _ = parts(a, b, target, weight)
        targets = jnp.full(len(group), target)
        # Between the grid's values, log p would be a mean of two: only used on the grid.
        return real(logits[group], targets, GRID, log_pi[group], label_weight=weight, clip=None)

    log_pi, _, rewards = parts(A, B, target, weight)
    group = jnp.array([0, 1])
    expected = -group_normalized(rewards) * log_pi - rewards
    close(losses_of(A, B, group), expected)
    # The second term does not see the advantages, so it is exact whatever their normalisation.
    close(expected_gradient(losses_of, 2)[1:], gradient[1:], atol=3e-6)


def test_real_of_the_code_clips_both_kinds_of_advantages_apart():
    rng = np.random.default_rng(2)
    logits, log_pi = rng.normal(size=(2, 6, 8)), rng.normal(size=(2, 6))
    codec = TokenGrid.from_ids([1, 2, 3, 4, 5], [1.0, 2.0, 3.0, 4.0, 5.0])
    targets = np.repeat([[4.0], [2.0]], 6, axis=1)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    errors = p[..., 1:6] @ np.arange(1, 6) - targets
    p_label = np.stack([p[0, :, 4], p[1, :, 2]])
    rewards = -(errors**2) + 0.7 * np.log(p_label)

    def advantage(r):
        r = r - r.mean(-1, keepdims=True)
        return np.clip(r / r.std(-1, keepdims=True), -1, 1)

    options = {"label_weight": 0.7, "reward_weight": 0.01}
    of_code = (advantage(-(errors**2)) + 0.7 * advantage(p_label)) * log_pi
    found = of_real(codec, form="code", **options)(logits, targets, log_pi)
    close(found, -of_code - 0.01 * rewards, atol=3e-6)
    found = of_real(codec, **options)(logits, targets, log_pi)
    close(found, -advantage(rewards) * log_pi - 0.01 * rewards, atol=3e-6)


def test_real_ignores_what_is_masked_and_computes_in_float32():
    rng = np.random.default_rng(3)
    logits = rng.normal(size=(2, 4, 2)).astype(np.float32)
    log_pi = rng.normal(size=(2, 4)).astype(np.float32)
    targets = np.full((2, 4), 5.0, np.float32)
    where = np.array([[1, 0, 1, 1], [0, 0, 0, 0]], bool)

    @jax.jit
    def both(logits, targets, log_pi):
        def total(logits, log_pi):
            losses = real(logits, targets, GRID, log_pi, where=where)
            return losses.sum(), losses

        return jax.grad(total, (0, 1), has_aux=True)(logits, log_pi)

    (z, c), losses = both(logits, targets, log_pi)
    kept = np.flatnonzero(where[0])
    close(losses[0, kept], of_real()(logits[0, kept], targets[0, kept], log_pi[0, kept]))
    for junk in (np.nan, np.inf, -np.inf):
        broken = [np.where(where, x, junk).astype(np.float32) for x in (targets, log_pi)]
        wide = np.where(where[..., None], logits, junk).astype(np.float32)
        (z_junk, c_junk), found = both(wide, *broken)
        for one, other in ((found, losses), (z_junk, z), (c_junk, c)):
            np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(np.asarray(losses)[~where], 0.0)
    np.testing.assert_array_equal(np.asarray(z)[~where], 0.0)
    half = of_real()(*(jnp.asarray(x, jnp.bfloat16) for x in (logits, targets, log_pi)))
    chex.assert_type(half, jnp.float32)


def test_real_of_one_sample_is_raft_with_cross_entropy_of_the_score():
    logits = np.random.default_rng(4).normal(size=(5, 1, 8))
    codec = TokenGrid.from_ids([1, 2, 3, 4, 5], [1.0, 2.0, 3.0, 4.0, 5.0])
    targets = np.array([[1.0], [4.0], [2.0], [5.0], [3.0]])
    found = of_real(codec, label_weight=0.4)(logits, targets, np.full((5, 1), -7.0))
    cross_entropy = token_cross_entropy(logits, targets.astype(int))
    close(found, raft(logits, targets, codec) + 0.4 * cross_entropy)


@pytest.mark.parametrize("label_weight", [0.0, 1.0])
def test_real_is_finite_for_extreme_logits(label_weight):
    logits = np.array([[1e4, -1e4], [-1e4, 1e4], [0.0, 9e3]], np.float32)
    losses, slopes = jax.vmap(
        lambda y: jax.value_and_grad(
            lambda z: real(
                z, jnp.full(3, y), GRID, np.full(3, -1e4), label_weight=label_weight
            ).sum()
        )(logits)
    )(np.array([1.0, 2.0, 5.0], np.float32))
    assert np.isfinite(losses).all()
    assert np.isfinite(slopes).all()


P, Q = np.array([0.2, 0.5, 0.3]), np.array([0.4, 0.25, 0.35])


def test_the_estimators_of_kl_have_their_means_and_their_gradients():
    logits = np.log(P).astype(np.float32)

    def mean(z, kind):
        log_p = jax.nn.log_softmax(z)
        return jnp.sum(P * sampled_kl(log_p, np.log(Q), kind=kind))

    kl = P @ np.log(P / Q)
    close(mean(logits, "k1"), kl)
    close(mean(logits, "k3"), kl)
    close(mean(logits, "k2"), P @ np.log(P / Q) ** 2 / 2)
    slopes = {kind: jax.grad(mean)(logits, kind) for kind in ("k1", "k2", "k3")}
    close(slopes["k1"], 0.0)
    close(slopes["k2"], P * (np.log(P / Q) - kl))
    close(slopes["k3"], P - Q)


def test_k2_and_k3_are_never_negative_and_zero_at_equality():
    ratio = np.array([-20.0, -1.0, -1e-3, 0.0, 1e-3, 1.0, 1e4], np.float32)
    for kind in ("k2", "k3"):
        found = sampled_kl(ratio, np.zeros(7, np.float32), kind=kind)
        assert (found >= 0).all()
        assert found[3] == 0.0


def test_what_does_not_fit_raises_by_name():
    with pytest.raises(TypeError, match="rewards must be floating; got int"):
        leave_one_out(np.array([1, 2]))
    with pytest.raises(ValueError, match="rewards must have shape"):
        leave_one_out(1.0)
    with pytest.raises(ValueError, match=r"where has shape \(3,\); expected \(4,\)"):
        group_normalized(REWARDS, where=np.ones(3, bool))
    with pytest.raises(ValueError, match=r"advantages have shape \(2,\); expected \(4,\)"):
        generalized_policy_gradient(REWARDS, REWARDS, REWARDS[:2])
    with pytest.raises(ValueError, match=r"rewards have shape \(2,\); expected \(4,\)"):
        generalized_policy_gradient(REWARDS, REWARDS[:2], REWARDS)
    with pytest.raises(ValueError, match="form must be 'paper' or 'code'; got 'verl'"):
        real(np.zeros((3, 2)), np.ones(3), GRID, np.zeros(3), form="verl")
    with pytest.raises(ValueError, match=r"targets have shape \(2,\); expected \(3,\)"):
        real(np.zeros((3, 2)), np.ones(2), GRID, np.zeros(3))
    with pytest.raises(ValueError, match="kind must be 'k1', 'k2' or 'k3'; got 'k4'"):
        sampled_kl(REWARDS, REWARDS, kind="k4")
