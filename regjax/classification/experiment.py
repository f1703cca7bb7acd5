"""An experiment on images: everything its runs depend on, as one frozen dataclass."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

from regjax.data.images import ImageData
from regjax.errors import InputError
from regjax.models.vision import CifarResNet, VisionModel
from regjax.optim import Optimizer
from regjax.sharding import MeshShape
from regjax.stages import NotOnCommandLine, is_folder_name

NEW = "new"


@dataclasses.dataclass(frozen=True)
class ImageStage:
    """One model that is trained: a teacher, a student, or one of several to compare."""

    name: str
    """Name of the stage, of its row in the table and of its folder in the workdir."""

    objective: Any
    """What is minimised, see `regjax.objectives.classification`."""

    model: NotOnCommandLine = None
    """Its architecture; None: the experiment's."""

    start: str = NEW
    """`new` parameters, or the name of an earlier stage of the same architecture that it goes on from."""

    teachers: tuple[str, ...] = ()
    """Earlier stages whose logits the objective gets."""

    teacher: Literal["cached", "on_the_fly"] = "cached"
    """Teachers' logits of the training images as they are, computed once; or of the augmented ones that the
    student sees, computed at every step."""

    epochs: int | None = None
    """Passes over the training images; None: the experiment's."""

    optimizer: Optimizer | None = None
    """Update rule; None: the experiment's."""

    clean_labels: bool = False
    """Train on the true labels where the data have noise: the oracle to compare with."""

    average: bool = False
    """The result is the mean of the parameters (and batch statistics) over the adjustments of an objective
    with multipliers, in place of the last ones. For a model that is linear in its parameters this is the
    average of the iterates' scores."""


@dataclasses.dataclass(frozen=True)
class ImageExperiment:
    """Images, a model, and the list of stages that a method is."""

    stages: tuple[ImageStage, ...]
    """What is trained, in order."""

    data: ImageData
    """Training and test images, what is held out, noise and long tails."""

    model: VisionModel = CifarResNet(20)
    """The architecture of stages that name no other."""

    name: str = "experiment"
    """Title of tables and runs."""

    seed: int = 0
    """Decides initial parameters and noise of the labels."""

    order_seed: int = 0
    """Decides the order of the images and their augmentation. Runs of one order seed share batches, so
    that a sweep over `seed` augments each batch once; sweep over both for runs that share nothing."""

    batch_size: int = 128
    """Images in an update."""

    eval_batch_size: int = 500
    """Images scored at once."""

    epochs: int = 20
    """Passes over the training images of stages that do not say otherwise."""

    optimizer: Optimizer = Optimizer(
        name="sgd", learning_rate=0.1, b1=0.9, nesterov=True, weight_decay=1e-4, warmup=0.0,
        clip_norm=0.0,
    )  # fmt: skip
    """Update rule of the stages that do not say otherwise."""

    attributes: tuple[tuple[int, ...], ...] = ()
    """Binary labels of the images of each class, K zeros and ones a class, for stages that rank, see
    `regjax.methods.bipartite_ranking`."""

    runs: Literal["auto", "vmap", "map"] = "auto"
    """How several runs share a device: as one more axis of every array, or in turns of a few steps, which is
    faster on processors. At least as many runs as devices are dealt out over them in either way."""

    worst_k: int = 1
    """Classes in the worst-k accuracy that the table shows besides the worst class; 1: none."""

    log_every: int = 1
    """Epochs between lines of the log."""

    eval_every: int = 0
    """Epochs between evaluations on the held-out images; 0: only at the end. Epochs of fewer than 64 steps
    are trained several in one go, and what is due in between comes after them."""

    checkpoint_every: int = 5
    """Epochs between checkpoints."""

    keep_latest: int = 2
    """Newest checkpoints that are kept."""

    max_bad_steps: int = 5
    """Steps in a row with a loss or gradient that is not finite after which a run is given up."""

    mesh: MeshShape = MeshShape()
    """How the devices are arranged; of fewer runs than devices the rows of each batch are dealt out.
    Parameters are whole on each device."""

    loggers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Where numbers go besides `log.jsonl`; each needs the extra of its name."""

    def __post_init__(self) -> None:
        check_image_stages(self.stages)
        for name in (
            "batch_size", "eval_batch_size", "epochs", "worst_k", "log_every", "checkpoint_every",
            "keep_latest", "max_bad_steps",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it has to be 1 or more")
        for name in ("seed", "order_seed"):
            if not 0 <= getattr(self, name) < 2**32:
                raise InputError(f"{name} is {getattr(self, name)}; it has to be in 0..2**32 - 1")
        if self.eval_every < 0:
            raise InputError(f"eval_every is {self.eval_every}; it has to be 0 or more")

    def outputs_of(self, stage: ImageStage, classes: int) -> int:
        """Outputs of the stage's model: one for each class, or those that its objective asks for."""
        return getattr(stage.objective, "outputs", classes)

    def model_of(self, stage: ImageStage) -> VisionModel:
        return self.model if stage.model is None else stage.model

    def epochs_of(self, stage: ImageStage) -> int:
        return self.epochs if stage.epochs is None else stage.epochs

    def optimizer_of(self, stage: ImageStage) -> Optimizer:
        return self.optimizer if stage.optimizer is None else stage.optimizer


def check_image_stages(stages: Sequence[ImageStage]) -> None:
    """Raises `InputError` for an empty list, names that clash, unknown starts and teachers, and the like."""
    if not stages:
        raise InputError("the experiment has no stages")
    seen: list[str] = []
    for stage in stages:
        place = f"stage {stage.name!r}"
        if not stage.name or stage.name == NEW or not is_folder_name(stage.name):
            raise InputError(f"{place}: use letters, digits, '-' and '_' only, and not {NEW!r}")
        if stage.name in seen:
            raise InputError(f"two stages are named {stage.name!r}")
        if not callable(stage.objective):
            raise InputError(f"{place}: its objective is not callable")
        if isinstance(stage.teachers, str):
            raise InputError(
                f"{place}: teachers is the string {stage.teachers!r}; expected a tuple"
            )
        for name in (*stage.teachers, *([] if stage.start == NEW else [stage.start])):
            if name not in seen:
                raise InputError(
                    f"{place} needs stage {name!r}, which is not before it; known: "
                    f"{', '.join(seen) or 'none'}"
                )
        if stage.epochs is not None and stage.epochs < 1:
            raise InputError(f"{place}: epochs is {stage.epochs}; it has to be 1 or more")
        if stage.average and not hasattr(stage.objective, "adjust"):
            raise InputError(f"{place}: average needs an objective with multipliers")
        seen.append(stage.name)


def check_attributes(experiment: ImageExperiment, classes: int) -> None:
    """Raises `InputError` unless attributes are K zeros and ones for each class, or nothing uses them."""
    rows = experiment.attributes
    rank = [stage.name for stage in experiment.stages if hasattr(stage.objective, "outputs")]
    if not rows and not rank:
        return
    right = len(rows) == classes and len({len(row) for row in rows}) == 1 and len(rows[0]) > 0
    if not right or not {value for row in rows for value in row} <= {0, 1}:
        raise InputError(
            f"attributes are {rows}; expected K zeros and ones for each of {classes} classes"
            + (f": stage {rank[0]!r} ranks by them" if rank else "")
        )
    taught = [stage.name for stage in experiment.stages if {*stage.teachers, stage.start} & {*rank}]
    taught += [stage.name for stage in experiment.stages if stage.teachers and stage.name in rank]
    if taught:
        raise InputError(f"stage {taught[0]!r}: a stage that ranks is no teacher and has none")
