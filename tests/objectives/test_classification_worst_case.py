"""The multipliers of the robust objective: their steps, and a saddle point in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from regjax.objectives.classification import Facts, Robust
from tests.objectives.classification_cases import (
    BATCH,
    CLASSES,
    FACTS,
    LABELS,
    LOGITS,
    OUTPUTS,
    given_of,
    log_softmax,
    loss_of,
    outputs,
    softmax,
)

# Three inputs, each as probable, of which the teacher's rows are all that is known.
ROWS = np.array([[0.8, 0.15, 0.05], [0.5, 0.4, 0.1], [0.4, 0.3, 0.3]])
TOY = Facts(
    num_classes=3,
    counts=np.ones(3),
    noise_matrix=np.eye(3),
    labels=np.arange(3),
    held_out_labels=np.arange(3),
    teacher_logits=np.log(ROWS)[None],
    held_out_teacher_logits=np.log(ROWS)[None],
)
TOY_BATCH = {"labels": jnp.arange(3), "teacher_logits": jnp.log(jnp.asarray(ROWS))[None]}


def toy_risks(logits):
    return np.sum(ROWS * -log_softmax(logits), axis=0) / ROWS.sum(axis=0)


def best_scores(objective, given, extras):
    """The minimiser of the objective: q c, normalised."""
    return jnp.log(jnp.asarray(ROWS)) + jnp.log(objective.costs(given, extras))


@pytest.mark.parametrize(
    ("objective", "risks"),
    [
        (Robust(objective="standard"), [0.524473, 1.190913, 1.647193]),
        (Robust(objective="balanced"), [0.974376, 1.053485, 0.966372]),
        (Robust(tradeoff=0.0), [0.974376, 1.053485, 0.966372]),
    ],
    ids=["standard", "balanced", "tradeoff 0"],
)
def test_the_minimiser_of_standard_and_balanced(objective, risks):
    given = given_of(objective, TOY)
    extras = objective.initial(given)
    scores = best_scores(objective, given, extras)
    slope = jax.grad(
        lambda z: objective(outputs(ROWS)._replace(logits=z), TOY_BATCH, given, extras)["loss"][0]
    )(scores)
    np.testing.assert_allclose(slope, 0.0, atol=1e-6)
    np.testing.assert_allclose(toy_risks(scores), risks, atol=2e-6)


@pytest.mark.parametrize("iterate", ["last", "average"])
def test_the_saddle_point_of_the_toy(iterate):
    objective = Robust(held_out_labels="teacher", step_size=0.05, iterate=iterate)
    given = given_of(objective, TOY)

    def step(extras, _):
        # The average is of the multipliers that the last iterate leads to.
        scores = best_scores(LAST, given, extras)
        return objective.adjust(
            extras, outputs(ROWS)._replace(logits=scores), TOY_BATCH, given
        ), None

    LAST = Robust(held_out_labels="teacher", step_size=0.05)
    extras, _ = jax.lax.scan(step, objective.initial(given), length=2000)
    assert extras["adjustments"] == 2000
    if iterate == "last":
        np.testing.assert_allclose(extras["multipliers"], [0.32498, 0.35299, 0.32203], atol=2e-5)
        risks = toy_risks(best_scores(objective, given, extras))
        np.testing.assert_allclose(risks, 0.998897, atol=1e-5)
    else:
        # It remembers the way there, and so is near, 1 / 2000 per step.
        np.testing.assert_allclose(extras["average"], [0.32498, 0.35299, 0.32203], atol=2e-3)
        risks = toy_risks(best_scores(objective, given, extras))
        assert risks.max() < 1.001


def test_the_trade_off_lies_between():
    """The more it is of the worst class, the better that and the worse the balanced risk."""
    found = []
    for tradeoff in (0.0, 0.3, 0.7, 1.0):
        objective = Robust(held_out_labels="teacher", step_size=0.2, tradeoff=tradeoff)
        given = given_of(objective, TOY)

        def step(extras, _, objective=objective, given=given):
            of = outputs(ROWS)._replace(logits=best_scores(objective, given, extras))
            return objective.adjust(extras, of, TOY_BATCH, given), None

        extras, _ = jax.lax.scan(step, objective.initial(given), length=400)
        risks = toy_risks(best_scores(objective, given, extras))
        found.append((risks.max(), risks.mean()))
    worst, balanced = np.transpose(found)
    assert np.all(np.diff(worst) < 0.0)
    assert np.all(np.diff(balanced) > 0.0)


def risks_of(targets):
    return np.sum(targets * -log_softmax(LOGITS), axis=0) / targets.sum(axis=0)


@pytest.mark.parametrize("held_out_labels", ["true", "teacher"])
def test_a_step_of_the_multipliers(held_out_labels):
    objective = Robust(
        held_out_labels=held_out_labels, step_size=0.7, floor=0.01, temperature=2.0, tradeoff=0.6
    )
    given = given_of(objective)
    teacher = softmax(np.asarray(BATCH["teacher_logits"]) / 2).mean(axis=0)
    targets = np.eye(CLASSES)[LABELS] if held_out_labels == "true" else teacher
    expected = [np.full(CLASSES, 1 / CLASSES)]
    extras = objective.initial(given)
    for _ in range(3):
        extras = objective.adjust(extras, OUTPUTS, BATCH, given)
        new = expected[-1] * np.exp(0.7 * risks_of(targets))
        expected.append((1 - CLASSES * 0.01) * new / new.sum() + 0.01)
    np.testing.assert_allclose(extras["multipliers"], expected[-1], rtol=1e-5)
    np.testing.assert_allclose(extras["average"], np.mean(expected, axis=0), rtol=1e-5)
    prior = softmax(FACTS.teacher_logits / 2).mean(axis=(0, 1))
    costs = (0.4 / CLASSES + 0.6 * expected[-1]) / prior
    np.testing.assert_allclose(objective.costs(given, extras), costs, rtol=1e-5)
    loss = -np.mean(np.sum(teacher * log_softmax(LOGITS - np.log(costs)), axis=1))
    np.testing.assert_allclose(loss_of(objective, extras=extras), loss, rtol=3e-6)


def test_errors_as_risks():
    objective = Robust("labels", risk="zero_one", step_size=1.0, floor=0.0)
    given = given_of(objective)
    extras = objective.adjust(objective.initial(given), OUTPUTS, BATCH, given)
    wrong = LOGITS.argmax(axis=1) != LABELS
    expected = np.exp([wrong[k == LABELS].mean() for k in range(CLASSES)])
    np.testing.assert_allclose(extras["multipliers"], expected / expected.sum(), rtol=1e-5)


def test_a_class_that_is_not_held_out_in_this_batch_keeps_its_place():
    objective = Robust("labels", step_size=1.0, floor=0.0)
    given = given_of(objective)
    some = {"labels": jnp.where(BATCH["labels"] == 3, 0, BATCH["labels"])}
    extras = objective.adjust(objective.initial(given), OUTPUTS, some, given)
    labels = np.asarray(some["labels"])
    risks = [-log_softmax(LOGITS)[labels == k, k].mean() for k in range(3)] + [0.0]
    np.testing.assert_allclose(
        extras["multipliers"], np.exp(risks) / np.exp(risks).sum(), rtol=1e-5
    )


def test_no_step_size_is_the_balanced_objective():
    still = Robust(step_size=0.0)
    given = given_of(still)
    extras = still.adjust(still.initial(given), OUTPUTS, BATCH, given)
    np.testing.assert_allclose(
        loss_of(still, extras=extras), loss_of(Robust(objective="balanced")), rtol=1e-6
    )


def test_a_certain_teacher_is_class_dro_on_its_labels():
    """A one-hot teacher: the objective on labels, its prior and its steps too."""
    every = np.concatenate([LABELS, [0, 0, 1]])
    certain = 200 * np.eye(CLASSES)
    facts = FACTS._replace(
        counts=np.bincount(every), teacher_logits=certain[every][None],
        held_out_teacher_logits=certain[LABELS][None], held_out_labels=LABELS,
    )  # fmt: skip
    batch = {**BATCH, "teacher_logits": jnp.asarray(certain[LABELS], jnp.float32)[None]}
    found = []
    for objective in (Robust(held_out_labels="teacher"), Robust("labels")):
        given = given_of(objective, facts)
        extras = objective.initial(given)
        for _ in range(3):
            extras = objective.adjust(extras, OUTPUTS, batch, given)
        loss = loss_of(objective, batch=batch, given=given, extras=extras)
        found.append((given["prior"], extras["multipliers"], loss))
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)


def test_standard_and_balanced_are_never_adjusted():
    for objective in ("standard", "balanced"):
        fixed = Robust(objective=objective, adjust_every=7)
        assert fixed.adjust_every == 0
        given = given_of(fixed)
        extras = fixed.initial(given)
        assert fixed.adjust(extras, OUTPUTS, BATCH, given) == extras
    assert Robust(adjust_every=7).adjust_every == 7
