"""Robust distillation where the answer is known: the closed-form toy of three inputs and classes.

Three inputs, equally frequent, whose labels have the teacher's probabilities: a model with a logit for every
input and class can fit them exactly. The saddle point over class multipliers then equalises the three
class risks; it is found here in NumPy by the inner problem's exact solution, softmax(f) ~ c p.
"""

import numpy as np
import pytest
from scipy.special import log_softmax

import regjax
from regjax.classification import ImageExperiment, ImageStage, load_classifier
from regjax.classification import prepare as training
from regjax.data.images import ImageData, ImageSet, ImageSplits, Split
from regjax.models import vision
from regjax.objectives.classification import CrossEntropy, Robust
from regjax.optim import Optimizer

TEACHER = np.array([[0.8, 0.15, 0.05], [0.5, 0.4, 0.1], [0.4, 0.3, 0.3]])
COPIES = 20
PRIOR = TEACHER.mean(0)


def saddle(steps=4000, rate=0.05):
    """`(multipliers, risks)` by exponentiated gradient with the exact inner solution."""
    multipliers = np.full(3, 1 / 3)
    for _ in range(steps):
        losses = -log_softmax(np.log(TEACHER * multipliers / PRIOR), axis=1)
        risks = (TEACHER * losses).sum(0) / TEACHER.sum(0)
        multipliers = multipliers * np.exp(rate * risks)
        multipliers /= multipliers.sum()
    return multipliers, risks


def toy(copies):
    """Every input so often, with labels in the teacher's proportions, as an image of three pixels."""
    counts = np.round(TEACHER * copies).astype(int)
    inputs = np.repeat(np.arange(3), counts.sum(1))
    labels = np.concatenate([np.repeat(np.arange(3), row) for row in counts]).astype(np.int32)
    pixels = (255 * np.eye(3, dtype=np.uint8))[inputs].reshape(-1, 1, 3, 1)
    return ImageSet(pixels, labels, ("a", "b", "c"), [str(n) for n in range(len(labels))])


def split(data):
    return Split(data.images, data.labels, data.labels, np.arange(len(data.labels), dtype=np.int32))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    data = toy(COPIES)
    splits = ImageSplits(split(data), split(data), split(data), data.class_names, np.eye(3))
    plain = Optimizer(
        name="sgd", learning_rate=1.0, b1=0.9, schedule="constant", warmup=0.0, clip_norm=0.0
    )
    robust = Robust(step_size=0.05, adjust_every=8, held_out_labels="teacher")
    standard = Robust(objective="standard")
    balanced = Robust(objective="balanced")
    students = {"standard": standard, "balanced": balanced, "robust": robust}
    stages = (
        ImageStage("teacher", CrossEntropy(), epochs=2000),
        *(
            ImageStage(name, objective, teachers=("teacher",), epochs=16_000 if name == "robust" else 2000)
            for name, objective in students.items()
        ),
    )  # fmt: skip
    experiment = ImageExperiment(
        stages, ImageData(data, data), vision.Mlp(()), batch_size=len(data.labels), optimizer=plain,
        log_every=1000, checkpoint_every=8000,
    )  # fmt: skip
    workdir = tmp_path_factory.mktemp("toy")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "prepare_images", lambda data: splits)
        regjax.train(experiment, workdir, quiet=True)
    return workdir


def risks_of(workdir, stage):
    """Risk of every class under the teacher's probabilities, of the trained model."""
    params, _, about = load_classifier(workdir, stage)
    inputs = (np.eye(3) - about["mean"][0]) / about["std"][0]
    logits = inputs @ params["head/kernel"].astype(np.float64) + params["head/bias"]
    return (TEACHER * -log_softmax(logits, axis=1)).sum(0) / TEACHER.sum(0), logits


def test_the_teacher_is_the_table(run):
    _, logits = risks_of(run, "teacher")
    np.testing.assert_allclose(np.exp(log_softmax(logits, axis=1)), TEACHER, atol=1e-4)


def test_standard_and_balanced_distillation_have_their_closed_forms(run):
    for stage, costs in [("standard", np.ones(3)), ("balanced", 1 / (3 * PRIOR))]:
        risks, logits = risks_of(run, stage)
        expected = log_softmax(np.log(TEACHER * costs), axis=1)
        np.testing.assert_allclose(log_softmax(logits, axis=1), expected, atol=1e-3)
        closed = (TEACHER * -expected).sum(0) / TEACHER.sum(0)
        np.testing.assert_allclose(risks, closed, atol=1e-4)


def test_the_multipliers_and_risks_are_those_of_the_saddle_point(run):
    multipliers, expected = saddle()
    np.testing.assert_allclose(multipliers, [0.32498, 0.35299, 0.32203], atol=1e-5)
    risks, logits = risks_of(run, "robust")
    np.testing.assert_allclose(risks, expected, atol=1e-4)
    np.testing.assert_allclose(risks, 0.998897, atol=1e-4)
    # The shifts of the logits from the teacher's are log c, c = multipliers / prior.
    shifts = (log_softmax(logits, axis=1) - np.log(TEACHER)).mean(0)
    costs = np.exp(shifts - shifts.mean()) * PRIOR
    np.testing.assert_allclose(costs / costs.sum(), multipliers, atol=1e-4)
    assert max(risks) < max(risks_of(run, "balanced")[0]) < max(risks_of(run, "standard")[0])
