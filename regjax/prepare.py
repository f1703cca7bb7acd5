"""All that a run needs, read and checked before any accelerator time is spent."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from regjax import data as data_module
from regjax import optim, paths, prompting, sharding
from regjax.data import SPLITS, Batches, Examples, Task, load_task, task_codec
from regjax.data.bad_records import Unusable, number
from regjax.data.rows import round_up
from regjax.errors import InputError
from regjax.experiment import Experiment
from regjax.files import new_folder, write_json
from regjax.initial import Model, initial_model
from regjax.models import Apply, DecoderConfig
from regjax.models.prompt import with_prompts
from regjax.probes import Load, PreparedProbe, Setting
from regjax.prompting import PromptSource
from regjax.stages import DECISIONS, PREVIOUS, ResolvedStage
from regjax.token_grid import TokenGrid

SCORES_LARGEST_WINS = (
    "pearson", "spearman", "kendall", "accuracy_within", "quadratic_weighted_kappa",
)  # fmt: skip
LARGEST_WINS = (*SCORES_LARGEST_WINS, "accuracy", "exact_match")
SELECTABLE = ("rmse", "mae", *SCORES_LARGEST_WINS)
"""Figures of a read-out by which `Stage.select` can choose a checkpoint (and `crps` of the distribution)."""

TRAINED_WITH = "trained_with.json"


@dataclasses.dataclass(frozen=True)
class Splits:
    """The examples of one stage; a split without a source is None."""

    train: Examples
    validation: Examples | None = None
    test: Examples | None = None


@dataclasses.dataclass(frozen=True)
class PreparedStage:
    """A stage with all that it works with."""

    stage: ResolvedStage
    tasks: tuple[Task, ...]
    splits: Splits
    codec: TokenGrid | None
    """How the tokenizer writes the grid of its task; None for free text and for several tasks."""
    base: Apply
    """The model without soft prompts."""
    model: Apply
    """The model with those of the stage's tasks, if it has any."""
    prompts: Mapping[str, PromptSource]
    """Soft prompts that its parameters hold, by name; those of the stage it starts from come first."""
    base_model: str
    """Where the parameters besides the soft prompts are kept if it leaves them as they are: an earlier
    stage's name or the experiment's model; empty: it trains them, or they are kept nowhere."""
    probes: Mapping[str, PreparedProbe]
    """By name."""


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What the stages of an experiment work with."""

    experiment: Experiment
    stages: tuple[PreparedStage, ...]
    tokenizer: Any
    config: DecoderConfig | None
    """None for a model that the caller brought."""
    params: dict[str, jax.Array]
    """Initial parameters by path, each where it lives; without weights, `jax.ShapeDtypeStruct`s."""
    mesh: Mesh
    """All devices."""
    rules: sharding.Rules
    """Where parameters live on the mesh."""

    @property
    def eval_batch_size(self) -> int:
        """Rows scored at once: the experiment's, rounded up to what divides among the devices."""
        return _eval_rows(self.experiment, self.mesh)

    @property
    def reported_split(self) -> str:
        """The split that the table of results is about: test, where any stage has one."""
        for name in ("test", "validation"):
            if any(getattr(ready.splits, name) for ready in self.stages):
                return name
        return ""


