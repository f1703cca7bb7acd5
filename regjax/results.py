"""What a finished stage leaves behind: predictions, metrics, a model folder; and the table of a run."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from regjax import checkpoint, metrics, paths
from regjax.artifacts import keep_parameters
from regjax.data import ordered_batches
from regjax.evaluation import (
    Evaluation,
    evaluate_batches,
    make_score,
    to_json,
    write_predictions,
)
from regjax.experiment import to_json as config_to_json
from regjax.files import write_json, write_text
from regjax.log import print_table, progress
from regjax.prepare import Prepared, fingerprint, reference
from regjax.probes import HELD_OUT, Split

FIGURES = ("rmse", "mae", "pearson", "spearman")


class Report(NamedTuple):
    """What a stage's parameters are worth on a split."""

    figures: dict[str, float]
    """Of the read-outs (`READ_OUT/FIGURE`) and of the probes (`PROBE/FIGURE`)."""
    scores: Evaluation | None
    """Distributions and read-outs of every record, of a stage with read-outs."""
    answers: dict[str, Sequence[dict[str, Any]]]
    """A line a record, by probe."""


class StageEvaluation:
    """`(split, parameters by path) -> Report` of a stage, compiled once."""

    def __init__(self, run: Prepared, index: int) -> None:
        ready = self._ready = run.stages[index]
        self._size = run.eval_batch_size
        self._codec = ready.codec if ready.stage.decisions else None
        self._score = (
            None if self._codec is None else make_score(ready.model, self._codec, run.mesh)
        )

    def has(self, split: Split) -> bool:
        """Whether there is something to evaluate on `split`."""
        has_scores = bool(self._ready.stage.decisions and getattr(self._ready.splits, split))
        return has_scores or any(split in probe.examples for probe in self._ready.probes.values())

    def __call__(self, split: Split, params: Mapping[str, jax.Array]) -> Report:
        ready, tree = self._ready, paths.unflatten(params)
        scores = self._evaluate_scores(split, tree)
        figures = dict(scores.report) if scores else {}
        answers = {}
        for name, probe in ready.probes.items():
            if split not in probe.examples:
                continue
            measured = probe.measure(tree, split)
            figures |= {f"{name}/{figure}": value for figure, value in measured.figures.items()}
            if measured.lines:
                answers[name] = measured.lines
        return Report(figures, scores, answers)

    def _evaluate_scores(self, split: Split, tree: Any) -> Evaluation | None:
        stage, examples = self._ready.stage, getattr(self._ready.splits, split)
        if examples is None or self._score is None or self._codec is None:
            return None
        data = dataclasses.replace(stage.data, packing=False)  # scored one example a row
        with progress(f"{stage.name}: {split}", -(-len(examples) // self._size)) as advance:
            return evaluate_batches(
                self._score, tree, ordered_batches(examples, self._size, data),
                self._codec.values, stage.decisions, advance=advance,
            )  # fmt: skip


def finish_stage(
    run: Prepared,
    index: int,
    params: Mapping[str, jax.Array],
    step: int,
    evaluation: StageEvaluation,
    folder: Path,
) -> dict[str, Any]:
    """Writes predictions, model and soft prompts and, last, `results.json`; returns what that holds.

    A stage whose results are there, of these parameters on these data, is not evaluated again.
    """
    ready = run.stages[index]
    stage = ready.stage
    done = folder / "results.json"
    result: dict[str, Any] = {
        "step": step,
        "steps": stage.steps,
        "params": int(checkpoint.checksum(dict(params))),
        "decisions": list(stage.decisions),
        "data": {
            split: fingerprint(examples)
            for split in HELD_OUT
            if (examples := getattr(ready.splits, split)) is not None
        },
    }
    if ready.probes:
        result["probes"] = {
            probe.name: {
                "config": config_to_json(probe),
                **{s: fingerprint(e) for s, e in ready.probes[probe.name].examples.items()},
            }
            for probe in stage.probes
        }
    first = jax.process_index() == 0
    if multihost_utils.broadcast_one_to_all(np.array(first and _is_result_of(done, result))):
        return json.loads(done.read_text(encoding="utf-8"))
    if first:
        done.unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    for split in HELD_OUT:
        if not evaluation.has(split):
            continue
        report = evaluation(split, params)
        examples = getattr(ready.splits, split)
        grid = ready.tasks[0].grid
        if first and report.scores is not None and grid is not None:
            path = folder / f"predictions_{split}.jsonl"
            write_predictions(path, report.scores, examples.ids, grid.texts)
        for name, lines in report.answers.items() if first else ():
            text = "".join(json.dumps(line) + "\n" for line in lines)
            write_text(folder / f"answers_{name}_{split}.jsonl", text)
        if report.figures:
            result[split] = to_json(report.figures)
    keep_parameters(run, ready, params, folder)
    if first:
        write_json(done, result)
    return result


def _is_result_of(path: Path, expected: Mapping[str, Any]) -> bool:
    if not path.is_file():
        return False
    found = json.loads(path.read_text(encoding="utf-8"))
    return {name: found.get(name) for name in expected} == expected


def results_table(run: Prepared, results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row a stage and read-out, on the test split where there is one, and the known predictions."""
    rows: list[dict[str, Any]] = []
    split = run.reported_split
    for stage in (ready.stage for ready in run.stages):
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


def text_table(run: Prepared, results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row a stage with the figures of its probes, on the test split where any has one."""
    for split in reversed(HELD_OUT):
        rows = []
        for ready in run.stages:
            report = results[ready.stage.name].get(split, {})
            prefixes = tuple(f"{probe.name}/" for probe in ready.stage.probes if probe.in_table)
            figures = {k: v for k, v in report.items() if prefixes and k.startswith(prefixes)}
            if figures:
                rows.append({"stage": ready.stage.name, **figures})
        if rows:
            names = dict.fromkeys(name for row in rows for name in row)
            return [{name: row.get(name) for name in names} for row in rows]
    return []


def print_results(run: Prepared, results: Mapping[str, Any]) -> None:
    """Prints the tables of a run."""
    if results["table"]:
        split = results["table"][0]["split"]
        print_table(f"{run.experiment.name}: {split} split", results["table"])
    if results["text_table"]:
        print_table(f"{run.experiment.name}: answers", results["text_table"])
