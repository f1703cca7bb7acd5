"""Records from files, TFDS and Python, each with the place it came from."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import pathlib
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from regjax.errors import InputError

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv")


class Record(NamedTuple):
    """One record of a source, or what made it unreadable."""

    place: str  # "train.jsonl:12", "stsb/train[12]", "records[3]"
    fields: Mapping[str, Any]
    problem: str = ""  # non-empty: the record could not be parsed, `fields` is empty


def read_records(
    source: str | os.PathLike[str] | Sequence[Mapping[str, Any]], columns: Sequence[str] = ()
) -> list[Record]:
    """Every record of `source`, in its order, as `Record`s.

    JSONL: an object per line, blank lines separate nothing. JSON: an array of objects. CSV: RFC
    4180 quoting. TSV: tabs separate, quotes are text (the GLUE files' convention). The first line
    names the fields unless `columns` does; then extra columns are ignored. TFDS: read by
    `tfds.data_source` without TensorFlow, bytes decoded as UTF-8.

    A line that cannot be parsed comes back with `problem` set, so that the caller decides between
    stopping and skipping.

    Raises:
        InputError: no such file, a directory, an unknown suffix, a `.gz` that is not, text that is
            not UTF-8, a header without names, an unknown TFDS data set, or no record at all.

    >>> read_records([{"text": "fine", "score": 4}])
    [Record(place='records[0]', fields={'text': 'fine', 'score': 4}, problem='')]
    """
    if isinstance(source, os.PathLike):
        source = os.fspath(source)
    if not isinstance(source, str):
        records = [_checked(f"records[{i}]", record) for i, record in enumerate(source)]
        name = "the sequence of records"
    elif not source:
        raise InputError("no source given: expected a path or tfds:NAME:SPLIT")
    elif source.startswith("tfds:"):
        name, records = source, _read_tfds(source)
    else:
        name, records = source, _read_file(pathlib.Path(source).expanduser(), columns)
    if not records:
        raise InputError(f"{name} holds no record: expected at least one")
    return records


def _checked(place: str, value: Any) -> Record:
    if isinstance(value, Mapping):
        return Record(place, value)
    return Record(place, {}, f"is {_kind(value)}: expected an object with named fields")


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true/false", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else "not an object")


def _read_file(path: pathlib.Path, columns: Sequence[str]) -> list[Record]:
    stem = path.with_suffix("") if path.suffix.lower() == ".gz" else path
    suffix = stem.suffix.lower()
    if suffix not in SUFFIXES:
        raise InputError(
            f"{path}: unknown kind of file, expected {', '.join(SUFFIXES)} or .gz of one"
        )
    text = _read_text(path)
    if suffix == ".jsonl":
        return list(_json_lines(path.name, text))
    if suffix == ".json":
        return _json_array(path, text)
    return list(_table(path, text, suffix, columns))


def _read_text(path: pathlib.Path) -> str:
    if path.is_dir():
        raise InputError(f"{path} is a directory: expected a file")
    try:
        content = path.read_bytes()
        if path.suffix.lower() == ".gz":
            content = gzip.decompress(content)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path} is not a whole gzip file: {error}") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        byte = content[error.start]
        raise InputError(
            f"{path}:{line}: byte 0x{byte:02x} is not UTF-8; convert the file to UTF-8"
        ) from error


def _parse_json(text: str) -> tuple[Any, str]:
    try:
        return json.loads(text), ""
    except json.JSONDecodeError as error:
        return None, f"malformed JSON: {error.msg} at column {error.colno}"
    except (ValueError, RecursionError) as error:
        return None, f"malformed JSON: {error}"


def _json_lines(name: str, text: str) -> Iterator[Record]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        yield parse_line(f"{name}:{number}", line)


def parse_line(place: str, line: str | bytes) -> Record:
    """The record of one line of JSONL."""
    try:
        text = line.decode("utf-8-sig") if isinstance(line, bytes) else line
    except UnicodeDecodeError as error:
        return Record(place, {}, f"byte 0x{line[error.start]:02x} is not UTF-8")
    value, problem = _parse_json(text)
    return Record(place, {}, problem) if problem else _checked(place, value)


def _json_array(path: pathlib.Path, text: str) -> list[Record]:
    value, problem = _parse_json(text)
    if problem:
        raise InputError(f"{path}: {problem}")
    if not isinstance(value, list):
        raise InputError(
            f"{path} holds {_kind(value)}: expected an array of objects, or one a line in .jsonl"
        )
    return [_checked(f"{path.name}[{i}]", item) for i, item in enumerate(value)]


def _table(path: pathlib.Path, text: str, suffix: str, columns: Sequence[str]) -> Iterator[Record]:
    names = list(columns)
    for number, row in _rows(path, text, suffix):
        if not row or row == [""]:
            continue
        if not names:
            names = [name.strip() for name in row]
            if len(set(names)) != len(names) or not all(names):
                raise InputError(
                    f"{path}:{number}: the header {names} has empty or repeated names; "
                    "for a file without a header, name its columns"
                )
            continue
        place = f"{path.name}:{number}"
        if len(row) < len(names) or (len(row) > len(names) and not columns):
            yield Record(place, {}, f"has {len(row)} columns: expected {len(names)}, {names}")
        else:
            yield Record(place, dict(zip(names, row, strict=False)))


def _rows(path: pathlib.Path, text: str, suffix: str) -> Iterator[tuple[int, list[str]]]:
    """Line number where each row starts, and its columns."""
    if suffix == ".tsv":
        for number, line in enumerate(text.split("\n"), start=1):
            yield number, line.removesuffix("\r").split("\t")
        return
    # The csv module's limit on one field is global to the process: raised while this file is read.
    limit = csv.field_size_limit(2**31 - 1)
    rows, start = [], 1
    try:
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        for row in reader:
            rows.append((start, row))
            start = reader.line_num + 1
    except csv.Error as error:
        raise InputError(f"{path}:{start}: malformed CSV: {error}") from error
    finally:
        csv.field_size_limit(limit)
    yield from rows


TFDS_SPEC = re.compile(
    r"tfds:(?P<name>[\w/.+-]+(?::\d+\.\d+\.\d+)?):(?P<split>[^?]+)(?:\?data_dir=(?P<data_dir>.+))?"
)


def _read_tfds(spec: str) -> list[Record]:
    match = TFDS_SPEC.fullmatch(spec)
    if match is None:
        raise InputError(f"{spec}: expected tfds:NAME[/CONFIG][:VERSION]:SPLIT[?data_dir=PATH]")
    name, split, data_dir = match["name"], match["split"], match["data_dir"]
    import tensorflow_datasets as tfds

    if name.split("/")[0] == "glue":
        import tensorflow_datasets.text.glue
    try:
        rows = tfds.data_source(name, split=split, data_dir=data_dir)
        return [
            Record(f"{name}/{split}[{i}]", {key: _plain(value) for key, value in rows[i].items()})
            for i in range(len(rows))
        ]
    except UnicodeDecodeError as error:
        raise InputError(f"{spec}: text that is not UTF-8: {error}") from error
    except Exception as error:  # TFDS raises many kinds; each means that this spec cannot be read
        raise InputError(f"{spec} cannot be read: {type(error).__name__}: {error}") from error


def _plain(value: Any) -> Any:
    """TFDS's bytes as text, its NumPy scalars as Python's."""
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, np.generic) or (isinstance(value, np.ndarray) and value.ndim == 0):
        return _plain(value.item())
    return value
