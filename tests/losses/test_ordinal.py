"""Ordinal losses: the documented examples of coral-pytorch, computed numbers, identities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from regjax.losses import number_token
from regjax.losses.ordinal import coral, corn, earth_mover, exceedance, fidelity, thurstone
from regjax.losses.soft_labels import two_hot

LOGITS = np.array([[2.1, 1.8, -2.1, -1.8], [1.9, -1.0, -1.5, -1.3], [1.9, 1.8, 1.7, 1.6]])
LABELS = np.array([2, 1, 4])
FIVE = np.arange(1.0, 6.0)
SPREAD = np.array([0.35, 0.05, 0.05, 0.25, 0.30])


def close(found, expected, atol=1e-6):
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=atol)


def test_coral_is_that_of_the_documented_example():
    losses = coral(LOGITS, LABELS)
    close(losses, [0.53699427, 0.89507018, 0.64405114])
    close(losses.mean(), 0.6920385280)


def test_corn_over_its_pairs_is_the_computed_number():
    pairs = np.minimum(LABELS + 1, 4)
    assert pairs.sum() == 9
    close(corn(LOGITS, LABELS).sum() / pairs.sum(), 0.1645240269)


def test_corn_is_that_of_the_documented_network():
    torch = pytest.importorskip("torch")
    torch.manual_seed(123)
    features = torch.rand(8, 99)
    logits = torch.nn.Linear(99, 4)(features).detach().numpy()
    labels = np.array([0, 1, 2, 2, 2, 3, 4, 4])
    total = corn(logits, labels).sum()
    # Printed to four digits; by the classes in the older releases, by the pairs since.
    np.testing.assert_allclose(total / np.minimum(labels + 1, 4).sum(), 0.7127, atol=5e-5)
    np.testing.assert_allclose(total / 5, 3.4210, atol=5e-5)


def test_corn_learns_a_threshold_only_from_the_examples_that_pass_the_one_before():
    gradients = jax.grad(lambda z: corn(z, LABELS).sum())(LOGITS)
    used = np.asarray(gradients) != 0.0
    np.testing.assert_array_equal(used, np.arange(4) <= LABELS[:, None])


def test_corn_predicts_the_documented_labels_and_expected_ranks():
    probabilities = exceedance(LOGITS, kind="corn")
    np.testing.assert_array_equal((probabilities > 0.5).sum(-1), [2, 1, 4])
    close(probabilities.sum(-1), [1.75066977, 1.15566004, 2.77273733])


@pytest.mark.parametrize("kind", ["coral", "corn"])
def test_the_expected_class_is_that_of_the_implied_distribution(kind):
    logits = np.sort(LOGITS)[:, ::-1]
    above = np.asarray(exceedance(logits, kind=kind))
    bounded = np.concatenate([np.ones((3, 1)), above, np.zeros((3, 1))], axis=-1)
    probabilities = -np.diff(bounded)
    assert (probabilities >= 0).all()
    close(probabilities.sum(-1), 1.0)
    close(probabilities @ FIVE, 1 + above.sum(-1))
    close(exceedance(LOGITS, kind="coral"), 1 / (1 + np.exp(-LOGITS)))


@pytest.mark.parametrize("loss", [coral, corn])
def test_labels_out_of_range_give_nan_and_only_there(loss):
    labels = np.array([-1, 0, 4, 5, -100])
    losses = loss(np.zeros((5, 4)), labels)
    np.testing.assert_array_equal(np.isnan(losses), [True, False, False, True, True])


@pytest.mark.parametrize("loss", [coral, corn])
def test_the_minimiser_of_noisy_labels_gives_their_distribution(loss):
    labels = np.repeat(np.arange(4), [5, 3, 8, 4])
    share = np.array([15 / 20, 12 / 20, 4 / 20])
    if loss is corn:
        share = np.array([15 / 20, 12 / 15, 4 / 12])
    logits = np.log(share / (1 - share))
    slope = jax.grad(lambda z: loss(jnp.broadcast_to(z, (20, 3)), labels).sum())(logits)
    close(slope, 0.0, atol=5e-6)
    close(exceedance(logits, kind=loss.__name__), [15 / 20, 12 / 20, 4 / 20])


def test_earth_mover_is_the_computed_numbers():
    for kind, expected in [("plain", 1.5), ("squared", 0.575), ("root_mean_squared", 0.3391164992)]:
        close(earth_mover(np.log(SPREAD), np.eye(5)[3], FIVE, kind=kind), expected)


def test_earth_mover_of_a_point_is_the_number_token_loss_and_of_any_labels_scipys_distance():
    values = np.array([0.0, 1.0, 1.5, 4.0, 9.0])
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(4, 5)), rng.dirichlet(np.ones(5), 4)
    targets = values[[0, 2, 3, 4]]
    close(
        earth_mover(logits, two_hot(targets, values), values), number_token(logits, targets, values)
    )
    for row, label in zip(logits, labels, strict=True):
        p = np.exp(row) / np.exp(row).sum()
        close(earth_mover(row, label, values), stats.wasserstein_distance(values, values, p, label))
        expected = stats.energy_distance(values, values, p, label) ** 2 / 2
        close(earth_mover(row, label, values, kind="squared"), expected)


@pytest.mark.parametrize("kind", ["plain", "squared", "root_mean_squared"])
def test_an_exact_prediction_is_free_and_stationary(kind):
    labels = np.full(4, 0.25)
    loss, slope = jax.value_and_grad(
        lambda z: earth_mover(z, labels, [1.0, 2.0, 3.0, 4.0], kind=kind)
    )(np.zeros(4))
    assert loss == 0.0
    np.testing.assert_array_equal(slope, np.zeros(4))


def test_fidelity_is_the_computed_number():
    close(thurstone(3.5, 3.0), 0.6381631951)
    preference = thurstone(4.0, 2.5, variance=2 * 0.6**2 + 1e-8)
    close(preference, 0.9614500631)
    close(fidelity(3.5, 3.0, preference), 0.0985929592)


def test_fidelity_does_not_depend_on_the_order_and_lies_between_its_bounds():
    rng = np.random.default_rng(1)
    first, second = rng.normal(size=(2, 50), scale=5.0).astype(np.float32)
    preferences = rng.random(50).astype(np.float32)
    losses = fidelity(first, second, preferences)
    close(losses, fidelity(second, first, 1 - preferences), atol=2e-5)
    assert (losses >= -1.01e-4).all() and (losses <= 1).all()
    agreeing = fidelity(first, second, thurstone(first, second))
    np.testing.assert_allclose(agreeing, 0.0, atol=1.01e-4)
    scaled = fidelity(3 * first, 3 * second, preferences, variance=np.full(50, 18.0))
    close(scaled, losses, atol=1e-5)


def test_what_does_not_fit_raises_by_name():
    with pytest.raises(TypeError, match="labels must be integers"):
        coral(LOGITS, LABELS.astype(float))
    with pytest.raises(ValueError, match=r"labels have shape \(2,\); expected \(3,\)"):
        corn(LOGITS, LABELS[:2])
    with pytest.raises(ValueError, match=r"logits have shape \(3, 0\)"):
        corn(LOGITS[:, :0], LABELS)
    with pytest.raises(ValueError, match="'coral' or 'corn'; got 'rank'"):
        exceedance(LOGITS, kind="rank")
    with pytest.raises(ValueError, match=r"soft_labels have shape \(4,\); expected \[..., 5\]"):
        earth_mover(np.zeros(5), np.ones(4), FIVE)
    with pytest.raises(ValueError, match=r"kind must be 'plain'.*; got 'cubed'"):
        earth_mover(np.zeros(5), np.ones(5), FIVE, kind="cubed")
    with pytest.raises(ValueError, match="epsilon must be positive; got 0"):
        fidelity(1.0, 2.0, 0.5, epsilon=0.0)
    with pytest.raises(ValueError, match=r"first has shape \(2,\), but second \(3,\)"):
        thurstone(np.ones(2), np.ones(3))
    with pytest.raises(ValueError, match=r"preferences have shape \(3,\); expected \(2,\)"):
        fidelity(np.ones(2), np.ones(2), np.ones(3))
