"""An experiment: everything a run depends on, as one frozen dataclass."""

from __future__ import annotations

import dataclasses
import runpy
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from regjax.data import Data, Task, Template
from regjax.errors import InputError
from regjax.files import write_json
from regjax.models import DecoderConfig, Execution
from regjax.optim import Optimizer
from regjax.scores import ScoreGrid
from regjax.sharding import MeshShape
from regjax.stages import Parallelism, ResolvedStage, Stage, check_stages, trainable_of

if TYPE_CHECKING:
    from regjax.classification import ImageExperiment

MAIN = "main"

EXECUTED = {
    "dtype": "dtype",
    "attention": "attention",
    "rematerialisation": "rematerialisation",
    "scan_layers": "layers",
}
"""Fields of a model's configuration that an experiment has in `execution`, and their names there."""


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A model, data, a grid of scores, and the list of stages that a method is."""

    stages: tuple[Stage, ...]
    """What is trained, in order."""

    data: Data
    """Training, validation and test data."""

    template: Template
    """How a record is written as text, and where the score stands."""

    grid: ScoreGrid | None = None
    """The scores or labels the model can give, and how they are written; None: it answers in free text."""

    name: str = "experiment"
    """Title of tables and runs."""

    model: str = ""
    """Folder or hub id of a published model (config.json and safetensors); empty: `architecture`, trained
    from scratch."""

    architecture: DecoderConfig = DecoderConfig()
    """The model to train from scratch; its vocabulary size is the tokenizer's."""

    execution: Execution = Execution()
    """How the model is computed: precision, attention, rematerialisation; `auto`: as the devices like it."""

    tokenizer: str = ""
    """Folder or hub id of a tokenizer; empty: the model's own, or one trained on the training texts."""

    vocabulary_size: int = 1024
    """Size of a tokenizer trained on the training texts (byte-level BPE, digits on their own)."""

    reference_field: str = ""
    """A field of the records that holds a prediction to compare with, such as a known bound."""

    seed: int = 0
    """Decides initial parameters, order of the data and everything random in a step."""

    batch_size: int = 32
    """Rows in an update."""

    accumulation: int = 1
    """Micro-batches an update is computed in; must divide the batch size."""

    eval_batch_size: int = 64
    """Rows scored at once."""

    steps: int = 1000
    """Updates in a stage that does not say otherwise."""

    optimizer: Optimizer = Optimizer()
    """Update rule of the stages that do not say otherwise."""

    log_every: int = 10
    """Steps between lines of the log."""

    eval_every: int = 0
    """Steps between evaluations on the validation data in a stage that does not say otherwise; 0: only at
    its end."""

    checkpoint_every: int = 100
    """Steps between checkpoints; the last step and evaluated steps are saved as well."""

    keep_latest: int = 2
    """Newest checkpoints that are kept."""

    keep_best: int = 1
    """Best checkpoints that are kept in a stage with `select`."""

    keep_every: int = 0
    """Checkpoints of steps that this divides are kept for good; 0: none. A multiple of
    `checkpoint_every`."""

    max_bad_steps: int = 5
    """Steps in a row with a loss or gradient that is not finite after which the run stops."""

    mesh: MeshShape = MeshShape()
    """How the devices are arranged; by default each has all parameters and its share of the rows."""

    parallelism: Parallelism = "jit"
    """`jit` over the mesh, or the same update replicated under `pmap`, which takes one process and a mesh
    of `data` alone."""

    loggers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Where numbers go besides `log.jsonl`; each needs the extra of its name."""

    def __post_init__(self) -> None:
        check_stages(self.stages)
        _ = self.task  # raises
        for name in (
            "batch_size", "accumulation", "eval_batch_size", "steps", "log_every",
            "checkpoint_every", "keep_latest", "keep_best", "max_bad_steps", "vocabulary_size",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it has to be 1 or more")
        for name, instead in EXECUTED.items():
            value = getattr(self.architecture, name)
            if value != getattr(DecoderConfig(), name):
                raise InputError(
                    f"architecture.{name} is {value!r}; how a model is computed is said in execution: "
                    f"give execution.{instead}"
                )
        if not 0 <= self.seed < 2**32:
            raise InputError(f"seed is {self.seed}; it has to be in 0..2**32 - 1")
        if self.eval_every < 0:
            raise InputError(f"eval_every is {self.eval_every}; it has to be 0 or more")
        if self.keep_every < 0 or self.keep_every % self.checkpoint_every:
            raise InputError(
                f"keep_every is {self.keep_every}; it has to be 0 or a multiple of checkpoint_every "
                f"({self.checkpoint_every}), so that there is a checkpoint to keep"
            )
        if self.batch_size % self.accumulation:
            raise InputError(
                f"accumulation {self.accumulation} does not divide batch_size {self.batch_size}"
            )

    @property
    def task(self) -> Task:
        """The experiment's own task: that of every stage and probe that names no other."""
        return Task(MAIN, self.data, self.template, self.grid)

    def resolve(self, stage: Stage) -> ResolvedStage:
        """`stage` with the experiment's steps, optimizer, evaluations and data where it has none.

        What it trains is said in full.
        """
        own = {f.name: getattr(stage, f.name) for f in dataclasses.fields(Stage)}
        decided = {
            "trainable": trainable_of(stage),
            "steps": self.steps if stage.steps is None else stage.steps,
            "optimizer": self.optimizer if stage.optimizer is None else stage.optimizer,
            "eval_every": self.eval_every if stage.eval_every is None else stage.eval_every,
            "data": self.data if stage.data is None and not stage.tasks else stage.data,
        }
        return ResolvedStage(**{**own, **decided})


def load_config(path: str | Path) -> Experiment | ImageExperiment:
    """The `experiment` that a config file (Python) defines.

    Raises:
      InputError: if the file is missing, fails when run, or defines no experiment.
    """
    from regjax.classification import ImageExperiment

    path = Path(path)
    if not path.is_file():
        raise InputError(f"no config file {path}; a config is a Python file that sets `experiment`")
    try:
        found = runpy.run_path(str(path)).get("experiment")
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except SystemExit as error:
        raise InputError(f"{path} ends the process (sys.exit); a config only sets names") from error
    except Exception as error:
        line = traceback.extract_tb(error.__traceback__)[-1]
        raise InputError(
            f"{path} failed at {line.filename}:{line.lineno}: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(found, Experiment | ImageExperiment):
        raise InputError(
            f"{path} does not set `experiment = regjax.Experiment(...)`, nor an ImageExperiment"
        )
    return found


def to_json(value: Any) -> Any:
    """A config as JSON: dataclasses with their type's name, records in memory as their number."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"type": type(value).__name__, **fields}
    if isinstance(value, str | int | float | bool | None):
        return value
    if isinstance(value, list | tuple) and value and isinstance(value[0], dict):
        return f"{len(value)} records in memory"
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    if isinstance(value, np.ndarray):
        return f"array of {value.dtype} {list(value.shape)}"
    return repr(value)


def write_config(experiment: Experiment, path: Path) -> None:
    """Writes the resolved config: every stage with the values it runs with."""
    resolved = dataclasses.replace(
        experiment, stages=tuple(experiment.resolve(stage) for stage in experiment.stages)
    )
    write_json(path, to_json(resolved))
