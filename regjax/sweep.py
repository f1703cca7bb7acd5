"""Sweeps: one config over seeds and grids of values, side by side where that is possible, one table."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from regjax.classification import ImageExperiment, train_runs
from regjax.classification.memory import runs_that_fit
from regjax.classification.runs import shape_of
from regjax.errors import InputError
from regjax.experiment import Experiment
from regjax.files import write_json
from regjax.log import print_table
from regjax.recorder import TrainingStopped
from regjax.train import train

AnyExperiment = Experiment | ImageExperiment
Axes = Mapping[str, Sequence[Any]]
"""Values by the name of what they are put in, see `with_value`."""

SWEEP, RESULTS, RUNS = "sweep.json", "results.json", "runs"


class Point(NamedTuple):
    """One run of a sweep."""

    values: dict[str, Any]
    """Of the axes, and `seed`."""

    experiment: AnyExperiment


def points(experiment: AnyExperiment, axes: Axes, seeds: int) -> list[Point]:
    """Every combination of the axes' values with the seeds s, s + 1, ..., s the experiment's.

    Raises:
      InputError: for names and values that the experiment does not have.
    """
    if seeds < 1:
        raise InputError(f"seeds is {seeds}; it has to be 1 or more")
    if "seed" in axes and seeds > 1:
        raise InputError("give the seeds as --seeds or as --grid seed, not as both")
    own = {} if "seed" in axes else {"seed": range(experiment.seed, experiment.seed + seeds)}
    names = [*axes, *own]
    found = []
    for values in itertools.product(*axes.values(), *own.values()):
        changed = experiment
        for name, value in zip(names, values, strict=True):
            changed = with_value(changed, name, value)
        found.append(Point(dict(zip(names, values, strict=True)), changed))
    return found


def with_value(experiment: Any, name: str, value: Any) -> Any:
    """The experiment with a value in its field `name`: fields joined by dots, a stage by its name, and a
    stage's objective's fields as the stage's own.

    `optimizer.learning_rate`, `data.noise.rate`, `student.epochs`, `student.alpha`. Text, as from a command
    line, becomes what the field holds now.

    Raises:
      InputError: if there is no such field, or the value is none for it.
    """
    first, _, rest = name.partition(".")
    stages = {stage.name: stage for stage in getattr(experiment, "stages", ())}
    if first in stages and rest:
        stage = stages[first]
        in_stage = rest.partition(".")[0].replace("-", "_") in _fields(stage)
        new = (
            _replaced(stage, rest, value, name)
            if in_stage
            else dataclasses.replace(stage, objective=_replaced(stage.objective, rest, value, name))
        )
        return dataclasses.replace(
            experiment, stages=tuple(new if one is stage else one for one in experiment.stages)
        )
    return _replaced(experiment, name, value, name)


def _fields(value: Any) -> list[str]:
    return (
        [field.name for field in dataclasses.fields(value)]
        if dataclasses.is_dataclass(value)
        else []
    )


def _replaced(owner: Any, path: str, value: Any, name: str) -> Any:
    field, _, rest = path.partition(".")
    field = field.replace("-", "_")
    if field not in _fields(owner):
        known = ", ".join(_fields(owner)) or "none"
        raise InputError(f"{name}: {type(owner).__name__} has no field {field!r}; it has: {known}")
    now = getattr(owner, field)
    new = _replaced(now, rest, value, name) if rest else _parsed(value, now, name)
    try:
        return dataclasses.replace(owner, **{field: new})
    except InputError as error:
        raise InputError(f"{name} = {value}: {error}") from error


def _parsed(value: Any, now: Any, name: str) -> Any:
    if not isinstance(value, str) or isinstance(now, str):
        return value
    kinds = {"true": True, "false": False} if isinstance(now, bool) else {}
    if value.lower() in kinds:
        return kinds[value.lower()]
    wanted = int if isinstance(now, int) and not isinstance(now, bool) else float
    try:
        if now is None:
            return json.loads(value)
        if isinstance(now, bool | tuple):
            raise ValueError
        return wanted(value)
    except ValueError:
        raise InputError(
            f"{name} is {value!r}; the field holds {now!r}, and takes values of its kind"
        ) from None


def sweep(
    experiment: AnyExperiment,
    workdir: str | Path,
    *,
    axes: Axes | None = None,
    seeds: int = 1,
    quiet: bool = False,
) -> dict[str, Any]:
    """Runs every point, and returns what is written to `workdir/results.json`.

    Image experiments that differ in seed, noise of the labels and numbers of objectives alone are trained
    side by side in one compiled program, as many as memory holds; all others one after another. A sweep
    that was stopped goes on where it was when called again with the same arguments, and gives the same
    table. A run whose loss is not finite is given up, and its row says so.

    Raises:
      InputError: for whatever is wrong with config, axes or data.
    """
    found = points(experiment, axes or {}, seeds)
    workdir = Path(workdir)
    if workdir.exists() and not workdir.is_dir():
        raise InputError(f"--workdir {workdir} is a file; give a folder")
    _check_same(workdir, found)
    rows: list[dict[str, Any]] = []
    groups = list(_groups(found))
    for number, group in enumerate(groups):
        if not quiet and jax.process_index() == 0 and len(groups) > 1:
            print(f"part {number + 1} of {len(groups)}: {len(group)} runs")
        rows += _rows(group, workdir / RUNS / f"{number:03d}")
    order = [list(point.values.values()) for point in found]
    axes_and_seed = list(found[0].values)
    rows.sort(key=lambda row: order.index([row[name] for name in axes_and_seed]))
    table = summary(rows)
    result = {"points": [point.values for point in found], "rows": rows, "table": table}
    if jax.process_index() == 0:
        write_json(workdir / RESULTS, result)
    multihost_utils.sync_global_devices("the sweep's results are written")
    if not quiet and jax.process_index() == 0:
        print_table(f"{experiment.name}: {len(found)} runs", shown(table))
    return result


def _check_same(workdir: Path, found: Sequence[Point]) -> None:
    """A sweep is resumed by its points; others would mix with what is there."""
    path = workdir / SWEEP
    now = json.loads(json.dumps([point.values for point in found]))
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        if before != now:
            raise InputError(
                f"{workdir} holds a sweep over other values ({len(before)} runs then, {len(now)} now): "
                "give another --workdir"
            )
        return
    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        write_json(path, now)


def _groups(found: Sequence[Point]) -> Iterator[list[Point]]:
    """Points that are trained together, in the order of the first of each."""
    shapes: dict[Any, list[Point]] = {}
    for number, point in enumerate(found):
        one = point.experiment
        shape = shape_of(one) if isinstance(one, ImageExperiment) else number
        shapes.setdefault(shape, []).append(point)
    for group in shapes.values():
        first = group[0].experiment
        most = runs_that_fit(first) if isinstance(first, ImageExperiment) else 1
        for start in range(0, len(group), most):
            yield group[start : start + most]


def _rows(group: Sequence[Point], folder: Path) -> list[dict[str, Any]]:
    """A row a run and stage (and read-out), with the figures of the test split."""
    experiments = [point.experiment for point in group]
    try:
        if isinstance(experiments[0], ImageExperiment):
            found = train_runs(experiments, folder, quiet=True)  # type: ignore[arg-type]
        else:
            found = train(experiments[0], folder, quiet=True)
    except TrainingStopped:
        return [
            {**point.values, "stage": stage.name, "diverged": True}
            for point in group
            for stage in point.experiment.stages
        ]
    if isinstance(experiments[0], Experiment):
        return [{**group[0].values, **row, "diverged": False} for row in found["table"]]
    return [
        {
            **point.values,
            "stage": name,
            **{k: v for k, v in stage["runs"][number].items() if isinstance(v, int | float | None)},
            "diverged": number in stage["given_up"],
        }
        for name, stage in found["stages"].items()
        for number, point in enumerate(group)
    ]


def summary(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard error of every figure over the seeds, a row a stage and point.

    The standard error is the sample's standard deviation (n - 1) by the square root of n; None of one run.
    Runs that diverged are counted and left out.

    >>> rows = [{"seed": s, "stage": "only", "accuracy": o, "diverged": False} for s, o in [(0, .5), (1, .7)]]
    >>> [row] = summary(rows)
    >>> round(row["accuracy"], 3), round(row["accuracy_se"], 3), row["runs"]
    (0.6, 0.1, 2)
    """
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    names: dict[str, None] = {}
    for row in rows:
        key = tuple((k, v) for k, v in row.items() if k != "seed" and _is_name(row, k))
        groups.setdefault(key, []).append(row)
        names |= {k: None for k in row if k not in ("seed", "diverged") and not _is_name(row, k)}
    table = []
    for key, group in groups.items():
        kept = [row for row in group if not row["diverged"]]
        line: dict[str, Any] = {**dict(key), "runs": len(group), "diverged": len(group) - len(kept)}
        for name in names:
            values = [row[name] for row in kept if row.get(name) is not None]
            line[name] = float(np.mean(values)) if values else None
            spread = (
                float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else None
            )
            line[f"{name}_se"] = spread
        table.append(line)
    return table


def _is_name(row: Mapping[str, Any], key: str) -> bool:
    """Whether an entry says which run it is: everything up to `stage`, and text."""
    keys = list(row)
    return key != "diverged" and (
        keys.index(key) <= keys.index("stage") or isinstance(row[key], str)
    )


def shown(table: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The table for people: `mean ± standard error`, and no column that says nothing."""
    rows = []
    for row in table:
        line: dict[str, Any] = {}
        for name, value in row.items():
            if name.endswith("_se") or (
                name == "diverged" and not any(r["diverged"] for r in table)
            ):
                continue
            spread = row.get(f"{name}_se")
            if f"{name}_se" not in row:
                line[name] = value
            elif value is None:
                line[name] = "undefined"
            else:
                line[name] = f"{value:.4f}" + ("" if spread is None else f" ± {spread:.4f}")
        rows.append(line)
    return rows