def prepare(
    experiment: Experiment,
    workdir: Path,
    model: tuple[Apply, Any] | None = None,
    *,
    mesh: Mesh | None = None,
    weights: bool = True,
) -> Prepared:
    """Reads tokenizer, data and model. Records that cannot be used are listed in `bad_records.jsonl`.

    Args:
      experiment: what to prepare.
      workdir: of the run.
      model: `(apply, params)` in place of the experiment's.
      mesh: in place of one of the experiment's shape over the devices at hand.
      weights: False: no parameter is made or read, `params` are shapes with shardings.

    Raises:
      InputError: for whatever cannot be used, with its place and what to do.
    """
    stages = tuple(experiment.resolve(stage) for stage in experiment.stages)
    tasks = tuple(_tasks(experiment, stage) for stage in stages)
    tokenizer = _tokenizer(experiment, workdir, tasks)
    load = _loader(tokenizer)
    trained_on = {_identity(task): task for each in tasks for task in each}.values()
    for task in trained_on:
        task_codec(task, tokenizer)  # raises, before records are read
    read = [_read(task, load) for task in trained_on]
    bad = [record for split in read for one in _present(split) for record in one.bad]
    listed = workdir / "bad_records.jsonl"
    if jax.process_index() == 0:
        if bad:
            data_module.write_bad_records(listed, bad)
        else:
            listed.unlink(missing_ok=True)
    mesh = sharding.make_mesh(experiment.mesh) if mesh is None else mesh
    if experiment.parallelism == "pmap" and (
        jax.process_count() > 1 or mesh.shape["data"] != mesh.size
    ):
        raise InputError(
            "parallelism 'pmap' replicates the parameters on the devices of one process: leave "
            "mesh.fsdp and mesh.tensor at 1, and use 'jit' over several processes"
        )
    rows, parts = experiment.batch_size // experiment.accumulation, sharding.row_parts(mesh)
    if rows % parts:
        raise InputError(
            f"batch_size {experiment.batch_size} in {experiment.accumulation} micro-batches is {rows} "
            f"rows each, which do not divide among {parts} devices"
        )
    apply, params, config = initial_model(experiment, tokenizer, model, mesh, weights=weights)
    ready: list[PreparedStage] = []
    for stage, its_tasks in zip(stages, tasks, strict=True):
        model_of = (apply, params, config)
        ready.append(
            _prepare_stage(experiment, stage, its_tasks, tokenizer, load, model_of, mesh, ready)
        )
        _check_stage(ready[-1], params)
        _check_objective(experiment, ready[-1], params)
    rules = sharding.rules_for(config, mesh)
    run = Prepared(experiment, tuple(ready), tokenizer, config, params, mesh, rules)
    if run.reported_split and experiment.reference_field:
        reference(run)  # raises
    return run


def _tasks(experiment: Experiment, stage: ResolvedStage) -> tuple[Task, ...]:
    tasks = stage.tasks or (dataclasses.replace(experiment.task, data=stage.data),)
    if stage.shots is None:
        return tasks
    return tuple(dataclasses.replace(task, shots=stage.shots) for task in tasks)


def _identity(task: Task) -> tuple[Any, ...]:
    """What tells two tasks apart whose records would have to be read and encoded twice."""
    return id(task.data), task.template, task.grid, task.shots, task.shots_seed


def _prepare_stage(
    experiment: Experiment,
    stage: ResolvedStage,
    tasks: tuple[Task, ...],
    tokenizer: Any,
    load: Load,
    model: Model,
    mesh: Mesh,
    before: Sequence[PreparedStage],
) -> PreparedStage:
    apply, params, config = model
    codec = None
    splits = [_read(task, load) for task in tasks]
    if len(tasks) == 1:
        own, codec = splits[0], task_codec(tasks[0], tokenizer)
    else:
        own = Splits(data_module.mix([one.train for one in splits]))
    start = start_of(stage, before)
    prompts = prompting.sources(stage, tasks, start, apply, params, config, tokenizer)
    after = prompting.place(stage, own.train, tokenizer)

    def prompted(names: Sequence[str]) -> Apply:
        missing = [name for name in names if name not in prompts]
        if missing:
            raise InputError(
                f"stage {stage.name!r}: no soft prompt {missing[0]!r}; "
                f"it has {', '.join(prompts) or 'none'}"
            )
        return with_prompts(apply, names, after=after) if names else apply

    longest = max(task.data.max_length for task in tasks)
    resolved = dataclasses.replace(
        stage,
        data=dataclasses.replace(tasks[0].data, max_length=longest),
        decisions=_decisions(stage, codec),
    )
    setting = Setting(
        resolved, prompted, tokenizer, experiment.task, _eval_rows(experiment, mesh), load, mesh
    )
    return PreparedStage(
        stage=resolved,
        tasks=tasks,
        splits=own,
        codec=codec,
        base=apply,
        model=prompted([task.name for task in tasks] if stage.soft_prompt else []),
        prompts=prompts,
        base_model=prompting.base_model(experiment, stage, start, params),
        probes={probe.name: probe.prepare(setting) for probe in stage.probes},
    )


