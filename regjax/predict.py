"""Scores for every record of a file, streamed; a stopped run goes on where it was."""

from __future__ import annotations

import contextlib
import gzip
import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from regjax import compilation
from regjax.data import BadRecord, Record, parse_line, write_bad_records
from regjax.data.bad_records import Unusable, check_bad_records, text
from regjax.errors import InputError
from regjax.files import write_json
from regjax.log import progress, read_log
from regjax.reader import Reader, Scored
from regjax.scores import ScoreGrid

CHUNK = 1024
"""Records read, scored and written at a time."""

ADDED = ("predicted_score", "distribution", "grid_mass", "line")
"""What a line of the output has besides the record."""


def predict(
    model: str | Path | Reader,
    source: str | Path,
    output: str | Path,
    *,
    read_out: str = "",
    batch_size: int = 64,
    on_bad_record: Literal["stop", "skip"] = "stop",
    overwrite: bool = False,
) -> int:
    """Scores the records of a JSONL file into another; returns how many lines were written.

    Each output line is the input record with `predicted_score`, `distribution` (text of the grid value ->
    probability), `grid_mass` and `line`, its line in the input. The output grows as `OUTPUT.partial`,
    which a second call with the same arguments continues, and gets its name when it is complete.

    Raises:
      InputError: missing or malformed input, records that cannot be used or have a field of one of
        those names (unless `on_bad_record` is `skip`: then they are listed in
        `OUTPUT.bad_records.jsonl`), an output that exists, a partial output of another call.
    """
    compilation.enable_cache()
    source, output = Path(source), Path(output)
    if output.exists() and not overwrite:
        raise InputError(f"{output} exists already: give another --output, or --overwrite")
    if not output.parent.is_dir():
        raise InputError(f"{output.parent} is no folder: make it, or give another --output")
    records = _stream(source)
    reader = model if isinstance(model, Reader) else Reader.load(model, read_out=read_out)
    _check(source, reader, on_bad_record)
    made_with = {
        "model": None if isinstance(model, Reader) else str(Path(model).resolve()),
        "input": str(source.resolve()),
        "bytes": source.stat().st_size,
        "read_out": reader.read_out,
        "batch_size": batch_size,
    }
    partial = output.with_name(output.name + ".partial")
    listed = output.with_name(output.name + ".bad_records.jsonl")
    done = _resume(partial, listed, made_with)
    with progress("predict", None, done.written) as advance, partial.open("ab") as file:
        for chunk in _chunks(pair for pair in records if pair[0] > done.line):
            scored, bad = reader.score_records([record for _, record in chunk], batch_size)
            check_bad_records(str(source), bad, len(chunk) + 1, on_bad_record)
            lines = [_line(chunk[index], scored[index], reader.grid) for index in sorted(scored)]
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())
            done = done.after(chunk[-1][0], lines, bad)
            if done.bad:
                write_bad_records(listed, done.bad)
            write_json(_sidecar(partial), {**made_with, "done": done.to_json()})
            advance(len(lines))
    if not done.written:
        for path in (partial, _sidecar(partial)):
            path.unlink()
        raise InputError(f"{source}: none of its records can be used; {listed} lists why")
    partial.replace(output)
    _sidecar(partial).unlink()
    return done.written


def _check(source: Path, reader: Reader, on_bad_record: str) -> None:
    """A first pass over the records alone: what cannot be used is found before any scoring."""
    names = reader.template.fields
    count, bad = 0, []
    for _, record in _stream(source):
        count += 1
        try:
            if record.problem:
                raise Unusable("", None, record.problem)
            for name in names:
                text(name, record.fields.get(name))
        except Unusable as error:
            bad.append(error.at(record.place))
    if not count:
        raise InputError(f"{source} holds no record: expected at least one")
    check_bad_records(str(source), bad, count, on_bad_record)


class _Done(NamedTuple):
    """How far a call has come."""

    line: int = 0
    """The last line of the input that is done."""
    size: int = 0
    """Bytes of the partial output up to there."""
    written: int = 0
    """Lines of it."""
    bad: tuple[BadRecord, ...] = ()

    def after(self, line: int, lines: Sequence[bytes], bad: Sequence[BadRecord]) -> _Done:
        size = self.size + sum(map(len, lines))
        return _Done(line, size, self.written + len(lines), (*self.bad, *bad))

    def to_json(self) -> dict[str, int]:
        return {"line": self.line, "size": self.size, "written": self.written}


def _line_number(place: str) -> int:
    return int(place.rsplit(":", 1)[1])


def _read_bad_records(path: Path) -> list[BadRecord]:
    return [BadRecord(**line) for line in read_log(path)]


NumberedRecord = tuple[int, Record]


def _stream(path: Path) -> Iterator[NumberedRecord]:
    """`(line number, record)` of every line that is not blank."""
    name = path.name.removesuffix(".gz")
    if not name.endswith(".jsonl"):
        raise InputError(f"{path}: predict reads .jsonl or .jsonl.gz")
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    return _lines(path)


def _lines(path: Path) -> Iterator[NumberedRecord]:
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        number = 0
        while True:
            try:
                line = file.readline()
            except (OSError, EOFError) as error:
                raise InputError(f"{path} is not a whole gzip file: {error}") from error
            if not line:
                return
            number += 1
            if line.strip():
                yield number, _without_clash(parse_line(f"{path.name}:{number}", line))


def _without_clash(record: Record) -> Record:
    """A field that the output would write over makes a record unusable."""
    clash = [name for name in ADDED if name in record.fields]
    if not clash:
        return record
    return Record(record.place, {}, f"has a field {clash[0]!r} of its own: rename it")


def _chunks(records: Iterator[NumberedRecord]) -> Iterator[list[NumberedRecord]]:
    while chunk := list(itertools.islice(records, CHUNK)):
        yield chunk


def _line(numbered: NumberedRecord, scored: Scored, grid: ScoreGrid) -> bytes:
    number, record = numbered
    distribution = dict(zip(grid.texts, scored.probabilities.tolist(), strict=True))
    added = dict(zip(ADDED, (scored.score, distribution, scored.mass, number), strict=True))
    return (json.dumps({**record.fields, **added}) + "\n").encode()


def _sidecar(partial: Path) -> Path:
    return partial.with_name(partial.name + ".json")


def _resume(partial: Path, listed: Path, made_with: Mapping[str, Any]) -> _Done:
    """How far the partial output goes; what a killed process wrote after that is dropped."""
    sidecar = _sidecar(partial)
    if not partial.exists():
        listed.unlink(missing_ok=True)
        write_json(sidecar, {**made_with, "done": _Done().to_json()})
        return _Done()
    before: Any = None
    with contextlib.suppress(OSError, json.JSONDecodeError):
        before = json.loads(sidecar.read_text(encoding="utf-8"))
    if not isinstance(before, dict) or {**before, "done": None} != {**made_with, "done": None}:
        raise InputError(
            f"{partial} was begun with another model, input, read-out or batch size: delete it, or "
            "give another --output"
        )
    done = _Done(**before["done"])
    if partial.stat().st_size < done.size:
        raise InputError(f"{partial} is shorter than it was: delete it, or give another --output")
    os.truncate(partial, done.size)
    bad = (
        record for record in _read_bad_records(listed) if _line_number(record.place) <= done.line
    )
    return done._replace(bad=tuple(bad))
