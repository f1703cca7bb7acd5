"""The programs a run would compile, its training steps and scorers, from shapes alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from regjax import model_flops, optim, paths, prompting, scoring, sharding
from regjax.data import Batches
from regjax.data.rows import round_up
from regjax.models import Apply, DecoderConfig
from regjax.optim import Optimizer
from regjax.prepare import Prepared, PreparedStage
from regjax.stages import abstract_state, make_update, sharding_of
from regjax.token_grid import TokenGrid

Shapes = Mapping[str, jax.ShapeDtypeStruct]

MOST_LENGTHS = 3
"""Up to how many row lengths a stage's step is compiled for; of more, the longest alone."""

OF_LENGTH = ("tokens", "positions", "segment_ids")
SCORED = (*OF_LENGTH, "score_positions")


@dataclasses.dataclass(frozen=True)
class Program:
    """A program that can be lowered without a weight, and what it is for."""

    name: str
    """The stage's name."""
    kind: Literal["step", "scorer"]
    mesh: Mesh
    """Of the devices it is for."""
    rows: int
    """B."""
    length: int
    """L."""
    parts: Mapping[str, Any]
    """Its arguments by what they are: trees of shapes with shardings."""
    lower: Callable[[], jax.stages.Lowered]
    flops: float | None
    """That the model needs for all rows, see `model_flops`; None: a model that the caller brought."""


def training_step(
    name: str,
    model: Apply,
    params: Shapes,
    trainable: tuple[str, ...],
    objective: Any,
    codec: TokenGrid | None,
    optimizer: Optimizer,
    batch: Mapping[str, jax.ShapeDtypeStruct],
    mesh: Mesh,
    *,
    accumulation: int = 1,
    steps: int = 1000,
    config: DecoderConfig | None = None,
) -> Program:
    """The update of one stage.

    Args:
      name: of the stage.
      model: the model with all it is trained with, such as adapters.
      params: its parameters by path, each with a sharding on `mesh`.
      trainable: regular expressions of those that learn.
      objective: what is minimised.
      codec: how the scores are written.
      optimizer: update rule.
      batch: arrays `[B, ...]` of a batch, without `record_ids`.
      mesh: devices.
      accumulation: micro-batches.
      steps: of the schedule.
      config: of the model, for the flops it needs.
    """
    trained, frozen = paths.split_by_patterns(paths.unflatten(params), trainable)
    rule = optim.build(optimizer, steps, trained)
    state = abstract_state(trained, rule, mesh)
    rows, length = batch["tokens"].shape
    by_row = sharding.by_row(mesh, axis=1)
    placed = {
        key: jax.ShapeDtypeStruct(
            (accumulation, rows // accumulation, *leaf.shape[1:]), leaf.dtype, sharding=by_row
        )
        for key, leaf in batch.items()
    }

    def lower() -> jax.stages.Lowered:
        places = sharding_of(state)
        update: Any = make_update(model, objective, rule, codec, seed=0, sharding=places)
        return update.lower(state, frozen, placed)

    return Program(
        name,
        "step",
        mesh,
        rows,
        length,
        {
            "trained": state.params,
            "optimizer": (state.optimizer, state.step),
            "frozen": frozen,
            "batch": placed,
        },
        lower,
        None
        if config is None
        else rows * model_flops.of_row(config, objective, codec, batch, trained),
    )


def scorer(
    name: str,
    model: Apply,
    params: Shapes,
    codec: TokenGrid,
    batch: Mapping[str, jax.ShapeDtypeStruct],
    mesh: Mesh,
    config: DecoderConfig | None = None,
) -> Program:
    """The exact distribution over a grid, `regjax.scoring.score_distribution`, of a batch `[B, ...]`."""
    by_row = sharding.by_row(mesh)
    placed = {
        key: jax.ShapeDtypeStruct(batch[key].shape, batch[key].dtype, sharding=by_row)
        for key in batch
        if key in (*SCORED, "task_ids")
    }
    rows, length = batch["tokens"].shape

    def score(params, batch):
        with sharding.known_inside(mesh):
            return scoring.score_distribution(model, paths.unflatten(params), batch, codec)

    candidates, most = (1, 0) if codec.single_token else codec.tokens.shape
    flops = None
    if config is not None:
        each = model_flops.forward(config, length + most, max(most, 1)).total
        flops = rows * candidates * each
    return Program(
        name,
        "scorer",
        mesh,
        rows,
        length,
        {"frozen": dict(params), "batch": placed},
        lambda: jax.jit(score).lower(dict(params), placed),
        flops,
    )


def programs_of(run: Prepared) -> list[Program]:
    """Every stage's step, for each length of its rows if these are few, and its scorer.

    `run` is of `prepare(..., weights=False)`.
    """
    found = []
    for ready in run.stages:
        params = _start_shapes(run, ready)
        config = run.config
        for batch in _batches(run, ready):
            found.append(
                training_step(
                    ready.stage.name,
                    ready.model,
                    params,
                    ready.stage.trainable,
                    ready.stage.objective,
                    ready.codec,
                    ready.stage.optimizer,
                    batch,
                    run.mesh,
                    accumulation=run.experiment.accumulation,
                    steps=ready.stage.steps,
                    config=config,
                )
            )
        if ready.codec is not None and ready.stage.decisions:
            rows = round_up(run.experiment.eval_batch_size, sharding.row_parts(run.mesh))
            batch = rows_of(rows, batch["tokens"].shape[1], labels=4)
            found.append(
                scorer(ready.stage.name, ready.model, params, ready.codec, batch, run.mesh, config)
            )
    return found


def rows_of(
    rows: int, length: int, *, labels: int, slots: int = 1
) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of a batch as `regjax.data.Batches` makes it, without `record_ids`.

    >>> {name: leaf.shape for name, leaf in rows_of(8, 64, labels=4).items()}["label_weights"]
    (8, 4)
    """
    widths = dict.fromkeys(OF_LENGTH, length)
    widths |= dict.fromkeys(("labels", "label_positions", "label_weights"), labels)
    widths |= dict.fromkeys(("score_positions", "scores", "weights", "task_ids"), slots)
    floats = ("label_weights", "scores", "weights")
    return {
        name: jax.ShapeDtypeStruct((rows, width), jnp.float32 if name in floats else jnp.int32)
        for name, width in widths.items()
    }


def _batches(run: Prepared, ready: PreparedStage) -> list[dict[str, jax.ShapeDtypeStruct]]:
    """Shapes of a stage's batches, the longest last."""
    batches = Batches(ready.splits.train, run.experiment.batch_size, 0, ready.stage.data)
    lengths = [bucket.length for bucket in batches.buckets]
    lengths = lengths if len(lengths) <= MOST_LENGTHS else lengths[-1:]
    return [
        rows_of(batches.batch_size, length, labels=batches.labels, slots=batches.slots)
        for length in lengths
    ]


def _start_shapes(run: Prepared, ready: PreparedStage) -> dict[str, jax.ShapeDtypeStruct]:
    """What a stage begins with, each where it lives."""
    shapes: dict[str, Any] = {
        **run.params,
        **ready.adapters.shapes,
        **prompting.shapes(ready.prompts),
    }
    places = sharding.place(shapes, run.mesh, run.rules)
    return {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=places[path])
        for path, leaf in shapes.items()
    }
