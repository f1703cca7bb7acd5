"""Scores for every record of a file, streamed; a stopped run goes on where it was."""

from __future__ import annotations

import contextlib
import gzip
import itertools
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from regjax import compilation
from regjax.data import BadRecord, Record, parse_line, write_bad_records
from regjax.data.bad_records import check_bad_records
from regjax.errors import InputError
from regjax.log import progress, read_log
from regjax.reader import Reader, Scored
from regjax.scores import ScoreGrid

CHUNK = 1024
"""Records read, scored and written at a time."""


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
      InputError: missing or malformed input, records that cannot be used (unless `on_bad_record` is
        `skip`: then they are listed in `OUTPUT.bad_records.jsonl`), an output that exists, a partial
        output of another call.
    """
    compilation.enable_cache()
    source, output = Path(source), Path(output)
    if output.exists() and not overwrite:
        raise InputError(f"{output} exists already: give another --output, or --overwrite")
    if not output.parent.is_dir():
        raise InputError(f"{output.parent} is no folder: make it, or give another --output")
    records = _stream(source)
    if on_bad_record == "stop":
        # A first pass over the lines alone: a malformed one is found before any scoring.
        check_bad_records(str(source), *_malformed(_stream(source)), policy="stop")
    reader = model if isinstance(model, Reader) else Reader.load(model, read_out=read_out)
    made_with = {
        "model": None if isinstance(model, Reader) else str(Path(model).resolve()),
        "input": str(source.resolve()),
        "bytes": source.stat().st_size,
        "read_out": reader.read_out,
    }
    partial = output.with_name(output.name + ".partial")
    done, written = _resume(partial, made_with)
    listed = output.with_name(output.name + ".bad_records.jsonl")
    bad = [record for record in _read_bad_records(listed) if _line_number(record.place) <= done]
    with progress("predict", total=None, done=written) as advance, partial.open("a") as file:
        for chunk in _chunks(pair for pair in records if pair[0] > done):
            scored, unusable = reader.score_records([record for _, record in chunk], batch_size)
            check_bad_records(str(source), unusable, len(chunk) + 1, on_bad_record)
            if unusable:
                bad += unusable
                write_bad_records(listed, bad)
            lines = [_line(chunk[index], scored[index], reader.grid) for index in sorted(scored)]
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())
            written += len(lines)
            advance(len(lines))
    partial.replace(output)
    _sidecar(partial).unlink()
    return written


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
                yield number, parse_line(f"{path.name}:{number}", line)


def _malformed(records: Iterator[NumberedRecord]) -> tuple[list[BadRecord], int]:
    count, bad = 0, []
    for _, record in records:
        count += 1
        if record.problem:
            bad.append(BadRecord(record.place, "", "", record.problem))
    return bad, count


def _chunks(records: Iterator[NumberedRecord]) -> Iterator[list[NumberedRecord]]:
    while chunk := list(itertools.islice(records, CHUNK)):
        yield chunk


def _line(numbered: NumberedRecord, scored: Scored, grid: ScoreGrid) -> str:
    number, record = numbered
    added = {
        "predicted_score": scored.score,
        "distribution": dict(zip(grid.texts, scored.probabilities.tolist(), strict=True)),
        "grid_mass": scored.mass,
        "line": number,
    }
    return json.dumps({**record.fields, **added}) + "\n"


def _sidecar(partial: Path) -> Path:
    return partial.with_name(partial.name + ".json")


def _resume(partial: Path, made_with: Mapping[str, Any]) -> tuple[int, int]:
    """`(last input line done, lines written)`; a line cut off by a killed process is dropped."""
    sidecar = _sidecar(partial)
    if partial.exists():
        before: Any = None
        with contextlib.suppress(OSError, json.JSONDecodeError):
            before = json.loads(sidecar.read_text())
        if before != dict(made_with):
            raise InputError(
                f"{partial} was begun with another model, input or read-out: delete it, or give "
                "another --output"
            )
        content = partial.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            with partial.open("r+b") as file:
                file.truncate(len(whole))
        lines = whole.splitlines()
        return (json.loads(lines[-1])["line"], len(lines)) if lines else (0, 0)
    sidecar.write_text(json.dumps(dict(made_with)))
    return 0, 0
