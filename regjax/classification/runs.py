"""Which experiments can be trained side by side, and what they differ in."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence
from typing import Any

import jax
import numpy as np

from regjax.classification.experiment import ImageExperiment
from regjax.errors import InputError


def shape_of(experiment: ImageExperiment) -> Hashable:
    """What has to be equal in runs side by side: all but the seed, the noise of the labels, and the
    numbers of the objectives.

    >>> import dataclasses
    >>> from regjax.classification import ImageStage
    >>> from regjax.data.images import ImageData
    >>> from regjax.objectives.classification import CrossEntropy
    >>> stages = (ImageStage("only", CrossEntropy(rate=0.1)),)
    >>> one = ImageExperiment(stages, ImageData("idx:images:train", "idx:images:test"))
    >>> other = dataclasses.replace(one, seed=1, stages=(ImageStage("only", CrossEntropy(rate=0.3)),))
    >>> shape_of(one) == shape_of(other), shape_of(one) == shape_of(dataclasses.replace(one, epochs=3))
    (True, False)
    """
    stages = tuple(
        (dataclasses.replace(stage, objective=_nothing), str(jax.tree.structure(stage.objective)))
        for stage in experiment.stages
    )
    data = {
        # Image sets in memory by which they are: they are too long to write.
        name: value if isinstance(value, str) or name not in ("train", "test") else id(value)
        for name, value in vars(experiment.data).items()
        if name != "noise"
    }
    fields = {
        field.name: getattr(experiment, field.name)
        for field in dataclasses.fields(ImageExperiment)
        if field.name not in ("stages", "data", "seed", "name")
    }
    return repr((stages, data, fields))


def _nothing() -> None:
    """In an objective's place."""


def check_alike(experiments: Sequence[ImageExperiment]) -> None:
    """Raises `InputError` for experiments that cannot be trained side by side."""
    if not experiments:
        raise InputError("no experiments are given")
    if len({shape_of(experiment) for experiment in experiments}) > 1:
        raise InputError(
            "these experiments differ in more than seed, noise of the labels and numbers of the "
            "objectives: they cannot be trained side by side"
        )


def stacked(objectives: Sequence[Any]) -> Any:
    """Objectives of one structure as one whose numbers are `[R]`, float32."""
    return jax.tree.map(lambda *numbers: np.asarray(numbers, np.float32), *objectives)


def numbers_of(experiment: ImageExperiment) -> dict[str, float | int]:
    """The seed, and the numbers of the objectives by `STAGE.FIELD`."""
    found: dict[str, float | int] = {"seed": experiment.seed}
    for stage in experiment.stages:
        leaves, _ = jax.tree_util.tree_flatten_with_path(stage.objective)
        for keys, value in leaves:
            found[f"{stage.name}{jax.tree_util.keystr(keys)}"] = float(value)
    if experiment.data.noise is not None:
        found["data.noise.rate"] = float(experiment.data.noise.rate)
    return found
