"""Label smearing: published values, the group of the rates, and what each correction guarantees.

Values printed with eight to ten digits were computed in float64 from the papers' formulas.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from regjax.losses.smoothing import (
    label_smearing,
    optimal_smoothing_rate,
    smearing_matrix,
    smearing_rate,
)

Z = np.array([2.0, 1.0, 0.1, -1.0], np.float32)
CROSS_ENTROPIES = np.array([0.4493130024, 1.4493130024, 2.3493130024, 3.4493130024])
KINDS = ("smoothing", "backward", "forward")
# Rows do not sum to one over columns, so that a transposed use shows.
NOISE = np.array([[0.7, 0.2, 0.1, 0], [0, 0.9, 0.1, 0], [0.3, 0.1, 0.5, 0.1], [0.2, 0, 0.2, 0.6]])

close = functools.partial(np.testing.assert_allclose, rtol=2e-6, atol=5e-7)


def value_and_gradient(rate, kind, label=0):
    loss = functools.partial(label_smearing, kind=kind)
    return jax.value_and_grad(loss)(jnp.asarray(Z), label, rate)


@pytest.mark.parametrize(
    ("kind", "at_tenth", "at_fifth"),
    [
        ("smoothing", 0.5968130024, 0.7443130024),
        ("backward", 0.2854241135, 0.0805630024),
        ("forward", 0.5120601921, 0.5790097493),
    ],
)
def test_published_losses(kind, at_tenth, at_fifth):
    close(label_smearing(Z, 0, 0.1, kind=kind), at_tenth)
    close(label_smearing(Z, 0, 0.2, kind=kind), at_fifth)
    close(label_smearing(Z, 0, smearing_matrix(0.2, 4), kind=kind), at_fifth)
    close(label_smearing(Z, 0, jnp.asarray(smearing_matrix(0.2, 4)), kind=kind), at_fifth)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("smoothing", [-0.28693365, 0.20973149, 0.07043470, 0.00676745]),
        ("backward", [-0.44526698, 0.26250927, 0.12321248, 0.05954523]),
        ("forward", [-0.34683445, 0.22493893, 0.09145334, 0.03044217]),
    ],
)
def test_published_gradients(kind, expected):
    close(value_and_gradient(0.1, kind)[1], expected, atol=1e-6)


def test_forward_gradient_is_that_of_cross_entropy_scaled_down():
    plain = value_and_gradient(0.0, "forward")[1]
    close(value_and_gradient(0.1, "forward")[1], 0.9582818612 * plain, atol=1e-6)


def test_inverse_matrix_of_a_rate():
    close(smearing_matrix(-0.1 / 0.9, 4)[0], [1.0833333] + 3 * [-0.0277778], atol=1e-7)
    close(smearing_matrix(-0.2 / 0.8, 4)[0], [1.1875] + 3 * [-0.0625])


@pytest.mark.parametrize("kind", KINDS)
def test_a_rate_of_zero_is_cross_entropy(kind):
    for label in range(4):
        close(label_smearing(Z, label, 0.0, kind=kind), CROSS_ENTROPIES[label])


def test_smoothing_is_cross_entropy_plus_a_multiple_of_the_sum_over_all_labels():
    total = 4 * label_smearing(Z, 0, 1.0)
    close(total, 7.6972520095)
    close(0.9 * (CROSS_ENTROPIES[0] + 0.0277777778 * total), 0.5968130024)
    close(label_smearing(Z, 0, 0.1), 0.5968130024)


@pytest.mark.parametrize(
    ("classes", "rate", "on", "off", "floor", "gap"),
    [
        (10, 0.1, 0.91, 0.01, 0.5002880351, 4.5108595065),
        (100, 0.1, 0.901, 0.001, 0.7777970419, 6.8035052576),
        (1000, 0.1, 0.9001, 0.0001, 1.0148479977, 9.1050909613),
        (10, 0.2, 0.82, 0.02, 0.8668939107, 3.7135720667),
        (100, 0.2, 0.802, 0.002, 1.4074510337, 5.9939614273),
        (32000, 0.1, 0.900003125, 3.125e-6, 1.3623896831, 12.5707192313),
    ],
)
def test_smoothing_has_its_floor_where_the_label_leads_by_the_published_gap(
    classes, rate, on, off, floor, gap
):
    logits = jnp.zeros(classes).at[1].set(gap)
    loss, gradient = jax.value_and_grad(label_smearing)(logits, 1, rate)
    close(loss, floor)
    close(gradient, np.zeros(classes), atol=1e-6)
    np.testing.assert_allclose(jax.nn.softmax(logits)[:2], [off, on], rtol=5e-6)


def test_smoothing_over_the_other_classes_only():
    rate = smearing_rate(0.1, 4)
    close(rate, 0.1333333333)
    others = np.where(np.arange(4) == 0, 0.9, 0.1 / 3)
    close(label_smearing(Z, 0, rate), 0.6459796690)
    close(others @ CROSS_ENTROPIES, 0.6459796690)
    # Flax's WMT example subtracts the entropy of the label.
    entropy = -np.sum(others * np.log(others))
    close(entropy, 0.4349442023)
    close(label_smearing(Z, 0, rate) - entropy, 0.2110354668)


def test_the_rate_of_label_flips():
    close(smearing_rate(0.2, 10), 0.2222222222)
    close(smearing_rate(0.2, 100), 0.2020202020)
    matrix = smearing_matrix(smearing_rate(0.2, 10), 10)
    close(np.diagonal(matrix), np.full(10, 0.8))
    close(matrix[0, 1:], np.full(9, 0.2 / 9))


@settings(deadline=None, max_examples=30)
@given(
    classes=st.integers(2, 30),
    first=st.floats(-3, 0.95),
    second=st.floats(-3, 0.95),
)
def test_rates_form_a_commutative_group(classes, first, second):
    product = smearing_matrix(first, classes) @ smearing_matrix(second, classes)
    both = first + second - first * second
    np.testing.assert_allclose(product, smearing_matrix(both, classes), atol=1e-13)
    inverse = smearing_matrix(-first / (1 - first), classes)
    np.testing.assert_allclose(
        smearing_matrix(first, classes) @ inverse, np.eye(classes), atol=1e-12
    )


@pytest.mark.parametrize("rate", [-2.0, -0.3, 0.1, 0.7, 1.0])
def test_smoothing_and_backward_are_optax_with_positive_and_negative_rates(rate):
    one_hot = jax.nn.one_hot(2, 4)
    smoothed = optax.losses.softmax_cross_entropy(Z, optax.smooth_labels(one_hot, rate))
    close(label_smearing(Z, 2, rate), smoothed)
    if rate < 1.0:
        negative = optax.smooth_labels(one_hot, -rate / (1 - rate))
        corrected = optax.losses.softmax_cross_entropy(Z, negative)
        close(label_smearing(Z, 2, rate, kind="backward"), corrected, rtol=5e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_matrix_is_read_by_rows_of_true_classes(kind):
    log_probs = np.log(np.exp(Z.astype(float)) / np.exp(Z.astype(float)).sum())
    expected = {
        "smoothing": -NOISE @ log_probs,
        "backward": -np.linalg.inv(NOISE) @ log_probs,
        "forward": -np.log(np.exp(log_probs) @ NOISE),
    }[kind]
    logits = np.tile(Z, (4, 1))
    close(label_smearing(logits, np.arange(4), NOISE, kind=kind), expected)
    traced = jax.jit(lambda matrix: label_smearing(logits, np.arange(4), matrix, kind=kind))
    close(traced(jnp.asarray(NOISE, jnp.float32)), expected, rtol=1e-5)


@pytest.mark.parametrize("noise", [0.3, NOISE], ids=["rate", "matrix"])
def test_the_backward_correction_is_unbiased(noise):
    matrix = smearing_matrix(noise, 4) if isinstance(noise, float) else noise
    logits = np.tile(Z, (4, 1))
    corrected = label_smearing(logits, np.arange(4), noise, kind="backward")
    close(matrix @ np.asarray(corrected, np.float64), CROSS_ENTROPIES, atol=3e-6)


def test_smoothing_noisy_labels_is_on_average_smoothing_by_the_composed_rate():
    noise, rate = 0.3, 0.2
    losses = label_smearing(np.tile(Z, (4, 1)), np.arange(4), rate)
    expected = label_smearing(np.tile(Z, (4, 1)), np.arange(4), noise + rate - noise * rate)
    close(smearing_matrix(noise, 4) @ np.asarray(losses, np.float64), expected)
    injected = smearing_matrix(0.2, 4) @ CROSS_ENTROPIES
    close(losses, injected)


@pytest.mark.parametrize("noise", [0.4, NOISE], ids=["rate", "matrix"])
def test_the_forward_correction_of_noisy_labels_has_the_clean_posterior_as_minimiser(noise):
    matrix = smearing_matrix(noise, 4) if isinstance(noise, float) else noise
    posterior = np.array([0.1, 0.2, 0.3, 0.4])
    noisy = posterior @ matrix

    @jax.jit
    def expected(z):
        losses = label_smearing(jnp.tile(z, (4, 1)), np.arange(4), noise, kind="forward")
        return losses @ noisy

    logits = jnp.log(posterior)
    close(jax.grad(expected)(logits), np.zeros(4), atol=5e-7)
    rng = np.random.default_rng(0)
    for _ in range(5):
        assert expected(logits + 0.3 * rng.normal(size=4)) > expected(logits)


def test_the_forward_loss_is_bounded():
    for classes, largest in ((10, 3.8066624898), (100, 6.2045577626)):
        rate = smearing_rate(0.2, classes)
        sure = 1e3 * np.eye(classes)[:2]
        right, wrong = label_smearing(sure, np.array([0, 0]), rate, kind="forward")
        close(right, 0.2231435513)
        close(wrong, largest)


def test_the_backward_loss_is_unbounded_below():
    sizes = np.array([1.0, 10.0, 100.0, 1000.0])
    losses = label_smearing(sizes[:, None] * np.eye(4)[0], np.zeros(4, int), 0.1, kind="backward")
    close(losses, [0.660335, -0.833197, -8.333333, -83.33333], atol=1e-6)
    # By a / (1 - a) (K - 1) / K for every unit of the logit.
    close((losses[3] - losses[2]) / 900.0, -0.0833333, atol=1e-6)


def test_labels_that_are_always_wrong():
    """The largest rate, K / (K - 1): the label is any class but the true one."""
    rate = smearing_rate(1.0, 4)
    logits = np.array([Z, [30.0, 0.0, 0.0, 0.0]], np.float32)
    losses = label_smearing(logits, np.array([0, 0]), rate, kind="forward")
    # 1 - p_y and 3 / e^30, which float32 does not hold as 1 - p_y.
    close(losses, [np.log(3) - np.log(0.3619336489), 30.0], atol=2e-6)


def test_generalised_smoothing_tends_to_the_difference_from_the_mean_label():
    for label in range(4):
        limit = CROSS_ENTROPIES[label] - CROSS_ENTROPIES.mean()
        close(label_smearing(Z, label, -1e5) / (1 + 1e5), limit, atol=5e-5)
        opposite = label_smearing(Z, label, 0.6)
        close(label_smearing(Z, label, -0.6), 2 * CROSS_ENTROPIES[label] - opposite)


def test_of_two_classes_the_limit_is_the_complementary_label_loss():
    logits = np.array([0.3, -0.8], np.float32)
    right, wrong = (label_smearing(logits, label, 0.0) for label in (1, 0))
    close(2 * label_smearing(logits, 1, -1e5) / (1 + 1e5), right - wrong, atol=2e-5)


@pytest.mark.parametrize("flip", [0.1, 0.3, 0.45])
def test_negative_smoothing_of_two_classes_is_the_backward_correction(flip):
    rate = 2 * flip / (2 * flip - 1)
    logits = np.array([0.3, -0.8], np.float32)
    noise = smearing_rate(flip, 2)
    close(noise, 2 * flip)
    corrected = label_smearing(logits, 1, noise, kind="backward")
    close(label_smearing(logits, 1, rate), corrected, rtol=1e-5)


def test_the_optimal_rate_for_noisy_labels():
    for best, flip in ((0.1, 0.02), (0.1, 0.05), (0.1, 0.3), (-1.0, 0.2)):
        noise = smearing_rate(flip, 2)
        rate = optimal_smoothing_rate(best, noise)
        close(rate, (best - 2 * flip) / (1 - 2 * flip), atol=1e-12)
        close(noise + rate - noise * rate, best)
    assert optimal_smoothing_rate(0.1, 0.0999) > 0.0 > optimal_smoothing_rate(0.1, 0.1001)
    product = smearing_matrix(0.4, 5) @ smearing_matrix(optimal_smoothing_rate(0.1, 0.4), 5)
    close(product, smearing_matrix(0.1, 5))


def test_impossible_classes_without_weight_do_not_count():
    logits = np.array([1.0, 0.0, -np.inf], np.float32)
    matrix = np.array([[0.5, 0.5, 0], [0.2, 0.8, 0], [0, 0, 1.0]])
    cross_entropies = np.log(1 + np.exp([-1.0, 1.0]))
    losses = label_smearing(logits, 0, matrix)
    close(losses, matrix[0, :2] @ cross_entropies)
    forward, gradient = jax.value_and_grad(lambda z: label_smearing(z, 0, matrix, kind="forward"))(
        logits
    )
    close(forward, -np.log(np.exp(-cross_entropies) @ matrix[:2, 0]))
    assert np.isfinite(gradient).all()


def test_a_rate_may_be_traced():
    traced = jax.jit(lambda rate, kind: label_smearing(Z, 0, rate, kind=kind), static_argnums=1)
    close(traced(0.1, "smoothing"), 0.5968130024)
    close(traced(0.1, "backward"), 0.2854241135)
    close(traced(0.1, "forward"), 0.5120601921)


@pytest.mark.parametrize(
    ("rate", "kind", "message"),
    [
        (1.4, "smoothing", r"rate must lie in \[-inf, 4/3\] for smoothing with 4 classes; got 1.4"),
        (1.0, "backward", r"and not be 1; got 1.0"),
        (-0.1, "forward", r"rate must lie in \[0, 4/3\] for forward"),
        (0.1, "sideways", "'smoothing', 'backward' or 'forward'; got 'sideways'"),
        (np.eye(4), "sideways", "'smoothing', 'backward' or 'forward'; got 'sideways'"),
        (np.eye(3), "forward", r"rate has shape \(3, 3\); expected \(\) or \(4, 4\)"),
        (np.full(4, 0.1), "forward", r"rate has shape \(4,\); expected \(\) or \[K, K\]"),
        (NOISE.T, "forward", r"rows, one per true class, sum to one; got rows that sum to \[1.2"),
        (np.eye(4) * 2 - 0.25, "smoothing", "rate must be a matrix of probabilities"),
        (np.full((4, 4), 0.25), "backward", "singular matrix"),
    ],
)
def test_rates_that_make_no_sense_raise(rate, kind, message):
    with pytest.raises(ValueError, match=message):
        label_smearing(Z, 0, rate, kind=kind)


def test_rates_out_of_range_raise():
    with pytest.raises(ValueError, match=r"rate_of_others must lie in \[0, 1\]; got 1.1"):
        smearing_rate(1.1, 3)
    with pytest.raises(ValueError, match=r"num_classes must lie in \[2, inf\); got 1"):
        smearing_rate(0.1, 1)
    with pytest.raises(ValueError, match=r"noise_rate must lie in \[0, 1\); got 1.0"):
        optimal_smoothing_rate(0.1, 1.0)
    with pytest.raises(ValueError, match=r"clean_rate must lie in .*; got 1.5"):
        optimal_smoothing_rate(1.5, 0.1)
