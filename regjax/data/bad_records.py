"""Records that cannot be used: what is wrong with a field, and stopping or listing them."""

from __future__ import annotations

import json
import math
import pathlib
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from regjax.errors import InputError

SHOWN = 5  # bad records spelled out in an error message
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)


class BadRecord(NamedTuple):
    """Why one record cannot be used."""

    place: str
    field: str
    value: str
    reason: str

    def __str__(self) -> str:
        what = f"{self.field} = {self.value}: " if self.field and self.value else ""
        return f"{self.place}: {what}{self.reason}"


class Unusable(Exception):
    """Raised while one record is read; becomes its `BadRecord`."""

    def __init__(self, field: str, value: Any, reason: str):
        super().__init__(reason)
        self.field, self.reason = field, reason
        self.value = "" if value is None else _shown(value)

    def at(self, place: str) -> BadRecord:
        return BadRecord(place, self.field, self.value, self.reason)


def _shown(value: Any) -> str:
    try:
        text = ascii(value) if isinstance(value, str) and not value.isprintable() else repr(value)
    except ValueError:  # an integer with more digits than Python prints
        text = "a number of thousands of digits"
    return text if len(text) <= 60 else text[:57] + "..."


def is_numeral(written: str) -> bool:
    """Whether a text, white space around it apart, is read as a decimal number."""
    return _NUMBER.fullmatch(written.strip()) is not None


def number(field: str, value: Any) -> float:
    """A finite float of a JSON number or a decimal string; booleans are no numbers.

    >>> number("score", "3.5")
    3.5
    """
    if value is None:
        raise Unusable(field, None, f"field {field!r} is missing: expected a number")
    if isinstance(value, str):
        if not is_numeral(value):
            raise Unusable(field, value, "is not a number")
    elif isinstance(value, bool) or not isinstance(value, int | float):
        raise Unusable(field, value, "is not a number")
    try:
        result = float(value)
    except OverflowError:
        result = math.inf
    if not math.isfinite(result):
        raise Unusable(field, value, "is not a finite number")
    return result


def text(field: str, value: Any) -> str:
    """The text of a field: a non-empty string, or a number as it prints."""
    if value is None:
        raise Unusable(field, None, f"field {field!r} is missing: expected text")
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise Unusable(field, value, "is neither text nor a number")
    try:
        result = str(value)
        result.encode()
    except UnicodeEncodeError:
        raise Unusable(field, value, "holds half of a surrogate pair: not valid text") from None
    except ValueError:
        raise Unusable(field, value, "is a number of too many digits") from None
    if not result.strip():
        raise Unusable(field, value, "is empty: expected text")
    return result


def check_bad_records(source: str, bad: Sequence[BadRecord], total: int, policy: str) -> None:
    """Stops when there are bad records and `policy` is "stop", or when there is nothing else.

    Raises:
        InputError: names the first places with field, value and reason, the count, and the cures.
    """
    if not bad or (policy == "skip" and len(bad) < total):
        return
    lines = [f"  {record}" for record in bad[:SHOWN]]
    if len(bad) > SHOWN:
        lines.append(f"  ... and {len(bad) - SHOWN} more")
    cure = (
        "no record is left: correct the file, or the fields and the template that read it"
        if len(bad) == total
        else 'correct them, or leave them out with on_bad_record="skip", which lists them'
    )
    raise InputError(
        "\n".join([f"{source}: {len(bad)} of {total} records cannot be used", *lines, cure])
    )


def write_bad_records(path: str | pathlib.Path, bad: Sequence[BadRecord]) -> None:
    """Writes one JSON object a bad record: place, field, value, reason."""
    lines = (json.dumps(record._asdict(), ensure_ascii=False) + "\n" for record in bad)
    pathlib.Path(path).write_text("".join(lines), encoding="utf-8")