def _eval_rows(experiment: Experiment, mesh: Mesh) -> int:
    return round_up(experiment.eval_batch_size, sharding.row_parts(mesh))


def start_of(stage: ResolvedStage, before: Sequence[PreparedStage]) -> PreparedStage | None:
    """The stage whose parameters `stage` starts from; None: the initial ones."""
    if stage.start == PREVIOUS:
        return before[-1] if before else None
    return next((ready for ready in before if ready.stage.name == stage.start), None)


def _decisions(stage: ResolvedStage, codec: TokenGrid | None) -> tuple[str, ...]:
    if codec is not None or stage.decisions == DECISIONS:
        return stage.decisions if codec is not None else ()
    if stage.decisions:
        raise InputError(
            f"stage {stage.name!r}: decisions {stage.decisions} need one task with a grid; set them "
            "to () and give probes"
        )
    return ()


def _check_stage(ready: PreparedStage, params: Mapping[str, jax.Array]) -> None:
    """What would otherwise fail in the middle of a run, or at its end."""
    stage, splits = ready.stage, ready.splits
    if stage.steps < 0:
        raise InputError(f"stage {stage.name!r}: steps is {stage.steps}; it has to be 0 or more")
    if stage.data.packing and not ready.model.takes_segments:
        raise InputError(
            f"stage {stage.name!r}: data.packing needs a model that takes segment_ids; turn it off, "
            "or wrap a function that names segment_ids"
        )
    if stage.data.packing and stage.soft_prompt:
        raise InputError(
            f"stage {stage.name!r}: a soft prompt goes before one example a row: turn packing off"
        )
    shapes = {**params, **prompting.shapes(ready.prompts)}
    trained, _ = paths.split_by_patterns(paths.unflatten(shapes), stage.trainable)
    optim.build(stage.optimizer, stage.steps, trained)
    if not stage.select:
        return
    known = [f"{name}/{figure}" for name in stage.decisions for figure in SELECTABLE]
    known += ["crps"] if stage.decisions else []
    known = known if splits.validation else []
    known += [
        f"{name}/{figure}"
        for name, probe in ready.probes.items()
        if "validation" in probe.examples
        for figure in probe.figures
    ]
    if not known and splits.validation is None:
        raise InputError(
            f"stage {stage.name!r}: select {stage.select!r} needs validation data (data.validation)"
        )
    if stage.select not in known:
        raise InputError(
            f"stage {stage.name!r}: select {stage.select!r} is no figure of its validation report; "
            f"known: {', '.join(known) or 'none, since the stage has no decisions'}"
        )


def _check_objective(
    experiment: Experiment, ready: PreparedStage, params: Mapping[str, jax.Array]
) -> None:
    """Traces a stage's objective, which computes nothing but shapes."""
    stage = ready.stage
    batches = Batches(ready.splits.train, experiment.batch_size, 0, stage.data)
    size = experiment.batch_size // experiment.accumulation
    batch = {
        name: jax.ShapeDtypeStruct((size, *array.shape[1:]), array.dtype)
        for name, array in batches.batch_at(0).items()
        if name != "record_ids"
    }

    def loss(params, batch, key):
        return stage.objective(ready.model, params, batch, key, ready.codec)

    shapes = paths.unflatten({**params, **prompting.shapes(ready.prompts)})
    try:
        sums = jax.eval_shape(loss, shapes, batch, jax.random.key(0))
    except ValueError as error:
        raise InputError(f"stage {stage.name!r}, {stage.objective}: {error}") from error
    except AttributeError as error:
        if ready.codec is not None or "NoneType" not in str(error):
            raise
        raise InputError(
            f"stage {stage.name!r}: {stage.objective} reads scores, which needs one task with a grid"
        ) from error
    if not isinstance(sums, dict) or "loss" not in sums:
        raise InputError(
            f"stage {stage.name!r}: the objective returns {type(sums).__name__}; expected a dict of "
            "(sum, weight) with an entry 'loss'"
        )


