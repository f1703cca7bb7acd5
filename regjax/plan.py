"""What a run needs and how fast it could be, on devices at hand or not, without touching a weight."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from regjax import chips, sharding, topology
from regjax.chips import Chip
from regjax.compiled import Costs, DoesNotFit, compile_program
from regjax.data import Example, Examples, Task, load_task, task_codec
from regjax.errors import InputError
from regjax.experiment import Experiment
from regjax.models import DecoderConfig, resolve_execution
from regjax.models.lora import Lora
from regjax.prepare import Load, prepare
from regjax.programs import Program, programs_of
from regjax.sharding import MeshShape

ANSWER = 64
"""Tokens of a free-text answer where there is no data to tell."""


@dataclasses.dataclass(frozen=True)
class Planned:
    """One program, and what became of it."""

    program: Program
    result: Costs | DoesNotFit
    chip: Chip | None
    """None: its figures are not known, as of a CPU."""

    @property
    def fits(self) -> bool:
        """Whether it was compiled, and takes no more than the chip's memory where that is known."""
        if isinstance(self.result, DoesNotFit):
            return False
        return self.chip is None or self.needed <= self.chip.memory

    @property
    def needed(self) -> int:
        """Bytes on one chip; of what does not fit, at least."""
        if isinstance(self.result, DoesNotFit):
            return self.result.needed
        return self.result.memory.total

    @property
    def seconds(self) -> float | None:
        """A lower bound on its time, see `regjax.compiled.Seconds`; None where there is none."""
        if self.chip is None or isinstance(self.result, DoesNotFit):
            return None
        return self.result.seconds(self.chip).bound

    @property
    def utilisation(self) -> float | None:
        """Model flops utilisation at that time: an upper bound."""
        if self.seconds is None or self.program.flops is None or self.chip is None:
            return None
        peak = self.chip.flops * self.program.mesh.size
        return self.program.flops / (self.seconds * peak)

    def to_json(self) -> dict[str, Any]:
        """All that is known, in bytes, operations and seconds, of one chip."""
        program, result = self.program, self.result
        found: dict[str, Any] = {
            "stage": program.name,
            "program": program.kind,
            "rows": program.rows,
            "length": program.length,
            "mesh": dict(program.mesh.shape),
            "fits": self.fits,
            "needed_bytes": self.needed,
            "memory_bytes": self.chip.memory if self.chip else None,
            "model_flops": program.flops,
        }
        if isinstance(result, DoesNotFit):
            return {**found, "arguments": dict(result.arguments), "message": result.message}
        found |= {
            "arguments": dict(result.memory.arguments),
            "outputs": result.memory.outputs,
            "temporaries": result.memory.temporaries,
            "code": result.memory.program,
            "flops": result.flops,
            "traffic_bytes": result.traffic,
            "collectives": [
                {**dataclasses.asdict(one), "sent": one.sent} for one in result.collectives
            ],
        }
        if self.chip is not None and self.seconds:
            found |= {
                "seconds": dataclasses.asdict(result.seconds(self.chip)),
                "seconds_at_least": self.seconds,
                "tokens_per_second_at_most": program.rows * program.length / self.seconds,
                "utilisation_at_most": self.utilisation,
            }
        return found


def plan(
    experiment: Experiment,
    target: str = "",
    *,
    save_hlo: Path | None = None,
    on_program: Callable[[Planned], None] = lambda planned: None,
) -> list[Planned]:
    """Compiles every program of a run: each stage's step and scorer.

    Records are read for the shapes of rows. Of a task whose training records are a file that is not here,
    rows of `max_length` (and of each bucket) with one example are taken.

    Args:
      experiment: of the run.
      target: a TPU slice such as `v5e:4x4`; empty: the devices at hand.
      save_hlo: folder for the compiled programs' text.
      on_program: called with each as it is done.

    Raises:
      InputError: for whatever is wrong with the config, and for a target that cannot be compiled for.
    """
    devices = topology.tpu_devices(target) if target else jax.devices()
    chip = chips.find(devices[0].device_kind)
    found = []
    for program in _programs(experiment, devices):
        planned = Planned(program, compile_program(program.lower, program.parts, chip), chip)
        if save_hlo is not None:
            _save(planned, save_hlo)
        on_program(planned)
        found.append(planned)
    return found


