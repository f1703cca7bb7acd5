"""Records from files, TFDS and Python; whatever is wrong with a source is said."""

from __future__ import annotations

import csv
import gzip
import io
import json
import pathlib
import subprocess
import sys
import textwrap

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from regjax.data import Record, parse_line, read_records
from regjax.errors import InputError

ROWS = [{"a": "x, y", "b": 'he said "no"'}, {"a": "zwei\nZeilen", "b": "ü"}]


def fields(path: pathlib.Path, columns: tuple[str, ...] = ()) -> list[dict]:
    records = read_records(str(path), columns)
    assert records == read_records(path, columns)
    return [dict(record.fields) for record in records]


def csv_text(rows: list[list[str]]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer).writerows(rows)
    return buffer.getvalue()


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize(
    ("suffix", "text"),
    [
        (".jsonl", "".join(json.dumps(row) + "\n" for row in ROWS)),
        (".jsonl", "\ufeff\n" + "\r\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)),
        (".json", json.dumps(ROWS, indent=1)),
        (".csv", csv_text([["a", "b"], *(list(row.values()) for row in ROWS)])),
    ],
)
def test_the_same_records_from_every_kind_of_file(tmp_path, suffix, text, packed):
    path = tmp_path / ("rows" + suffix + (".gz" if packed else ""))
    content = text.encode()
    path.write_bytes(gzip.compress(content) if packed else content)
    assert fields(path) == ROWS


def test_places_name_file_and_line(tmp_path):
    lines = tmp_path / "train.jsonl"
    lines.write_text('{"a": 1}\n\n{"a": 2}\n[3]\n{"a": \n')
    records = read_records(str(lines))
    assert [record.place for record in records] == [f"train.jsonl:{n}" for n in (1, 3, 4, 5)]
    assert [bool(record.problem) for record in records] == [False, False, True, True]
    assert "a list" in records[2].problem and "column" in records[3].problem
    table = tmp_path / "train.csv"
    table.write_text('a,b\n"one\ntwo",3\n4,5\n6\n')
    records = read_records(str(table))
    assert [record.place for record in records] == ["train.csv:2", "train.csv:4", "train.csv:5"]
    assert records[0].fields == {"a": "one\ntwo", "b": "3"}
    assert "1 columns: expected 2" in records[2].problem


def test_a_line_by_itself():
    assert parse_line("stdin:1", '{"a": 1}') == Record("stdin:1", {"a": 1})
    assert parse_line("stdin:1", '{"a": "ü"}'.encode()) == Record("stdin:1", {"a": "ü"})
    for line in (b'{"a": "\xff"}', b"\xff", "", "[", "3", '{"a": ' + "[" * 10_000):
        record = parse_line("stdin:2", line)
        assert record.place == "stdin:2" and record.problem and not record.fields


def test_columns_by_position_ignore_the_rest(tmp_path):
    path = tmp_path / "sts.tsv"
    path.write_text('news\t2.5\the said "no\tyes\textra\nnews\t3\tno\n')
    records = read_records(str(path), ("genre", "score", "first", "second"))
    assert records[0].fields == {
        "genre": "news",
        "score": "2.5",
        "first": 'he said "no',
        "second": "yes",
    }
    assert "3 columns: expected 4" in records[1].problem


def test_a_long_csv_field_is_read_and_the_csv_limit_is_left_alone(tmp_path):
    path = tmp_path / "long.csv"
    path.write_text(csv_text([["text"], ["word " * 100_000]]))
    before = csv.field_size_limit()
    assert fields(path) == [{"text": "word " * 100_000}]
    assert csv.field_size_limit() == before


def test_records_of_python():
    assert read_records([{"a": 1}, 2]) == [
        Record("records[0]", {"a": 1}),
        Record("records[1]", {}, "is a number: expected an object with named fields"),
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", None, "no such file"),
        ("a.txt", b"x", "unknown kind of file"),
        ("a.gz", b"x", "unknown kind of file"),
        ("a.jsonl", b"", "holds no record"),
        ("a.jsonl", b"\n \n", "holds no record"),
        ("a.csv", b"a,b\n", "holds no record"),
        ("a.json", b"[]", "holds no record"),
        ("a.json", b'{"a": 1}', "holds an object: expected an array"),
        ("a.json", b"[1,", "malformed JSON"),
        ("a.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', "a.jsonl:2: byte 0xff is not UTF-8"),
        ("a.jsonl.gz", b'{"a": 1}', "not a whole gzip file"),
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}' * 99)[:-9], "not a whole gzip file"),
        ("a.csv", b"a,,c\n1,2,3\n", "empty or repeated names"),
        ("a.csv", b"a,a\n1,2\n", "empty or repeated names"),
        ("a.csv", b'a,b\n1,"2\n3,4\n', "a.csv:2: malformed CSV"),
    ],
)
def test_a_file_that_cannot_be_read(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError) as error:
        read_records(str(path))
    assert message in str(error.value) and name in str(error.value)