def reference(run: Prepared) -> tuple[list[float], list[float]]:
    """`(predictions, targets)`: what the reported split's records hold in `reference_field`.

    Raises:
      InputError: where a record has no number there.
    """
    field = run.experiment.reference_field
    examples = next(
        found
        for ready in reversed(run.stages)
        if (found := getattr(ready.splits, run.reported_split))
    )
    predictions = []
    for example in examples.examples:
        value = examples.records[example.record].get(field)
        try:
            predictions.append(number(field, value))
        except Unusable as error:
            raise InputError(
                f"{error.at(examples.places[example.record])}; reference_field has to name a number"
            ) from error
    targets = [example.score for example in examples.examples]
    return predictions, targets


def _present(splits: Splits) -> list[Examples]:
    return [one for one in (splits.train, splits.validation, splits.test) if one is not None]


def _tokenizer(experiment: Experiment, workdir: Path, tasks: Sequence[tuple[Task, ...]]) -> Any:
    name = experiment.tokenizer or experiment.model
    if name:
        return data_module.load_tokenizer(name)
    saved = workdir / "tokenizer"
    if saved.is_dir():
        return _load_trained(saved, experiment.vocabulary_size)
    texts: list[str] = []
    for task in {_identity(task): task for each in tasks for task in each}.values():
        skeleton = task.template.skeleton(None)
        for record in data_module.read_records(task.data.train, task.data.columns):
            fields = {key: str(value) for key, value in record.fields.items()}
            if all(name in fields for name in task.template.fields):
                texts.append(skeleton.render(fields).text)
        texts += [skeleton.score_prefix + text for text in (task.grid.texts if task.grid else ())]
    return data_module.train_tokenizer(texts, experiment.vocabulary_size)


def save_tokenizer(run: Prepared, workdir: Path) -> None:
    """Keeps a tokenizer that was trained on the data, for when the run is resumed."""
    experiment, saved = run.experiment, workdir / "tokenizer"
    if experiment.tokenizer or experiment.model or saved.is_dir():
        return
    with new_folder(saved) as folder:
        run.tokenizer.save_pretrained(str(folder))
        write_json(folder / TRAINED_WITH, {"vocabulary_size": experiment.vocabulary_size})


def _load_trained(folder: Path, vocabulary_size: int) -> Any:
    made_with = folder / TRAINED_WITH
    if not made_with.is_file():
        raise InputError(f"{folder} is not a tokenizer that a run trained: give another --workdir")
    before = json.loads(made_with.read_text(encoding="utf-8"))
    if before != {"vocabulary_size": vocabulary_size}:
        raise InputError(
            f"{folder} was trained with vocabulary_size {before['vocabulary_size']}, the experiment "
            f"says {vocabulary_size}: give another --workdir"
        )
    return data_module.load_tokenizer(folder)


def _loader(tokenizer: Any) -> Load:
    """`load_task`, which reads and encodes what several stages and probes share once."""
    kept: dict[Any, Examples | None] = {}

    def load(task: Task, split: str, *, prompts_only: bool = False) -> Examples | None:
        key = (_identity(task), split, prompts_only)
        if key not in kept:
            kept[key] = load_task(task, tokenizer, split, prompts_only=prompts_only)  # type: ignore[arg-type]
        return kept[key]

    return load


def _read(task: Task, load: Load) -> Splits:
    if not task.data.train:
        raise InputError("data.train is empty: give the training records, e.g. --data.train FILE")
    train, validation, test = (load(task, split) for split in SPLITS)
    assert train is not None
    return Splits(train, validation, test)


def fingerprint(examples: Examples) -> str:
    """A hash of the tokens, scores and weights, by which a resumed run knows its data."""
    digest = hashlib.sha256()
    for example in examples.examples:
        digest.update(np.ascontiguousarray(example.tokens).tobytes())
        place = [len(example.tokens), example.response_start, example.score_start]
        digest.update(np.array([*place, example.score, example.weight], np.float64).tobytes())
        digest.update(b"" if example.task == 0 else str(example.task).encode())
    return digest.hexdigest()[:16]
