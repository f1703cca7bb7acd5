"""Long-tail losses: values of public code's formulas, limits and identities."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from regjax.losses.long_tail import (
    class_balanced_weights,
    ldam,
    logit_adjusted,
    post_hoc_adjusted,
    softmax_focal,
    vector_scaling,
)
from regjax.losses.tokens import token_cross_entropy

Z = np.array([2.0, 1.0, 0.1, -1.0], np.float32)
PRIOR = np.array([0.5, 0.3, 0.15, 0.05])
COUNTS = [1000, 300, 100, 10]
CROSS_ENTROPIES = np.array([0.4493130024, 1.4493130024, 2.3493130024, 3.4493130024])

close = functools.partial(np.testing.assert_allclose, rtol=2e-6, atol=2e-7)


def all_labels(loss, *arguments, logits=Z, **options):
    return loss(np.tile(logits, (4, 1)), np.arange(4), *arguments, **options)


def test_logit_adjusted_values():
    expected = [0.2394710944, 1.7502967182, 3.3434438987, 5.5420561874]
    close(all_labels(logit_adjusted, PRIOR), expected)
    # Counts are as good as priors, and arrays of JAX as those of NumPy.
    close(all_labels(logit_adjusted, [100, 60, 30, 10]), expected)
    close(all_labels(logit_adjusted, jnp.asarray(PRIOR)), expected)


def test_logit_adjusted_pairwise_form():
    for y in range(4):
        ratios = (PRIOR / PRIOR[y]) ** 1.7 * np.exp(Z.astype(float) - Z[y])
        close(logit_adjusted(Z, y, PRIOR, tau=1.7), np.log1p(ratios.sum() - 1))


@pytest.mark.parametrize("loss", [logit_adjusted, vector_scaling], ids=["logit", "vector"])
def test_equal_counts_are_cross_entropy(loss):
    close(all_labels(loss, [7, 7, 7, 7]), CROSS_ENTROPIES)


def test_no_adjustment_is_cross_entropy():
    close(all_labels(logit_adjusted, PRIOR, tau=0.0), CROSS_ENTROPIES)
    close(all_labels(vector_scaling, PRIOR, gamma=0.0, tau=0.0), CROSS_ENTROPIES)


def test_post_hoc_adjustment_undoes_the_prior_in_the_posterior():
    """Posteriors of a skewed prior, adjusted, are those of the uniform one."""
    likelihoods = np.random.default_rng(0).dirichlet(np.ones(4), 6)
    skewed = np.log(likelihoods * PRIOR)
    adjusted = post_hoc_adjusted(skewed, PRIOR)
    close(jax.nn.softmax(adjusted), likelihoods / likelihoods.sum(axis=1, keepdims=True))
    close(post_hoc_adjusted(Z, PRIOR, tau=0.0), Z)
    close(post_hoc_adjusted(Z, 1000 * PRIOR, tau=2.0), Z - 2 * np.log(PRIOR))


def test_training_adds_what_is_subtracted_afterwards():
    """Trained with the adjustment, z needs none; trained without, z + log pi does."""
    trained = np.asarray(Z + np.log(PRIOR))
    close(
        all_labels(token_cross_entropy, logits=trained),
        all_labels(logit_adjusted, PRIOR),
    )
    close(post_hoc_adjusted(trained, PRIOR), Z, atol=5e-7)


def test_ldam_values():
    losses = all_labels(ldam, COUNTS, logits=np.array([0.8, 0.3, -0.1, -0.4]))
    close(losses, [3.5125e-5, 21.4093051, 35.4351202, 51.0000003], rtol=5e-6, atol=5e-7)
    # With all other logits far below, the loss of equal ones is log(1 + e^(s m)).
    pairs = np.where(np.eye(4) + np.roll(np.eye(4), 1, axis=1), 0.0, -1e4)
    losses = ldam(pairs, np.arange(4), COUNTS, scale=2.0)
    margins = np.log(np.expm1(np.asarray(losses, float))) / 2
    close(margins, [0.1581139, 0.2136435, 0.2811707, 0.5], rtol=5e-6)


def test_ldam_margins_of_long_tailed_cifar_10():
    counts = [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
    margins = [
        *(0.158113883, 0.179696997, 0.204237705, 0.232091150, 0.263829028),
        *(0.299767651, 0.340675192, 0.387220914, 0.440497028, 0.5),
    ]
    # Of equal logits the loss is log(1 + (K - 1) e^(s m)).
    losses = ldam(np.zeros((10, 10)), np.arange(10), counts, scale=2.0)
    close(np.log(np.expm1(np.asarray(losses, float)) / 9) / 2, margins, rtol=5e-6)
    without = ldam(np.zeros((10, 10)), np.arange(10), counts, largest_margin=0.0)
    close(without, np.full(10, np.log(10)))


def test_class_balanced_weights():
    close(class_balanced_weights(COUNTS), [0.0366994, 0.1181682, 0.3509889, 3.4941435], rtol=5e-6)
    close(
        class_balanced_weights(COUNTS, beta=0.99),
        [0.2839565, 0.2985873, 0.4478845, 2.9695717],
        atol=1e-7,
    )
    inverse = [0.0349854, 0.1166181, 0.3498542, 3.4985423]
    close(class_balanced_weights(COUNTS, beta=1.0), inverse, atol=5e-8)
    np.testing.assert_array_equal(class_balanced_weights(COUNTS, beta=0.0), np.ones(4))


@pytest.mark.parametrize("beta", [1e-9, 0.5, 0.9999, 1 - 1e-9])
def test_class_balanced_weights_keep_their_digits(beta):
    counts = np.array([1, 3, 50_000, 10_000_000])
    exact = -1.0 / np.expm1(counts * np.log(beta))
    weights = jax.jit(functools.partial(class_balanced_weights, beta=beta))(jnp.asarray(counts))
    close(weights, 4 * exact / exact.sum())


def test_focal_values():
    for gamma, expected in ((0.0, 0.4493130), (1.0, 0.1626215), (2.0, 0.0588582), (5.0, 0.0027906)):
        close(softmax_focal(Z, 0, gamma=gamma), expected, atol=5e-8)
    close(softmax_focal(np.zeros(2), 1), 0.1732867951)
    close(0.25 * softmax_focal(np.zeros(2), 1), 0.0433216988)


def test_softmax_focal_of_two_classes_is_the_sigmoid_focal_loss_of_optax():
    logits = np.linspace(-6, 6, 9).astype(np.float32)
    pairs = np.stack([np.zeros(9, np.float32), logits], axis=-1)
    for label in (0, 1):
        expected = optax.losses.sigmoid_focal_loss(logits, np.full(9, float(label)), gamma=3.0)
        close(softmax_focal(pairs, np.full(9, label), gamma=3.0), expected, rtol=1e-5)


def test_a_focus_below_one_has_a_finite_gradient_at_certainty():
    gradient = jax.grad(lambda z: softmax_focal(z, 0, gamma=0.5))(jnp.array([200.0, 0.0, 0.0]))
    np.testing.assert_array_equal(gradient, 0.0)


def test_vector_scaling_without_a_factor_is_logit_adjusted():
    close(
        all_labels(vector_scaling, COUNTS, gamma=0.0, tau=1.3),
        all_labels(logit_adjusted, COUNTS, tau=1.3),
        atol=1e-6,
    )
    # The public form divides by (n_max / n_k)^gamma.
    divisors = (1000 / np.array(COUNTS)) ** 0.3
    scaled = np.asarray(Z / divisors + np.log(COUNTS))
    close(
        all_labels(vector_scaling, COUNTS),
        all_labels(token_cross_entropy, logits=scaled),
        rtol=5e-6,
    )


@pytest.mark.parametrize("loss", [logit_adjusted, ldam, vector_scaling])
def test_counts_that_do_not_fit_raise(loss):
    with pytest.raises(ValueError, match=r"counts have shape \(3,\); expected \(4,\)"):
        loss(Z, 0, [1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match=r"counts must be positive; got \[3, 2, 0, 1\]"):
        loss(Z, 0, [3, 2, 0, 1])


def test_options_that_do_not_fit_raise():
    with pytest.raises(ValueError, match=r"counts have shape \(3,\); expected \(4,\)"):
        post_hoc_adjusted(Z, [1.0, 2.0, 3.0])
    with pytest.raises(TypeError, match="logits must be floating"):
        post_hoc_adjusted(Z.astype(int), COUNTS)
    with pytest.raises(ValueError, match=r"logits have shape \(\)"):
        post_hoc_adjusted(np.float32(1.0), COUNTS)
    with pytest.raises(ValueError, match=r"largest_margin must lie in \[0, inf\); got -0.5"):
        ldam(Z, 0, COUNTS, largest_margin=-0.5)
    with pytest.raises(ValueError, match=r"scale must lie in \[0, inf\); got -1"):
        ldam(Z, 0, COUNTS, scale=-1)
    with pytest.raises(ValueError, match=r"gamma must lie in \[0, inf\); got -1"):
        softmax_focal(Z, 0, gamma=-1)
    with pytest.raises(ValueError, match=r"beta must lie in \[0, 1\]; got 1.5"):
        class_balanced_weights(COUNTS, beta=1.5)
    with pytest.raises(ValueError, match="counts must be positive"):
        class_balanced_weights([1, 0])
    with pytest.raises(ValueError, match=r"counts have shape \(1, 2\); expected \[K\]"):
        class_balanced_weights([[1, 2]])
