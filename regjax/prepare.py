"""All that a run needs, read and checked before any accelerator time is spent."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from regjax import data as data_module
from regjax import models, paths
from regjax.data import Data, Examples
from regjax.errors import InputError
from regjax.experiment import Experiment
from regjax.models import Apply, DecoderConfig
from regjax.stages import ResolvedStage
from regjax.token_grid import TokenGrid


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
    workdir.mkdir(parents=True, exist_ok=True)
    if bad:
        data_module.write_bad_records(workdir / "bad_records.jsonl", bad)
    apply, params, config = _model(experiment, tokenizer, model)
    for stage in stages:
        if stage.data.packing and not apply.takes_segments:
            raise InputError(
                "data.packing needs a model that takes segment_ids; turn it off or wrap a function "
                "that names segment_ids"
            )
    return Prepared(experiment, stages, splits, tokenizer, codec, apply, config, params)


def _present(splits: Splits) -> list[Examples]:
    return [one for one in (splits.train, splits.validation, splits.test) if one is not None]


def _tokenizer(experiment: Experiment, workdir: Path, stages: Sequence[ResolvedStage]) -> Any:
    name = experiment.tokenizer or experiment.model
    if name:
        return data_module.load_tokenizer(name)
    saved = workdir / "tokenizer"
    if (saved / "tokenizer.json").is_file():
        return data_module.load_tokenizer(str(saved))
    skeleton = experiment.template.skeleton(None)
    texts: list[str] = []
    for data in {id(stage.data): stage.data for stage in stages}.values():
        for record in data_module.read_records(data.train, data.columns):
            fields = {key: str(value) for key, value in record.fields.items()}
            if all(name in fields for name in experiment.template.fields):
                texts.append(skeleton.render(fields).text)
    texts += [skeleton.score_prefix + text for text in experiment.grid.texts]
    return data_module.train_tokenizer(texts, experiment.vocabulary_size)


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
        apply, params = given
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


def _padded(size: int, multiple: int = 64) -> int:
    return -(-size // multiple) * multiple


def fingerprint(examples: Examples) -> str:
    """A hash of the tokens and scores, by which a resumed run knows its data."""
    import hashlib

    digest = hashlib.sha256()
    for example in examples.examples:
        digest.update(np.ascontiguousarray(example.tokens).tobytes())
        digest.update(np.float64(example.score).tobytes())
    return digest.hexdigest()[:16]
