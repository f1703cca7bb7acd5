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

from regjax import data as data_module
from regjax import models, optim, paths
from regjax.data import Batches, Data, Examples
from regjax.data.bad_records import Unusable, number
from regjax.errors import InputError
from regjax.experiment import Experiment
from regjax.files import new_folder, write_json
from regjax.models import Apply, DecoderConfig
from regjax.stages import ResolvedStage
from regjax.token_grid import TokenGrid

LARGEST_WINS = ("pearson", "spearman", "kendall", "accuracy_within", "quadratic_weighted_kappa")
SELECTABLE = ("rmse", "mae", *LARGEST_WINS)
"""Figures of a read-out by which `Stage.select` can choose a checkpoint (and `crps` of the distribution)."""

TRAINED_WITH = "trained_with.json"


@dataclasses.dataclass(frozen=True)
class Splits:
    """The examples of one `Data`; a split without a source is None."""

    train: Examples
    validation: Examples | None
    test: Examples | None


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What the stages of an experiment work with."""

    experiment: Experiment
    stages: tuple[ResolvedStage, ...]
    splits: tuple[Splits, ...]
    """Of each stage."""
    tokenizer: Any
    codec: TokenGrid
    model: Apply
    config: DecoderConfig | None
    """None for a model that the caller brought."""
    params: dict[str, jax.Array]
    """Initial parameters by path."""

    @property
    def reported_split(self) -> str:
        """The split that the table of results is about: test, where any stage has one."""
        for name in ("test", "validation"):
            if any(getattr(splits, name) for splits in self.splits):
                return name
        return ""


def prepare(
    experiment: Experiment, workdir: Path, model: tuple[Apply, Any] | None = None
) -> Prepared:
    """Reads tokenizer, data and model. Records that cannot be used are listed in `bad_records.jsonl`.

    Raises:
      InputError: for whatever cannot be used, with its place and what to do.
    """
    stages = tuple(experiment.resolve(stage) for stage in experiment.stages)
    tokenizer = _tokenizer(experiment, workdir, stages)
    codec = experiment.template.codec(experiment.grid, tokenizer)
    read: dict[int, Splits] = {}
    for stage in stages:
        if id(stage.data) not in read:
            read[id(stage.data)] = _read(experiment, stage.data, tokenizer, codec)
    splits = tuple(read[id(stage.data)] for stage in stages)
    bad = [record for split in read.values() for one in _present(split) for record in one.bad]
    listed = workdir / "bad_records.jsonl"
    if bad:
        data_module.write_bad_records(listed, bad)
    else:
        listed.unlink(missing_ok=True)
    rows = experiment.batch_size // experiment.accumulation
    if rows % jax.device_count():
        raise InputError(
            f"batch_size {experiment.batch_size} in {experiment.accumulation} micro-batches is {rows} "
            f"rows each, which do not divide among {jax.device_count()} devices"
        )
    apply, params, config = _model(experiment, tokenizer, model)
    run = Prepared(experiment, stages, splits, tokenizer, codec, apply, config, params)
    for index, stage in enumerate(stages):
        _check_stage(stage, splits[index], apply, params)
        _check_objective(run, index)
    if run.reported_split and experiment.reference_field:
        reference(run)  # raises
    return run


def _check_stage(
    stage: ResolvedStage, splits: Splits, apply: Apply, params: Mapping[str, jax.Array]
) -> None:
    """What would otherwise fail in the middle of a run, or at its end."""
    if stage.steps < 0:
        raise InputError(f"stage {stage.name!r}: steps is {stage.steps}; it has to be 0 or more")
    if stage.data.packing and not apply.takes_segments:
        raise InputError(
            f"stage {stage.name!r}: data.packing needs a model that takes segment_ids; turn it off, "
            "or wrap a function that names segment_ids"
        )
    trained, _ = paths.split_by_patterns(paths.unflatten(params), stage.trainable)
    optim.build(stage.optimizer, stage.steps, trained)
    if not stage.select:
        return
    if splits.validation is None:
        raise InputError(
            f"stage {stage.name!r}: select {stage.select!r} needs validation data (data.validation)"
        )
    known = [f"{name}/{figure}" for name in stage.decisions for figure in SELECTABLE]
    known += ["crps"] if stage.decisions else []
    if stage.select not in known:
        raise InputError(
            f"stage {stage.name!r}: select {stage.select!r} is no figure of its validation report; "
            f"known: {', '.join(known) or 'none, since the stage has no decisions'}"
        )


def _check_objective(run: Prepared, index: int) -> None:
    """Traces a stage's objective, which computes nothing but shapes."""
    stage = run.stages[index]
    batches = Batches(run.splits[index].train, run.experiment.batch_size, 0, stage.data)
    size = run.experiment.batch_size // run.experiment.accumulation
    batch = {
        name: jax.ShapeDtypeStruct((size, *array.shape[1:]), array.dtype)
        for name, array in batches.batch_at(0).items()
        if name != "record_ids"
    }

    def loss(params, batch, key):
        return stage.objective(run.model, params, batch, key, run.codec)

    try:
        sums = jax.eval_shape(loss, paths.unflatten(run.params), batch, jax.random.key(0))
    except ValueError as error:
        raise InputError(f"stage {stage.name!r}, {stage.objective}: {error}") from error
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
        found for one in reversed(run.splits) if (found := getattr(one, run.reported_split))
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


