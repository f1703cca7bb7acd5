"""Linear models trained to the end: what the losses promise of accuracy, on drawn normals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from regjax.losses import (
    class_risk_sums,
    cost_weighted_distillation,
    exponentiated_gradient,
    label_smearing,
    robust_costs,
    smearing_rate,
)


def minimised(loss, weights, steps):
    """The weights after so many steps of gradient descent with momentum."""
    optimizer = optax.sgd(0.5, momentum=0.9)

    def step(carry, _):
        weights, state = carry
        updates, state = optimizer.update(jax.grad(loss)(weights), state)
        return (optax.apply_updates(weights, updates), state), None

    (weights, _), _ = jax.lax.scan(step, (weights, optimizer.init(weights)), length=steps)
    return weights


K, D, SEEDS = 4, 30, 6
CENTRES = np.random.default_rng(99).normal(size=(K, D)) * 0.6


def noisy_normals(seed, count, noise):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, K, count)
    features = (CENTRES[labels] + rng.normal(size=(count, D))).astype(np.float32)
    moved = np.where(rng.random(count) < noise, rng.integers(1, K, count), 0)
    return features, labels, (labels + moved) % K


@functools.partial(jax.jit, static_argnames="kind")
@functools.partial(jax.vmap, in_axes=(0, 0, None, None))
def fitted(features, labels, kind, rate):
    def loss(weights):
        return label_smearing(features @ weights, labels, rate, kind=kind).mean()

    return minimised(loss, jnp.zeros((D, K)), 400)


@pytest.mark.parametrize("noise", [0.2, 0.4])
def test_smoothing_and_forward_correction_help_where_labels_are_noisy(noise):
    features, _, labels = (
        np.stack(x) for x in zip(*(noisy_normals(s, 200, noise) for s in range(SEEDS)), strict=True)
    )
    held_out, truth, _ = noisy_normals(1000, 4000, 0.0)

    def accuracy(kind, rate):
        predicted = np.argmax(held_out @ np.asarray(fitted(features, labels, kind, rate)), -1)
        return np.mean(predicted == truth)

    rate = smearing_rate(noise, K)
    plain = accuracy("smoothing", 0.0)
    # The features of a few examples can be fitted to their wrong labels, to a half or more.
    assert plain < 0.75
    assert accuracy("smoothing", rate) > plain + 0.02
    assert accuracy("forward", rate) > plain + 0.005


COUNTS = np.array([1600, 320, 80])
PRIOR = COUNTS / COUNTS.sum()


def long_tailed_normals(seed, counts):
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(3), counts)
    centres = np.array([[0.0, 0.0], [2.0, 0.0], [1.0, 1.2]])
    features = centres[labels] + rng.normal(size=(len(labels), 2))
    return np.concatenate([features, np.ones((len(labels), 1))], 1).astype(np.float32), labels


@jax.jit
def standard_balanced_and_robust(features, targets, held_out, held_out_targets):
    """Weights `[3, 3, 3]` of the three objectives; the multipliers see the held-out examples."""

    def fit(costs, weights):
        def loss(weights):
            return cost_weighted_distillation(features @ weights, targets, costs).mean()

        return minimised(loss, weights, 100)

    def round_of(carry, _):
        multipliers, weights = carry
        weights = fit(robust_costs(multipliers, PRIOR), weights)
        sums, counts = class_risk_sums(held_out @ weights, held_out_targets, loss="zero_one")
        return (exponentiated_gradient(multipliers, sums / counts, step_size=0.5), weights), None

    start = jnp.zeros((3, 3))
    standard, balanced = (fit(costs, start) for costs in (jnp.ones(3), 1 / PRIOR))
    (_, robust), _ = jax.lax.scan(round_of, (jnp.full(3, 1 / 3), start), length=60)
    return jnp.stack([standard, balanced, robust])


def test_the_worst_class_is_better_balanced_and_best_robust():
    training, labels = long_tailed_normals(0, COUNTS)
    held_out, held_out_labels = long_tailed_normals(1, [1000, 1000, 1000])
    each = standard_balanced_and_robust(
        training, np.eye(3)[labels], held_out, np.eye(3)[held_out_labels]
    )
    test, truth = long_tailed_normals(2, [4000, 4000, 4000])
    right = np.argmax(test @ np.asarray(each), -1) == truth
    worst = right.reshape(3, 3, 4000).mean(-1).min(-1)
    assert worst[0] < worst[1] - 0.1
    assert worst[1] < worst[2] - 0.02
    # The robust objective's classes are equally good.
    assert np.ptp(right.reshape(3, 3, 4000).mean(-1)[2]) < 0.06
