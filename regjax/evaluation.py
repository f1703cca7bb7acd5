"""How good a model's scores are: read-outs of the exact distribution, and the metrics of each."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from regjax import decisions, metrics, scoring, sharding
from regjax.errors import InputError
from regjax.files import write_text
from regjax.models import Apply
from regjax.token_grid import TokenGrid

READ_OUTS: dict[str, Callable[..., jax.Array]] = {
    "mean": decisions.mean,
    "normalized_mean": functools.partial(decisions.mean, normalize=True),
    "median": decisions.median,
    "mode": decisions.mode,
}
"""Read-outs by the name that configs and reports use. `mean` is the paper's, not normalised over the grid
(what `Raft()` trains); `normalized_mean` is what `Raft(normalize=True)` trains."""

Score = Callable[[Any, Mapping[str, np.ndarray]], scoring.Scores]


def make_score(model: Apply, codec: TokenGrid, mesh: Mesh | None = None) -> Score:
    """The compiled `(params, batch) -> Scores` of a model on a grid.

    With a mesh, on which the parameters live, the rows are dealt out over it and have to divide.
    """
    names = ("tokens", "positions", "segment_ids", "score_positions")

    @jax.jit
    def score(params, batch):
        return scoring.score_distribution(model, params, batch, codec)

    def on_batch(params, batch: Mapping[str, np.ndarray]) -> scoring.Scores:
        rows = {name: batch[name] for name in names}
        if mesh is None:
            return score(params, rows)
        with sharding.known_inside(mesh):
            return score(params, sharding.RowLayout(mesh, len(rows["tokens"])).put(rows))

    return on_batch


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Scores of N examples in the order of the source."""

    record_ids: np.ndarray
    """`[N]` index in the source."""
    targets: np.ndarray
    """`[N]` true scores."""
    probabilities: np.ndarray
    """`[N, K]` probability of every grid value, not renormalised."""
    values: np.ndarray
    """`[K]` grid values."""
    predictions: dict[str, np.ndarray]
    """`[N]` per read-out."""
    report: dict[str, float]
    """`read-out/metric` -> number, and what concerns the distribution alone without a read-out's name."""


def evaluate_batches(
    score: Score,
    params,
    batches: Iterable[Mapping[str, np.ndarray]],
    values: np.ndarray,
    read_outs: Sequence[str],
    *,
    intervals: bool = False,
    advance: Callable[..., None] | None = None,
) -> Evaluation:
    """Scores every example of the batches (one a row, padding rows have `record_ids` -1) and reports.

    Each batch is fetched after the next one has been dispatched, so the device does not wait.

    Raises:
      InputError: if the batches hold no example.
    """
    ids, targets, log_probs = [], [], []
    pending: tuple[np.ndarray, np.ndarray, jax.Array] | None = None

    def fetch() -> None:
        if pending is None:
            return
        record_ids, scores, found = pending
        real = record_ids >= 0
        ids.append(record_ids[real])
        targets.append(scores[real])
        log_probs.append(sharding.fetch(found)[real])

    for batch in batches:
        scored = score(params, batch)
        fetch()
        pending = batch["record_ids"][:, 0], batch["scores"][:, 0], scored.log_probs
        if advance is not None:
            advance()
    fetch()
    if not sum(map(len, ids)):
        raise InputError("there are no examples to evaluate")
    order = np.argsort(np.concatenate(ids), kind="stable")
    probabilities = np.exp(np.concatenate(log_probs)[order].astype(np.float64))
    return evaluate_distribution(
        np.concatenate(ids)[order],
        np.concatenate(targets)[order],
        probabilities,
        np.asarray(values),
        read_outs,
        intervals=intervals,
    )


def evaluate_distribution(
    record_ids: np.ndarray,
    targets: np.ndarray,
    probabilities: np.ndarray,
    values: np.ndarray,
    read_outs: Sequence[str],
    *,
    intervals: bool = False,
) -> Evaluation:
    """Predictions and metrics of every read-out, from probabilities `[N, K]`."""
    predictions = {name: np.asarray(READ_OUTS[name](probabilities, values)) for name in read_outs}
    shared = ("crps", "coverage_90", "grid_mass", "target_std", "count")
    report: dict[str, float] = {}
    for name, predicted in predictions.items():
        found = metrics.regression_report(
            predicted, targets, probabilities=probabilities, values=values, intervals=intervals
        )
        for metric, value in found.items():
            report[metric if metric.startswith(shared) else f"{name}/{metric}"] = value
    return Evaluation(record_ids, targets, probabilities, values, predictions, report)


def write_predictions(
    path: Path, evaluation: Evaluation, ids: Sequence[Any], texts: Sequence[str]
) -> None:
    """One JSON line an example: id, target, every read-out, distribution, grid mass; whole or absent.

    `ids` are by record, `texts` `[K]` those of the grid; a read-out that is not defined is null.
    """
    lines = []
    for row, (record, target) in enumerate(
        zip(evaluation.record_ids, evaluation.targets, strict=True)
    ):
        probabilities = evaluation.probabilities[row]
        line = {
            "id": ids[record],
            "target": _finite(target),
            **{name: _finite(p[row]) for name, p in evaluation.predictions.items()},
            "distribution": dict(zip(texts, map(_finite, probabilities), strict=True)),
            "grid_mass": _finite(probabilities.sum()),
        }
        lines.append(json.dumps(line) + "\n")
    write_text(path, "".join(lines))


def to_json(report: Mapping[str, float]) -> dict[str, Any]:
    """A report with what is not finite as null, the reason under `<name>/undefined` where there is one.

    >>> to_json({"rmse": 0.5, "pearson": metrics.Undefined("the predictions are constant")})
    {'rmse': 0.5, 'pearson': None, 'pearson/undefined': 'the predictions are constant'}
    """
    found: dict[str, Any] = {}
    for name, value in report.items():
        found[name] = _finite(value)
        if isinstance(value, metrics.Undefined):
            found[f"{name}/undefined"] = value.reason
    return found


def _finite(value: float) -> float | None:
    """JSON has no NaN and no infinity."""
    return float(value) if np.isfinite(value) else None
