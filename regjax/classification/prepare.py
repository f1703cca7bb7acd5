"""All that runs of image experiments need, read and checked before any of them is trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from regjax import sharding
from regjax.classification.experiment import (
    NEW,
    ImageExperiment,
    ImageStage,
    check_attributes,
)
from regjax.classification.program import are_dealt_out
from regjax.data.images import ImageSplits, channel_statistics, noisy_labels, prepare_images
from regjax.errors import InputError
from regjax.models import vision
from regjax.objectives.classification import Facts


class Prepared(NamedTuple):
    """What all stages of the runs use."""

    experiments: Sequence[ImageExperiment]
    splits: ImageSplits
    labels: np.ndarray
    """`[R, N]`: the labels of each run."""
    noise_matrices: np.ndarray
    """`[R, C, C]`."""
    mean: np.ndarray
    std: np.ndarray
    mesh: Mesh

    @property
    def experiment(self) -> ImageExperiment:
        """The first; what the runs share is read from it."""
        return self.experiments[0]

    @property
    def num_classes(self) -> int:
        return len(self.splits.class_names)

    def labels_of(self, stage: ImageStage) -> np.ndarray:
        """`[R, N]`, the labels that a stage is trained on."""
        true = np.broadcast_to(self.splits.train.true_labels, self.labels.shape)
        return true if stage.clean_labels else self.labels

    def attributes_of(self, stage: ImageStage) -> np.ndarray | None:
        """`[C, K]`, the binary labels of a stage that ranks; None for one that classifies."""
        if not hasattr(stage.objective, "outputs"):
            return None
        return np.array(self.experiment.attributes, np.int32)


def prepare_runs(experiments: Sequence[ImageExperiment], mesh: Mesh | None) -> Prepared:
    """Reads the data of runs that are trained side by side, and gives each its labels."""
    experiment = experiments[0]
    mesh = sharding.make_mesh(experiment.mesh) if mesh is None else mesh
    parts = sharding.row_parts(mesh)
    if experiment.batch_size % parts and not are_dealt_out(len(experiments), mesh):
        raise InputError(
            f"batch_size {experiment.batch_size} does not divide among {parts} devices"
        )
    splits = prepare_images(experiment.data)
    train, classes = splits.train, len(splits.class_names)
    check_attributes(experiment, classes)
    if len(train.images) < experiment.batch_size:
        raise InputError(
            f"there are {len(train.images)} training images, fewer than batch_size "
            f"{experiment.batch_size}"
        )
    labels, matrices = [], []
    for each in experiments:
        noise = each.data.noise
        noisy, matrix = (
            (train.labels, np.eye(classes))
            if noise is None
            else noisy_labels(train, noise, classes, each.seed)
        )
        labels.append(noisy)
        matrices.append(matrix)
    mean, std = channel_statistics(train.images)
    return Prepared(
        experiments, splits, np.stack(labels), np.stack(matrices),
        mean.astype(np.float32), std.astype(np.float32), mesh,
    )  # fmt: skip


def check_stage(run: Prepared, stage: ImageStage) -> None:
    """What would otherwise fail after earlier stages were trained."""
    experiment, place = run.experiment, f"stage {stage.name!r}"
    try:
        outputs = experiment.outputs_of(stage, run.num_classes)
        vision.build(experiment.model_of(stage), run.splits.train.images.shape[1:], outputs)
    except InputError as error:
        raise InputError(f"{place}: {error}") from error
    if experiment.data.augmentation.mixup and stage.teachers and stage.teacher == "cached":
        raise InputError(
            f"{place}: cached teachers have not seen the images that mixup makes; set "
            'teacher="on_the_fly"'
        )
    if stage.start != NEW:
        earlier = next(each for each in experiment.stages if each.name == stage.start)
        if experiment.model_of(earlier) != experiment.model_of(stage):
            raise InputError(
                f"{place} goes on from {stage.start!r}, which is of another architecture"
            )
    teachers, held_out = len(stage.teachers), run.splits.held_out
    stand_in = _stand_in(run.labels[0], run.num_classes, teachers)
    held_out_stand_in = (
        None if held_out is None else _stand_in(held_out.labels, run.num_classes, teachers)
    )
    for number in range(len(run.experiments)):
        objective = run.experiments[number].stages[experiment.stages.index(stage)].objective
        facts = facts_of(run, stage, number, stand_in, held_out_stand_in)
        _check_objective(run, stage, objective, given_of(stage, objective, facts))
        if held_out is None and getattr(objective, "adjust_every", None):
            raise InputError(
                f"{place}: {type(objective).__name__} measures on held-out images; set data.held_out, "
                "such as 0.1"
            )


def _check_objective(run: Prepared, stage: ImageStage, objective: Any, given: Any) -> None:
    """Traces the objective, which computes nothing but shapes."""
    rows, classes = run.experiment.batch_size, run.num_classes
    labels = jax.ShapeDtypeStruct((rows,), np.int32)
    batch = {"labels": labels, "index": labels}
    outputs = run.experiment.outputs_of(stage, classes)
    logits = jax.ShapeDtypeStruct((rows, outputs), np.float32)
    if run.attributes_of(stage) is None:
        batch["targets"] = logits
    else:
        width = len(run.experiment.attributes[0])
        batch["labels"] = jax.ShapeDtypeStruct((rows, width), np.int32)
    if stage.teachers:
        shape = (len(stage.teachers), rows, classes)
        batch["teacher_logits"] = jax.ShapeDtypeStruct(shape, np.float32)

    def call(logits, batch, given):
        extras = (objective.initial(given),) if hasattr(objective, "initial") else ()
        return objective(vision.Outputs(logits, logits), batch, given, *extras)

    try:
        sums = jax.eval_shape(call, logits, batch, given)
    except (InputError, ValueError) as error:
        raise InputError(f"stage {stage.name!r}: {error}") from error
    if not isinstance(sums, dict) or "loss" not in sums:
        raise InputError(
            f"stage {stage.name!r}: the objective returns {type(sums).__name__}; expected a dict of "
            "(sum, weight) with an entry 'loss'"
        )


def _stand_in(labels: np.ndarray, num_classes: int, teachers: int) -> np.ndarray | None:
    """Logits `[R, T, N, C]` of teachers that are yet to be trained, to check objectives with."""
    if not teachers:
        return None
    right = 3 * np.eye(num_classes, dtype=np.float32)[labels]
    return np.broadcast_to(right, (1, teachers, *right.shape))


def given_of(stage: ImageStage, objective: Any, facts: Facts) -> Any:
    if not hasattr(objective, "given"):
        return {}
    try:
        return objective.given(facts)
    except InputError as error:
        raise InputError(f"stage {stage.name!r}: {error}") from error


def facts_of(
    run: Prepared,
    stage: ImageStage,
    number: int,
    teacher_logits: np.ndarray | None,
    held_out_teacher: np.ndarray | None,
) -> Facts:
    held_out, labels = run.splits.held_out, run.labels_of(stage)[number]
    made = run.noise_matrices[number]
    return Facts(
        num_classes=run.num_classes,
        counts=np.bincount(labels, minlength=run.num_classes),
        noise_matrix=np.eye(run.num_classes) if stage.clean_labels else made,
        labels=labels,
        held_out_labels=None if held_out is None else held_out.labels,
        teacher_logits=_of_run(teacher_logits, number),
        held_out_teacher_logits=_of_run(held_out_teacher, number),
        seed=run.experiments[number].seed,
    )


def _of_run(logits: np.ndarray | None, number: int) -> np.ndarray | None:
    return None if logits is None else logits[number % len(logits)]
