"""Scores for every record of a file, streamed; a stopped run goes on where it was, alone or of several."""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import heapq
import itertools
import json
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
from jax.experimental import multihost_utils

from regjax import compilation, preemption
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

    The processes of a job (`regjax launch`) deal the records out, `CHUNK` at a time; each writes a partial
    output of its own beside the output, which all have to see, and process 0 merges them in the order of
    the input. It returns the number of all lines, the others that of their own.

    Raises:
      InputError: missing or malformed input, records that cannot be used or have a field of one of
        those names (unless `on_bad_record` is `skip`: then they are listed in
        `OUTPUT.bad_records.jsonl`), an output that exists, a partial output of another call or of
        another number of processes.
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
    share = _Share(output, jax.process_index(), jax.process_count())
    share.check_others()
    partial, listed = share.partial, share.listed
    done = _resume(partial, listed, made_with)
    if share.count > 1:
        preemption.end_at_once()
        # Process 0 could merge what an earlier call has finished before another has looked at its part.
        multihost_utils.sync_global_devices("predict")
    with progress("predict", None, done.written) as advance, partial.open("ab") as file:
        for number, chunk in enumerate(_chunks(records)):
            if number % share.count != share.index or chunk[-1][0] <= done.line:
                continue
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
    complete, written = partial, done.written
    if share.count > 1:
        finished = {**made_with, "done": {**done.to_json(), "finished": True}}
        write_json(_sidecar(partial), finished)
        if share.index:
            return written
        complete, written = share.merge(made_with)
    if written:
        complete.replace(output)
    for path in share.leftovers():
        path.unlink(missing_ok=True)
    if not written:
        raise InputError(f"{source}: none of its records can be used; {share.all_listed} lists why")
    return written


@dataclasses.dataclass(frozen=True)
class _Share:
    """The part of a process in an output, and its files."""

    output: Path
    index: int
    count: int

    @property
    def partial(self) -> Path:
        return self._partial(self.index)

    @property
    def listed(self) -> Path:
        """The bad records of this process."""
        return self.all_listed if self.count == 1 else _beside(self.partial, ".bad_records.jsonl")

    @property
    def all_listed(self) -> Path:
        return _beside(self.output, ".bad_records.jsonl")

    def check_others(self) -> None:
        """Raises `InputError` where another number of processes has begun the output."""
        pattern = re.compile(re.escape(self.output.name) + r"\.partial(?:-\d+-of-(\d+))?")
        for path in self.output.parent.iterdir():
            found = pattern.fullmatch(path.name)
            if found and (begun := int(found[1] or 1)) != self.count:
                raise InputError(
                    f"{path} was begun by {begun} processes, now there are {self.count}: go on with as "
                    "many, delete it, or give another --output"
                )

    def merge(self, made_with: Mapping[str, Any]) -> tuple[Path, int]:
        """A file of the lines of all processes, once they are done, and how many these are."""
        partials = [self._partial(index) for index in range(self.count)]
        while not all(_is_finished(path, made_with) for path in partials):
            # The launcher ends this process if another dies.
            time.sleep(0.1)
        merged = _beside(self.output, ".partial.merged")
        written = 0
        with contextlib.ExitStack() as stack, merged.open("wb") as file:
            sources = [stack.enter_context(path.open("rb")) for path in partials]
            for line in heapq.merge(*sources, key=lambda line: json.loads(line)["line"]):
                file.write(line)
                written += 1
            file.flush()
            os.fsync(file.fileno())
        bad = [
            record
            for path in partials
            for record in _read_bad_records(_beside(path, ".bad_records.jsonl"))
        ]
        if bad:
            bad.sort(key=lambda record: _line_number(record.place))
            write_bad_records(self.all_listed, bad)
        return merged, written

    def leftovers(self) -> list[Path]:
        """What is not needed any more once the output has its name."""
        partials = [self._partial(index) for index in range(self.count)]
        listed = [_beside(p, ".bad_records.jsonl") for p in partials if self.count > 1]
        return [
            *partials,
            *listed,
            *map(_sidecar, partials),
            _beside(self.output, ".partial.merged"),
        ]

    def _partial(self, index: int) -> Path:
        of = f"-{index}-of-{self.count}" if self.count > 1 else ""
        return _beside(self.output, f".partial{of}")


def _is_finished(partial: Path, made_with: Mapping[str, Any]) -> bool:
    try:
        found = json.loads(_sidecar(partial).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return False
    return {**found, "done": 0} == {**made_with, "done": 0} and "finished" in found["done"]


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


def _beside(path: Path, ending: str) -> Path:
    return path.with_name(path.name + ending)


def _sidecar(partial: Path) -> Path:
    return _beside(partial, ".json")


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
    done = _Done(**{name: before["done"][name] for name in ("line", "size", "written")})
    if partial.stat().st_size < done.size:
        raise InputError(f"{partial} is shorter than it was: delete it, or give another --output")
    os.truncate(partial, done.size)
    bad = (
        record for record in _read_bad_records(listed) if _line_number(record.place) <= done.line
    )
    return done._replace(bad=tuple(bad))
