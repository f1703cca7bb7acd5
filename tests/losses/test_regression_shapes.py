"""Losses on a score grid: shapes, types, transformations, extreme and malformed input."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from regjax.losses import expected_risk, number_token, raft
from regjax.scores import ScoreGrid, TokenGrid

VALUES = np.array([1.0, 2.0, 3.0, 4.0, 5.0], np.float32)
FIRST_FIVE = TokenGrid(np.arange(5, dtype=np.int32)[:, None], np.ones((5, 1), bool), VALUES)
MULTI = TokenGrid(
    tokens=np.array([[1, 5, 0], [2, 0, 0], [1, 0, 4]], np.int32),
    mask=np.array([[1, 1, 0], [1, 0, 0], [1, 1, 1]], bool),
    values=np.array([1.5, 2.0, 10.0], np.float32),
)

close = functools.partial(np.testing.assert_allclose, rtol=5e-6, atol=5e-6)

ALL = {
    "raft": raft,
    "raft_normalized_huber": functools.partial(raft, normalize=True, loss="huber"),
    "expected_risk": expected_risk,
    "number_token": number_token,
    "number_token_mse_reweighed": functools.partial(number_token, kind="mse", reweigh=True),
}
FORMS = {
    "single": (FIRST_FIVE, (3, 2, 8)),
    "multi": (MULTI, (3, 2, 3, 3, 6)),
    "values": (VALUES, (3, 2, 5)),
    "score_grid": (ScoreGrid.integers(1, 5), (3, 2, 5)),
}


def case(form):
    codec, shape = FORMS[form]
    logits = np.random.default_rng(7).normal(size=shape).astype(np.float32)
    if form in ("values", "score_grid"):
        logits = np.asarray(jax.nn.log_softmax(logits))
    return logits, np.array([[0.5, 3], [4, 2], [5, 1]], np.float32), codec


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("loss", ALL.values(), ids=ALL)
def test_one_float32_loss_per_example_whatever_the_transformation(loss, form):
    logits, targets, codec = case(form)
    losses = loss(logits, targets, codec)
    chex.assert_shape(losses, targets.shape)
    chex.assert_type(losses, jnp.float32)
    close(jax.jit(lambda z, y: loss(z, y, codec))(logits, targets), losses)
    mapped = jax.jit(jax.vmap(jax.vmap(lambda z, y: loss(z, y, codec))))(logits, targets)
    close(mapped, losses)


@pytest.mark.parametrize("form", ["single", "multi"])
@pytest.mark.parametrize("loss", ALL.values(), ids=ALL)
def test_bfloat16_logits_give_the_loss_of_the_same_numbers_in_float32(loss, form):
    logits, targets, codec = case(form)
    half = jnp.asarray(logits, jnp.bfloat16)
    total = jax.jit(jax.value_and_grad(lambda z: loss(z, targets, codec).sum()))
    value, gradient = total(half)
    chex.assert_type([value, gradient], [jnp.float32, jnp.bfloat16])
    expected, exact = total(half.astype(jnp.float32))
    close(value, expected)
    np.testing.assert_allclose(gradient.astype(jnp.float32), exact, rtol=2**-8, atol=1e-7)


@pytest.mark.parametrize("loss", ALL.values(), ids=ALL)
def test_extreme_and_impossible_logits_have_finite_losses_and_gradients(loss):
    logits = np.concatenate(
        [1e4 * np.eye(8), -1e4 * np.eye(8), np.where(np.eye(8), -np.inf, 0.0)]
    ).astype(np.float32)
    targets = np.linspace(0, 6, 24).astype(np.float32)
    each = jax.jit(jax.vmap(jax.value_and_grad(lambda z, y: loss(z, y, FIRST_FIVE))))
    values, gradients = each(logits, targets)
    assert np.isfinite(values).all()
    assert np.isfinite(gradients).all()


@pytest.mark.parametrize("loss", ALL.values(), ids=ALL)
def test_integer_targets_are_their_numbers(loss):
    logits = np.random.default_rng(8).normal(size=(3, 8))
    np.testing.assert_array_equal(
        loss(logits, np.array([1, 4, 5]), FIRST_FIVE),
        loss(logits, np.array([1.0, 4.0, 5.0]), FIRST_FIVE),
    )


@pytest.mark.parametrize("loss", ALL.values(), ids=ALL)
def test_targets_of_another_shape_raise_instead_of_broadcasting(loss):
    for shape in ((), (1,), (3, 1), (1, 3), (2,)):
        with pytest.raises(ValueError, match=r"targets have shape .* expected \(3,\)"):
            loss(np.zeros((3, 8)), np.ones(shape), FIRST_FIVE)
    with pytest.raises(ValueError, match=r"targets have shape \(2,\)"):
        loss(np.zeros((2, 3, 3, 6)), np.ones((2,)), FIRST_FIVE)
    with pytest.raises(TypeError, match="logits must be floating"):
        loss(np.zeros((3, 8), np.int32), np.ones(3), FIRST_FIVE)


def test_unknown_choices_raise():
    for function in (raft, expected_risk):
        with pytest.raises(ValueError, match="'squared', 'absolute' or 'huber'; got 'mse'"):
            function(np.zeros(8), 1.0, FIRST_FIVE, loss="mse")
    with pytest.raises(ValueError, match="'wasserstein' or 'mse'; got 'was'"):
        number_token(np.zeros(8), 1.0, FIRST_FIVE, kind="was")
    for options in ({"squash": 1.0}, {"squash": 2.0, "kind": "mse"}):
        with pytest.raises(ValueError, match=r"squash must be above 1, .*; got \d.0 and '"):
            number_token(np.zeros(8), 1.0, FIRST_FIVE, **options)