def _tokenizer(experiment: Experiment, workdir: Path, stages: Sequence[ResolvedStage]) -> Any:
    name = experiment.tokenizer or experiment.model
    if name:
        return data_module.load_tokenizer(name)
    saved = workdir / "tokenizer"
    if saved.is_dir():
        return _load_trained(saved, experiment.vocabulary_size)
    skeleton = experiment.template.skeleton(None)
    texts: list[str] = []
    for data in {id(stage.data): stage.data for stage in stages}.values():
        for record in data_module.read_records(data.train, data.columns):
            fields = {key: str(value) for key, value in record.fields.items()}
            if all(name in fields for name in experiment.template.fields):
                texts.append(skeleton.render(fields).text)
    texts += [skeleton.score_prefix + text for text in experiment.grid.texts]
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


def _read(experiment: Experiment, data: Data, tokenizer: Any, codec: TokenGrid) -> Splits:
    if not data.train:
        raise InputError("data.train is empty: give the training records, e.g. --data.train FILE")

    def load(source: Any) -> Examples | None:
        if not source:
            return None
        return data_module.load_examples(
            source, data, experiment.template, tokenizer, experiment.grid, codec
        )

    train = load(data.train)
    assert train is not None
    return Splits(train, load(data.validation), load(data.test))


def _model(
    experiment: Experiment, tokenizer: Any, given: tuple[Apply, Any] | None
) -> tuple[Apply, dict[str, jax.Array], DecoderConfig | None]:
    if given is not None:
        function, params = given
        apply = function if isinstance(function, Apply) else models.from_function(function)
        _check_vocabulary(apply, params, tokenizer)
        return apply, paths.flatten(params), None
    if experiment.model:
        choices = experiment.architecture
        module = models.load(
            experiment.model,
            compute_dtype=choices.dtype,
            rematerialisation=choices.rematerialisation,
            scan_layers=choices.scan_layers,
        )
    else:
        config = dataclasses.replace(
            experiment.architecture, vocabulary_size=_padded(len(tokenizer))
        )
        module = models.create(config, experiment.seed)
    config = module.config
    if len(tokenizer) > config.vocabulary_size:
        raise InputError(
            f"the tokenizer has {len(tokenizer)} tokens, the model only {config.vocabulary_size}: "
            "give the model's own tokenizer"
        )
    apply, params = models.split(module)
    return apply, paths.flatten(params), config


def _check_vocabulary(apply: Apply, params: Any, tokenizer: Any) -> None:
    shape = jax.ShapeDtypeStruct((1, 8), np.int32)
    logits = jax.eval_shape(lambda params, tokens: apply(params, tokens), params, shape)
    if logits.ndim != 3 or logits.shape[-1] < len(tokenizer):
        raise InputError(
            f"the model's logits have shape {logits.shape} for tokens {shape.shape}; expected "
            f"[B, L, V] with V at least {len(tokenizer)}, the tokenizer's size"
        )


def _padded(size: int, multiple: int = 64) -> int:
    return -(-size // multiple) * multiple


def fingerprint(examples: Examples) -> str:
    """A hash of the tokens, scores and weights, by which a resumed run knows its data."""
    digest = hashlib.sha256()
    for example in examples.examples:
        digest.update(np.ascontiguousarray(example.tokens).tobytes())
        place = [len(example.tokens), example.response_start, example.score_start]
        digest.update(np.array([*place, example.score, example.weight], np.float64).tobytes())
    return digest.hexdigest()[:16]