def _programs(experiment: Experiment, devices: list[Any]) -> list[Program]:
    mesh = sharding.make_mesh(experiment.mesh, devices)
    with tempfile.TemporaryDirectory() as folder:
        run = prepare(experiment, Path(folder), mesh=mesh, weights=False, loader=_loader)
        return programs_of(run)


def _save(planned: Planned, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    program, result = planned.program, planned.result
    text = result.message if isinstance(result, DoesNotFit) else result.text
    (folder / f"{program.name}-{program.kind}-{program.length}.txt").write_text(text)


def absent_tasks(experiment: Experiment) -> list[Task]:
    """The tasks that stages are trained on whose records are files that are not here."""
    stages = [experiment.resolve(stage) for stage in experiment.stages]
    tasks = [
        task
        for stage in stages
        for task in stage.tasks or (dataclasses.replace(experiment.task, data=stage.data),)
    ]
    found = {str(task.data.train): task for task in tasks if is_absent(task)}
    return list(found.values())


def is_absent(task: Task) -> bool:
    """Whether a task's training records are a file that is not here."""
    source = task.data.train
    return (
        isinstance(source, str | Path)
        and not str(source).startswith("tfds:")
        and not (Path(source).is_file())
    )


def _loader(tokenizer: Any) -> Load:
    """`load_task`, or of a task without its records examples of the longest rows it may have."""

    def load(task: Task, split: str, *, prompts_only: bool = False) -> Examples | None:
        if not is_absent(task):
            return load_task(task, tokenizer, split, prompts_only=prompts_only)  # type: ignore[arg-type]
        return _longest(task, tokenizer) if split == "train" else None

    return load


def _longest(task: Task, tokenizer: Any) -> Examples:
    codec = task_codec(task, tokenizer)
    answer = ANSWER if codec is None else codec.tokens.shape[1] + (codec.terminator is None)
    lengths = task.data.lengths if task.data.buckets else (task.data.max_length,)
    first = tokenizer.bos_token_id or 0
    examples = [
        Example(
            tokens=np.full(length, first, np.int32),
            response_start=length - min(answer, length - 1),
            score_start=length - min(answer, length - 1),
            score=0.0,
            weight=1.0,
            record=index,
        )
        for index, length in enumerate(lengths)
    ]
    names = [str(index) for index in range(len(examples))]
    return Examples(examples, [{} for _ in names], names, names, [], 0)


@dataclasses.dataclass(frozen=True)
class Remedy:
    """A change of a config by which a step might fit."""

    change: str
    """In words."""
    flags: str
    """For the command line; empty: it is a change of the config file."""
    experiment: Experiment
    """With this change and those before it that leave the results as they are."""
    planned: Planned
    """The stage's longest step with it."""

    @property
    def compiled(self) -> bool:
        """Whether the compiler said so; otherwise its arguments alone decide."""
        result = self.planned.result
        return not isinstance(result, DoesNotFit) or bool(result.message)


def remedies(experiment: Experiment, stage: str, target: str = "") -> Iterator[Remedy]:
    """Changes by which the longest step of a stage might fit, tried in turn.

    First those after which it computes the same: each is kept for the next, and the first that makes the
    step fit ends the search. Then, with all of these, those that change what is computed.
    """
    devices = topology.tpu_devices(target) if target else jax.devices()
    chip = chips.find(devices[0].device_kind)

    def attempt(change: str, flags: str, changed: Experiment) -> Remedy | None:
        try:
            programs = _programs(changed, devices)
        except InputError:
            # Such as records that cannot be cut to shorter rows.
            return None
        steps = [one for one in programs if one.name == stage and one.kind == "step"]
        longest = max(steps, key=lambda one: one.length)
        result = compile_program(longest.lower, longest.parts, chip)
        return Remedy(change, flags, changed, Planned(longest, result, chip))

    flags = ""
    for change, more, changed in _same_results(experiment, devices):
        flags = f"{flags} {more}".strip()
        remedy = attempt(change, flags, changed)
        if remedy is None:
            continue
        yield remedy
        if remedy.planned.fits:
            return
        experiment = changed
    for change, more, changed in _other_results(experiment, stage, devices):
        remedy = attempt(change, f"{flags} {more}".strip() if more else "", changed)
        if remedy is not None:
            yield remedy


Change = tuple[str, str, Experiment]


def _executed(experiment: Experiment, devices: Sequence[Any]) -> DecoderConfig:
    """A decoder's configuration in which is said how the experiment's model is computed."""
    platform = devices[0].platform
    return resolve_execution(DecoderConfig(), experiment.execution, platform).config


def _same_results(experiment: Experiment, devices: Sequence[Any]) -> Iterator[Change]:
    """Changes that leave results as they are up to rounding, each on top of the last."""
    if experiment.mesh.fsdp == 1 and len(devices) > 1:
        tensor = experiment.mesh.tensor
        experiment = dataclasses.replace(experiment, mesh=MeshShape(1, -1, tensor))
        yield (
            "deal out parameters and optimizer over all devices",
            "--mesh.data 1 --mesh.fsdp -1",
            experiment,
        )
    if _executed(experiment, devices).rematerialisation != "full":
        execution = dataclasses.replace(experiment.execution, rematerialisation="full")
        experiment = dataclasses.replace(experiment, execution=execution)
        yield "compute layers again", "--execution.rematerialisation full", experiment
    parts = len(devices) // experiment.mesh.tensor
    for factor in (2, 4):
        pieces = experiment.accumulation * factor
        if experiment.batch_size % (pieces * parts) == 0:
            changed = dataclasses.replace(experiment, accumulation=pieces)
            yield f"{pieces} micro-batches", f"--accumulation {pieces}", changed


def _other_results(experiment: Experiment, stage: str, devices: Sequence[Any]) -> Iterator[Change]:
    """Changes, each on its own, that change what is computed."""
    if _executed(experiment, devices).dtype == "float32":
        execution = dataclasses.replace(experiment.execution, dtype="bfloat16")
        changed = dataclasses.replace(experiment, execution=execution)
        yield "products in bfloat16", "--execution.dtype bfloat16", changed
    chosen = next(one for one in experiment.stages if one.name == stage)
    if (chosen.optimizer or experiment.optimizer).name == "adamw":
        rule = dataclasses.replace(
            chosen.optimizer or experiment.optimizer, name="adafactor", weight_decay=0.0
        )
        flags = "" if chosen.optimizer else "--optimizer.name adafactor"
        yield "adafactor in place of adamw", flags, _with_stage(experiment, stage, optimizer=rule)
    if chosen.lora is None:
        changed = _with_stage(experiment, stage, lora=Lora())
        yield "adapters alone: Stage(..., lora=Lora())", "", changed
    half = experiment.data.max_length // 2
    buckets = tuple(length for length in experiment.data.buckets if length <= half)
    data = dataclasses.replace(experiment.data, max_length=half, buckets=buckets)
    changed = dataclasses.replace(experiment, data=data)
    yield f"rows of at most {half} tokens", f"--data.max-length {half}", changed


def _with_stage(experiment: Experiment, name: str, **changes: Any) -> Experiment:
    stages = tuple(
        dataclasses.replace(one, **changes) if one.name == name else one
        for one in experiment.stages
    )
    return dataclasses.replace(experiment, stages=stages)
