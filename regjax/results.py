"""What a finished stage leaves behind: predictions, metrics, a model folder; and the table of a run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from regjax import metrics, models, paths
from regjax.data import Examples, ordered_batches
from regjax.errors import InputError
from regjax.evaluation import (
    Evaluation,
    Score,
    evaluate_batches,
    to_json,
    write_predictions,
)
from regjax.log import progress
from regjax.prepare import Prepared
from regjax.reader import save_reader

FIGURES = ("rmse", "mae", "pearson", "spearman")


def evaluate_split(
    run: Prepared, index: int, split: str, score: Score, params: Mapping[str, jax.Array]
) -> Evaluation:
    """Scores stage `index`'s `validation` or `test` examples with parameters by path."""
    stage, size = run.stages[index], run.experiment.eval_batch_size
    examples = getattr(run.splits[index], split)
    tree = paths.unflatten(params)
    with progress(f"{stage.name}: {split}", -(-len(examples) // size)) as advance:
        return evaluate_batches(
            score, tree, ordered_batches(examples, size, stage.data),
            run.codec.values, stage.decisions, advance=advance,
        )  # fmt: skip


def finish_stage(
    run: Prepared,
    index: int,
    params: Mapping[str, jax.Array],
    step: int,
    score: Score,
    folder: Path,
) -> dict[str, Any]:
    """Writes predictions, model folder and, last, `results.json`; returns what that holds.

    A stage whose results are there for this step is not evaluated again.
    """
    stage = run.stages[index]
    done = folder / "results.json"
    if done.is_file():
        found = json.loads(done.read_text())
        if (found["step"], found["steps"]) == (step, stage.steps):
            return found
    result: dict[str, Any] = {"step": step, "steps": stage.steps}
    for split in ("validation", "test"):
        examples = getattr(run.splits[index], split)
        if examples is None or not stage.decisions:
            continue
        evaluation = evaluate_split(run, index, split, score, params)
        write_predictions(
            folder / f"predictions_{split}.jsonl",
            evaluation,
            examples.ids,
            run.experiment.grid.texts,
        )
        result[split] = to_json(evaluation.report)
    if run.config is not None:
        model = folder / "model"
        models.save(model, run.config, paths.unflatten(params))
        run.tokenizer.save_pretrained(str(model))
        read_out = (*stage.decisions, "mean")[0]
        experiment = run.experiment
        save_reader(model, experiment.template, experiment.grid, read_out, stage.data.max_length)
    write_json(done, result)
    return result


def results_table(run: Prepared, results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row a stage and read-out, on the test split where there is one, and the known predictions."""
    rows: list[dict[str, Any]] = []
    split = "test" if any(splits.test for splits in run.splits) else "validation"
    for stage in run.stages:
        report = results[stage.name].get(split, {})
        for name in stage.decisions if report else ():
            figures = {figure: report[f"{name}/{figure}"] for figure in FIGURES}
            rows.append({"stage": stage.name, "read-out": name, "split": split, **figures})
    field = run.experiment.reference_field
    if field and rows:
        figures = reference(getattr(run.splits[-1], split), field)
        rows.append({"stage": "reference", "read-out": field, "split": split, **figures})
    return rows


def reference(examples: Examples, field: str) -> dict[str, float]:
    """Figures of the predictions that the records themselves hold in `field`.

    Raises:
      InputError: where a record has no number there.
    """
    predictions = []
    for example in examples.examples:
        value = examples.records[example.record].get(field)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InputError(
                f"{examples.places[example.record]}: reference_field {field!r} is {value!r}; "
                "expected a number"
            )
        predictions.append(float(value))
    report = metrics.regression_report(predictions, [e.score for e in examples.examples])
    return {figure: report[figure] for figure in FIGURES}


def write_json(path: Path, value: Any) -> None:
    """Writes JSON, whole or not at all."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    temporary.replace(path)