@pytest.mark.parametrize("spec", ["", "tfds:", "tfds:stsb", "tfds:a b:train", "tfds:x:train?dir=1"])
def test_a_spec_that_means_nothing(spec):
    with pytest.raises(InputError, match="expected"):
        read_records(spec)


def test_a_directory_is_not_a_file(tmp_path):
    (tmp_path / "a.csv").mkdir()
    with pytest.raises(InputError, match="is a directory"):
        read_records(str(tmp_path / "a.csv"))


FILES = st.sampled_from([".jsonl", ".json", ".csv", ".tsv", ".jsonl.gz"])
JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
).map(lambda value: json.dumps(value).encode())
BYTES = st.binary(max_size=60) | st.lists(
    JSON | st.sampled_from([b"\n", b'"', b",", b"{", b"}", b"\x00", b"\xff", b"\t", b"[" * 2000]),
    max_size=8,
).map(b"".join)


@settings(
    deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(suffix=FILES, content=BYTES)
def test_any_bytes_end_in_records_or_an_input_error(tmp_path, suffix, content):
    path = tmp_path / f"fuzz{suffix}"
    path.write_bytes(content)
    try:
        records = read_records(str(path))
    except InputError as error:
        assert "fuzz" in str(error)
        return
    assert records
    for record in records:
        assert not (record.problem and record.fields)
        assert record.place.startswith("fuzz")


CELL = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r"), max_size=8)


@settings(
    deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(rows=st.lists(st.tuples(CELL, CELL), min_size=1, max_size=5))
def test_what_is_written_is_read(tmp_path, rows):
    expected = [{"a": a, "b": b} for a, b in rows]
    (tmp_path / "t.csv").write_bytes(csv_text([["a", "b"], *map(list, rows)]).encode())
    assert fields(tmp_path / "t.csv") == expected
    lines = (json.dumps(row, ensure_ascii=False) for row in expected)
    (tmp_path / "t.jsonl").write_bytes("\n".join(lines).encode())
    assert fields(tmp_path / "t.jsonl") == expected


TFDS_PROGRAM = """
    import json, sys
    import numpy as np
    import tensorflow_datasets as tfds

    class Pairs(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {"first": tfds.features.Text(), "score": np.float32, "rank": np.int64}
            features = tfds.features.FeaturesDict(features)
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i in range(5):
                yield i, {"first": f"Satz {i} ü", "score": i / 2, "rank": i}

    folder = sys.argv[1]
    Pairs(data_dir=folder, file_format="array_record").download_and_prepare()
    from regjax.data import read_records
    whole = read_records(f"tfds:pairs:train?data_dir={folder}")
    part = read_records(f"tfds:pairs:1.0.0:train[1:3]?data_dir={folder}")
    assert "tensorflow" not in sys.modules
    print(json.dumps([[r.place, r.fields] for r in whole + part]))
"""


def test_tfds_without_tensorflow(tmp_path):
    """A builder made here, prepared as array_record, read where TensorFlow is never imported."""
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(TFDS_PROGRAM))
    done = subprocess.run(
        [sys.executable, str(program), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    records = json.loads(done.stdout.splitlines()[-1])
    assert len(records) == 7
    by_rank = sorted((row for _, row in records[:5]), key=lambda row: row["rank"])
    assert by_rank == [{"first": f"Satz {i} ü", "score": i / 2, "rank": i} for i in range(5)]
    assert [row for _, row in records[5:]] == [row for _, row in records[1:3]]
    assert records[0][0] == "pairs/train[0]"
    assert records[6][0] == "pairs:1.0.0/train[1:3][1]"


def test_tfds_mocked_glue():
    tfds = pytest.importorskip("tensorflow_datasets")
    with tfds.testing.mock_data(num_examples=4):
        records = read_records("tfds:glue/stsb:validation")
    assert len(records) == 4
    assert records[3].place == "glue/stsb/validation[3]"
    for record in records:
        assert set(record.fields) == {"idx", "label", "sentence1", "sentence2"}
        assert isinstance(record.fields["sentence1"], str)
        assert type(record.fields["label"]) is float and type(record.fields["idx"]) is int


def test_tfds_unknown_data_set(tmp_path):
    with pytest.raises(InputError, match=r"tfds:no_such_set:train.* cannot be read"):
        read_records(f"tfds:no_such_set:train?data_dir={tmp_path}")
