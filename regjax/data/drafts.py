"""What a record says, before any tokenizer: its fields as text, its score, weight and identity."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from regjax.data import bad_records
from regjax.data.bad_records import Unusable
from regjax.data.config import Data
from regjax.data.sources import Record
from regjax.data.template import Template
from regjax.errors import InputError
from regjax.scores import ScoreGrid

SHOWN = 8  # known names spelled out when a score's text is none of them


class Draft(NamedTuple):
    """A record's checked values."""

    fields: dict[str, str]
    score: float | None  # None: it has none, or none was read
    weight: float
    record: int  # index in the source


def check_answers(data: Data, template: Template, grid: ScoreGrid | None) -> None:
    """Template, grid and score names have to speak of the same answers.

    Raises:
        InputError: `{score}` without a grid, free text with one, another number of names than values.
    """
    if template.has_score and grid is None:
        raise InputError(
            f"template response {template.response!r} ends with {{score}}, but there is no grid: "
            "give the grid of its values, or write the answer's field for free text"
        )
    if grid is None:
        return
    if not template.has_score:
        raise InputError(
            f"template response {template.response!r} has no {{score}}, but there is a grid: let it "
            "end with {score}, or leave the grid out for free text"
        )
    if data.score_names and len(data.score_names) != len(grid):
        raise InputError(
            f"score_names has {len(data.score_names)} names and the grid {len(grid)} values: give "
            "one name per value"
        )


def number_fields(data: Data, grid: ScoreGrid | None) -> list[str]:
    """Fields that are read besides the template's."""
    fields = ["" if grid is None else data.score_field, data.weight_field, data.id_field]
    return [field for field in fields if field]


def draft(
    index: int, record: Record, names: Sequence[str], data: Data, grid: ScoreGrid | None
) -> tuple[Draft, str]:
    """The draft and the identity of one record; without a grid no score is read.

    Raises:
        Unusable: the record could not be parsed, or a value of it cannot be used.
    """
    if record.problem:
        raise Unusable("", None, record.problem)
    fields = {name: bad_records.text(name, record.fields.get(name)) for name in names}
    score = None if grid is None else _score(data, grid, record.fields.get(data.score_field))
    weight = 1.0
    if data.weight_field:
        value = record.fields.get(data.weight_field)
        weight = bad_records.number(data.weight_field, value)
        if weight < 0:
            raise Unusable(data.weight_field, value, "is negative: expected a weight of 0 or more")
    identity = record.place
    if data.id_field:
        identity = bad_records.text(data.id_field, record.fields.get(data.id_field))
    return Draft(fields, score, weight, index), identity


def _score(data: Data, grid: ScoreGrid, value: Any) -> float:
    """A number, or the grid value that a text names; what reads as a number is never taken for a name."""
    if isinstance(value, str) and not bad_records.is_numeral(value):
        return grid.values[_named(data, grid, value)]
    score = bad_records.number(data.score_field, value)
    low, high = float(grid.values[0]), float(grid.values[-1])
    # A score at the grid's end may have been rounded to float32 by whoever stored it.
    slack = 1e-6 * max(abs(low), abs(high))
    if not low - slack <= score <= high + slack:
        raise Unusable(data.score_field, value, f"is off the grid's range {low:g} to {high:g}")
    return score


def _named(data: Data, grid: ScoreGrid, value: str) -> int:
    names = data.score_names or grid.texts
    found = [index for index, name in enumerate(names) if name.strip() == value.strip()]
    if not found:
        known = ", ".join(repr(name.strip()) for name in names[:SHOWN])
        more = f", ... ({len(names)} in all)" if len(names) > SHOWN else ""
        raise Unusable(data.score_field, value, f"is not a number, nor one of {known}{more}")
    if len(found) > 1:
        raise Unusable(data.score_field, value, "is the text of several values of the grid")
    return found[0]
