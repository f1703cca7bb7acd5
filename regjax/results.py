"""What a finished stage leaves behind: predictions, metrics, a model folder; and the table of a run."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from regjax import checkpoint, metrics, models, paths
from regjax.data import ordered_batches
from regjax.evaluation import (
    Evaluation,
    Score,
    evaluate_batches,
    to_json,
    write_predictions,
)
from regjax.files import new_folder, write_json
from regjax.log import progress
from regjax.prepare import Prepared, fingerprint, reference
from regjax.reader import save_reader

FIGURES = ("rmse", "mae", "pearson", "spearman")


def evaluate_split(
    run: Prepared, index: int, split: str, score: Score, params: Mapping[str, jax.Array]
) -> Evaluation:
    """Scores stage `index`'s `validation` or `test` examples with parameters by path."""
    stage, size = run.stages[index], run.experiment.eval_batch_size
    examples = getattr(run.splits[index], split)
    tree = paths.unflatten(params)
    data = dataclasses.replace(stage.data, packing=False)  # scored one example a row
    with progress(f"{stage.name}: {split}", -(-len(examples) // size)) as advance:
        return evaluate_batches(
            score, tree, ordered_batches(examples, size, data),
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

    A stage whose results are there, of these parameters on these data, is not evaluated again.
    """
    stage = run.stages[index]
    done = folder / "results.json"
    result: dict[str, Any] = {
        "step": step,
        "steps": stage.steps,
        "params": int(checkpoint.checksum(dict(params))),
        "decisions": list(stage.decisions),
        "data": {
            split: fingerprint(examples)
            for split in ("validation", "test")
            if (examples := getattr(run.splits[index], split)) is not None
        },
    }
    if done.is_file():
        found = json.loads(done.read_text(encoding="utf-8"))
        if {name: found.get(name) for name in result} == result:
            return found
        done.unlink()
    folder.mkdir(parents=True, exist_ok=True)
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
    if run.config is None:
        checkpoint.save_params(folder, params)
    else:
        with new_folder(folder / "model") as model:
            models.save(model, run.config, paths.unflatten(params))
            run.tokenizer.save_pretrained(str(model))
            read_out = (*stage.decisions, "mean")[0]
            experiment = run.experiment
            save_reader(
                model, experiment.template, experiment.grid, read_out, stage.data.max_length
            )
    write_json(done, result)
    return result


def results_table(run: Prepared, results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row a stage and read-out, on the test split where there is one, and the known predictions."""
    rows: list[dict[str, Any]] = []
    split = run.reported_split
    for stage in run.stages:
        report = results[stage.name].get(split, {})
        for name in stage.decisions if report else ():
            figures = {figure: report[f"{name}/{figure}"] for figure in FIGURES}
            rows.append({"stage": stage.name, "read-out": name, "split": split, **figures})
    field = run.experiment.reference_field
    if field and rows:
        known = to_json(metrics.regression_report(*reference(run)))
        figures = {figure: known[figure] for figure in FIGURES}
        rows.append({"stage": "reference", "read-out": field, "split": split, **figures})
    return rows
