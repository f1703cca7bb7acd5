"""LDR-KL and ALDR-KL: values from the formula, limits, the worst distribution, the temperatures."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from regjax.losses.label_distribution import adaptive_temperature, label_distributionally_robust

Z = np.array([2.0, 1.0, 0.1, -1.0], np.float32)
CROSS_ENTROPIES = np.array([0.4493130024, 1.4493130024, 2.3493130024, 3.4493130024])

close = functools.partial(np.testing.assert_allclose, rtol=2e-6, atol=2e-7)


def violations(label, margin):
    return Z.astype(float) - Z[label] + margin * (np.arange(4) != label)


@pytest.mark.parametrize(
    ("label", "temperature", "expected"),
    [
        (0, 0.1, -0.0693085),
        (0, 1.0, -0.4533806),
        (0, 10.0, -0.6917273),
        (1, 0.1, 1.8613707),
        (1, 1.0, 0.9024054),
        (1, 10.0, 0.3350497),
    ],
)
def test_values(label, temperature, expected):
    close(label_distributionally_robust(Z, label, temperature=temperature), expected, atol=1e-6)


def test_limits():
    for label in range(4):
        cross_entropy = label_distributionally_robust(Z, label, margin=0.0)
        close(cross_entropy, CROSS_ENTROPIES[label] - np.log(4))
        hinge = label_distributionally_robust(Z, label, temperature=1e-4)
        close(hinge, violations(label, 1.0).max(), atol=2e-4)
        linear = label_distributionally_robust(Z, label, temperature=1e4)
        # float32 keeps lambda log mean exp(v / lambda) to lambda eps.
        close(linear, violations(label, 1.0).mean(), atol=3e-3)


def test_it_is_the_largest_penalised_mean_violation():
    v = violations(2, 0.7)
    loss = label_distributionally_robust(Z, 2, temperature=0.5, margin=0.7)
    worst = np.exp(v / 0.5) / np.exp(v / 0.5).sum()

    def penalised(d):
        return d @ v - 0.5 * np.sum(d * np.log(4 * d))

    close(loss, penalised(worst))
    others = np.random.default_rng(0).dirichlet(np.ones(4), 200)
    assert max(penalised(d) for d in others) < loss


def test_one_temperature_and_one_margin_per_example():
    logits, labels = np.tile(Z, (2, 1)), np.array([0, 1])
    losses = label_distributionally_robust(
        logits, labels, temperature=np.array([0.1, 10.0]), margin=np.array([1.0, 0.0])
    )
    close(losses[0], -0.0693085, atol=1e-6)
    close(losses[1], label_distributionally_robust(Z, 1, temperature=10.0, margin=0.0))
    masked = label_distributionally_robust(
        logits,
        labels,
        temperature=np.array([0.1, np.nan]),
        margin=np.array([1.0, np.inf]),
        where=np.array([True, False]),
    )
    np.testing.assert_array_equal(masked, [losses[0], 0.0])


def test_temperatures_are_those_of_the_authors_code():
    logits = np.random.default_rng(0).normal(size=(5, 4))
    kept = np.array([1.0, 0.8, 0.6, 0.9, 0.5])
    probs = np.exp(logits / kept[:, None])
    probs /= probs.sum(axis=1, keepdims=True)
    divergence = np.sum(probs * np.log(4 * probs), axis=1)
    expected = 1.2 - 1.2 * divergence / (2.0 * np.log(4))
    close(adaptive_temperature(logits, kept, reference=1.2), expected)
    close(
        adaptive_temperature(logits, kept, reference=1.2, alpha=4.0),
        1.2 - (1.2 - expected) / 2,
    )


def test_temperature_of_the_undecided_and_of_the_certain():
    logits = np.array(
        [[0.0, 0.0, 0.0, 0.0], [1e4, 0.0, 0.0, 0.0], [0.0, -np.inf, -np.inf, -np.inf]]
    )
    close(adaptive_temperature(logits, 1.0, reference=3.0, alpha=1.5), [3.0, 1.0, 1.0])


def test_temperatures_of_examples_that_do_not_count_are_kept_and_none_has_a_gradient():
    logits = np.array([Z, np.full(4, np.nan)])
    new = adaptive_temperature(logits, np.array([1.0, 0.7]), where=np.array([True, False]))
    close(new, [0.8464905, 0.7], atol=1e-6)
    slope = jax.grad(lambda z: adaptive_temperature(z, 1.0))(jnp.asarray(Z))
    np.testing.assert_array_equal(slope, 0.0)


def test_input_that_does_not_fit_raises():
    with pytest.raises(ValueError, match="temperature must be positive; got 0"):
        label_distributionally_robust(Z, 0, temperature=0.0)
    with pytest.raises(ValueError, match=r"temperature has shape \(2,\); expected \(\) or \(\)"):
        label_distributionally_robust(Z, 0, temperature=np.ones(2))
    with pytest.raises(ValueError, match=r"margin has shape \(4,\)"):
        label_distributionally_robust(Z, 0, margin=np.ones(4))
    for options in ({"reference": 0.0}, {"alpha": 1.0}):
        with pytest.raises(ValueError, match="reference must be positive and alpha above 1"):
            adaptive_temperature(Z, 1.0, **options)
    with pytest.raises(ValueError, match="temperature must be positive; got -1"):
        adaptive_temperature(Z, -1.0)
    with pytest.raises(ValueError, match=r"temperature has shape \(4,\)"):
        adaptive_temperature(Z, np.ones(4))
    with pytest.raises(ValueError, match="K at least 2"):
        adaptive_temperature(Z[:1], 1.0)
    with pytest.raises(TypeError, match="logits must be floating"):
        adaptive_temperature(Z.astype(int), 1.0)
