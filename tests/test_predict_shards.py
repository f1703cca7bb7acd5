"""Prediction by several processes: the records of one call, in their order, however often it is stopped."""

import json
import os
import re
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

from regjax import InputError, Reader
from regjax.data import rated_texts
from regjax.log import read_log
from tests.test_predict import lines_of, write

predict = import_module("regjax.predict")
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def reader(trained):
    return Reader.load(trained)


@pytest.fixture
def process(monkeypatch):
    """Makes this process one of several, whose others have met it or will."""
    monkeypatch.setattr(predict, "CHUNK", 4)
    monkeypatch.setattr("jax.experimental.multihost_utils.sync_global_devices", lambda name: None)
    monkeypatch.setattr("regjax.preemption.end_at_once", lambda: None)

    def become(index, count):
        monkeypatch.setattr("jax.process_index", lambda: index)
        monkeypatch.setattr("jax.process_count", lambda: count)

    return become


def assert_same_records(found, expected):
    assert [
        {**line, "predicted_score": 0, "distribution": list(line["distribution"]), "grid_mass": 0}
        for line in found
    ] == [
        {**line, "predicted_score": 0, "distribution": list(line["distribution"]), "grid_mass": 0}
        for line in expected
    ]
    for name in ("predicted_score", "grid_mass"):
        values = [[line[name] for line in lines] for lines in (found, expected)]
        np.testing.assert_allclose(*values, rtol=1e-5)
    for ours, theirs in zip(found, expected, strict=True):
        values = [list(line["distribution"].values()) for line in (ours, theirs)]
        np.testing.assert_allclose(*values, rtol=1e-5)


@pytest.mark.parametrize("count", [2, 3, 7])
def test_shares_are_merged_in_the_order_of_the_input(reader, tmp_path, process, count):
    records = rated_texts(23, seed=5)
    for index in (2, 9, 10, 19):
        records[index] = {"text": ""}
    source = write(tmp_path / "in.jsonl", records)
    whole, output = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    assert predict.predict(reader, source, whole, on_bad_record="skip") == 19
    written = []
    for index in (*range(1, count), 0):
        process(index, count)
        written.append(predict.predict(reader, source, output, on_bad_record="skip"))
    assert written[-1] == 19
    # Chunks of 4, dealt out in turn; the last has 3.
    chunks = [
        sum(i not in (2, 9, 10, 19) for i in range(c, min(c + 4, 23))) for c in range(0, 23, 4)
    ]
    assert written[:-1] == [sum(chunks[index::count]) for index in range(1, count)]
    assert_same_records(lines_of(output), lines_of(whole))
    listed = [read_log(tmp_path / f"{name}.jsonl.bad_records.jsonl") for name in ("out", "whole")]
    assert listed[0] == listed[1] and len(listed[0]) == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "in.jsonl", "out.jsonl", "out.jsonl.bad_records.jsonl",
        "whole.jsonl", "whole.jsonl.bad_records.jsonl",
    ]  # fmt: skip


def test_what_was_done_is_not_done_again(reader, tmp_path, process, monkeypatch):
    source = write(tmp_path / "in.jsonl", rated_texts(24, seed=5))
    output = tmp_path / "out.jsonl"
    process(1, 2)
    assert predict.predict(reader, source, output) == 12
    calls, score = [], Reader.score_records

    def stopped(self, records, *arguments):
        calls.append([record.place for record in records])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return score(self, records, *arguments)

    monkeypatch.setattr(Reader, "score_records", stopped)
    process(0, 2)
    with pytest.raises(KeyboardInterrupt):
        predict.predict(reader, source, output)
    # A merge that was killed leaves this.
    (tmp_path / "out.jsonl.partial.merged").write_text('{"line": 1}\n{"li')
    process(1, 2)
    assert predict.predict(reader, source, output) == 12
    process(0, 2)
    assert predict.predict(reader, source, output) == 24
    places = [[f"in.jsonl:{line}" for line in range(first, first + 4)] for first in (1, 9, 17, 17)]
    assert calls == places
    assert [line["line"] for line in lines_of(output)] == list(range(1, 25))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_another_number_of_processes_is_refused(reader, tmp_path, process):
    source = write(tmp_path / "in.jsonl", rated_texts(8))
    output = tmp_path / "out.jsonl"
    process(1, 2)
    predict.predict(reader, source, output)
    for count in (1, 3):
        process(0, count)
        with pytest.raises(InputError, match=rf"begun by 2 processes, now there are {count}"):
            predict.predict(reader, source, output)
    for path in tmp_path.glob("out.jsonl.partial*"):
        path.unlink()
    (tmp_path / "out.jsonl.partial").touch()
    process(0, 2)
    with pytest.raises(InputError, match="begun by 1 processes, now there are 2"):
        predict.predict(reader, source, output)


def test_a_share_of_another_call_is_not_merged(reader, tmp_path, process, monkeypatch):
    source = write(tmp_path / "in.jsonl", rated_texts(8))
    output = tmp_path / "out.jsonl"
    process(1, 2)
    predict.predict(reader, source, output)
    waited = []

    def sleep(seconds):
        waited.append(seconds)
        raise TimeoutError

    monkeypatch.setattr("time.sleep", sleep)
    process(0, 2)
    with pytest.raises(TimeoutError):
        predict.predict(reader, source, output, batch_size=5)
    assert waited and not output.exists()


def test_nothing_usable_is_said_once(reader, tmp_path, process):
    source = write(tmp_path / "in.jsonl", [{"text": "a " * 500}] * 8)
    process(1, 2)
    assert predict.predict(reader, source, tmp_path / "out.jsonl", on_bad_record="skip") == 0
    process(0, 2)
    with pytest.raises(InputError, match="none of its records can be used"):
        predict.predict(reader, source, tmp_path / "out.jsonl", on_bad_record="skip")
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["in.jsonl", "out.jsonl.bad_records.jsonl"]
    assert len(read_log(tmp_path / "out.jsonl.bad_records.jsonl")) == 8


def test_two_processes_one_of_them_killed(trained, reader, tmp_path):
    """With the launcher and jax's own processes, of two devices each."""
    source = write(tmp_path / "in.jsonl", rated_texts(5000, seed=6))
    whole, output = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    predict.predict(reader, source, whole)
    arguments = ["--model", str(trained), "--input", str(source), "--output", str(output)]
    launcher = subprocess.Popen(
        [sys.executable, "-m", "regjax", "launch", "--local", "2", "--", "predict", *arguments],
        env={**os.environ, "JAX_NUM_CPU_DEVICES": "2"},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    mine = tmp_path / "out.jsonl.partial-1-of-2"
    while launcher.poll() is None and not (mine.exists() and mine.stat().st_size):
        time.sleep(0.001)
    found = subprocess.run(
        ["pgrep", "-P", str(launcher.pid), "-f", "predict"], capture_output=True, text=True
    )
    victim = found.stdout.split()[1]
    subprocess.run(["kill", "-9", victim], check=True)
    out, err = launcher.communicate(timeout=200)
    assert launcher.returncode == 0, err
    assert "was ended by SIGKILL; all start again" in err
    assert len(re.findall(r"^\[\d\] \d+ records scored: .*$", out, flags=re.MULTILINE)) == 1
    assert f"[0] 5000 records scored: {output}\n" in out
    assert_same_records(lines_of(output), lines_of(whole))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "in.jsonl", "out.jsonl", "whole.jsonl"
    ]  # fmt: skip
    assert json.loads(output.read_text().splitlines()[-1])["line"] == 5000
