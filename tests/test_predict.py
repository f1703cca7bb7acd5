"""Prediction: every record comes back with its score, whole or not at all, however often it is stopped."""

import dataclasses
import gzip
import json
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import regjax
from regjax import InputError, Reader
from regjax.data import rated_texts
from regjax.log import read_log
from tests.small_experiment import experiment

predict = import_module("regjax.predict")
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def reader(trained):
    return Reader.load(trained)


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_scores_are_those_of_training_time(trained, tmp_path):
    source = write(tmp_path / "in.jsonl", experiment.data.test)
    assert regjax.predict(trained, source, tmp_path / "out.jsonl") == 40
    at_training = lines_of(trained / "second" / "predictions_test.jsonl")
    for number, (line, record, before) in enumerate(
        zip(lines_of(tmp_path / "out.jsonl"), experiment.data.test, at_training, strict=True), 1
    ):
        assert {name: line[name] for name in record} == record
        assert set(line) == {*record, "predicted_score", "distribution", "grid_mass", "line"}
        assert line["line"] == number and line["id"] == before["id"]
        probabilities = np.array(list(line["distribution"].values()))
        expected = np.array(list(before["distribution"].values()))
        np.testing.assert_allclose(probabilities, expected, rtol=1e-5)
        assert list(line["distribution"]) == ["1", "2", "3", "4", "5"]
        assert line["predicted_score"] == pytest.approx(before["mean"], rel=1e-5)
        assert line["predicted_score"] == pytest.approx(probabilities @ [1, 2, 3, 4, 5], rel=1e-6)
        assert line["grid_mass"] == pytest.approx(probabilities.sum(), rel=1e-12)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_read_outs_and_stages(trained, tmp_path):
    source = write(tmp_path / "in.jsonl", experiment.data.test)
    regjax.predict(trained / "first" / "model", source, tmp_path / "mode.jsonl")
    at_training = lines_of(trained / "first" / "predictions_test.jsonl")
    found = lines_of(tmp_path / "mode.jsonl")
    assert [line["predicted_score"] for line in found] == [line["mode"] for line in at_training]
    regjax.predict(trained, source, tmp_path / "median.jsonl", read_out="median")
    medians = [line["median"] for line in lines_of(trained / "second" / "predictions_test.jsonl")]
    assert [line["predicted_score"] for line in lines_of(tmp_path / "median.jsonl")] == medians
    with pytest.raises(InputError, match="unknown read-out 'best'; known: mean"):
        regjax.predict(trained, source, tmp_path / "x.jsonl", read_out="best")


def test_gzip_blank_lines_and_line_numbers(reader, tmp_path):
    records = rated_texts(5, seed=9)
    text = "\n\n".join(json.dumps(record) for record in records)
    with gzip.open(tmp_path / "in.jsonl.gz", "wt") as file:
        file.write(text)
    regjax.predict(reader, tmp_path / "in.jsonl.gz", tmp_path / "out.jsonl")
    found = lines_of(tmp_path / "out.jsonl")
    assert [line["line"] for line in found] == [1, 3, 5, 7, 9]
    scores = [one.score for one in reader(records)]
    np.testing.assert_allclose([line["predicted_score"] for line in found], scores, rtol=1e-5)
    whole = (tmp_path / "in.jsonl.gz").read_bytes()
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"cut\.jsonl\.gz is not a whole gzip file"):
        regjax.predict(reader, tmp_path / "cut.jsonl.gz", tmp_path / "cut.jsonl")
    assert not (tmp_path / "cut.jsonl").exists()


def test_existing_output_is_kept_unless_asked(reader, tmp_path):
    source = write(tmp_path / "in.jsonl", rated_texts(3))
    output = tmp_path / "out.jsonl"
    output.write_text("mine\n")
    with pytest.raises(InputError, match=r"out\.jsonl exists already"):
        regjax.predict(reader, source, output)
    assert output.read_text() == "mine\n"
    assert regjax.predict(reader, source, output, overwrite=True) == 3
    assert len(lines_of(output)) == 3
    with pytest.raises(InputError, match="is no folder"):
        regjax.predict(reader, source, tmp_path / "none" / "out.jsonl")


BAD = {
    "not json": ('{"text": "a"', r"in\.jsonl:2: malformed JSON"),
    "a list": ("[1, 2]", r"in\.jsonl:2: is a list"),
    "missing": ('{"id": 3}', r"in\.jsonl:2: .*field 'text' is missing"),
    "empty": ('{"text": "  "}', r"in\.jsonl:2: text = .*is empty"),
    "not text": ('{"text": {"a": 1}}', r"in\.jsonl:2: text = .*neither text nor a number"),
    "clash": ('{"text": "a", "line": 7}', r"in\.jsonl:2: has a field 'line' of its own: rename it"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_records_stop_before_scoring_or_are_skipped(reader, tmp_path, name, monkeypatch):
    line, message = BAD[name]
    good = [json.dumps(record) for record in rated_texts(2)]
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join([good[0], line, good[1]]) + "\n")
    with monkeypatch.context() as patch:
        patch.setattr(Reader, "score_records", None)
        with pytest.raises(InputError, match=message):
            regjax.predict(reader, source, output)
    assert list(tmp_path.iterdir()) == [source]
    assert regjax.predict(reader, source, output, on_bad_record="skip") == 2
    assert [line["line"] for line in lines_of(output)] == [1, 3]
    (listed,) = read_log(tmp_path / "out.jsonl.bad_records.jsonl")
    assert listed["place"] == "in.jsonl:2"


def test_nothing_usable_leaves_no_output(reader, tmp_path):
    source = write(tmp_path / "in.jsonl", [{"other": 1}] * 3)
    for policy in ("stop", "skip"):
        with pytest.raises(InputError, match="3 of 3 records cannot be used"):
            regjax.predict(reader, source, tmp_path / "out.jsonl", on_bad_record=policy)
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(InputError, match="holds no record"):
        regjax.predict(reader, tmp_path / "empty.jsonl", tmp_path / "out.jsonl")
    long = write(tmp_path / "long.jsonl", [{"text": "a " * 500}])
    with pytest.raises(InputError, match="none of its records can be used"):
        regjax.predict(reader, long, tmp_path / "out.jsonl", on_bad_record="skip")
    assert not (tmp_path / "out.jsonl").exists()
    assert not (tmp_path / "out.jsonl.partial").exists()


def stopped_after(chunks, monkeypatch, reader):
    """A reader that fails after so many chunks."""
    score, count = Reader.score_records, iter(range(100))

    def limited(self, records, batch_size=64):
        if next(count) >= chunks:
            raise KeyboardInterrupt
        return score(self, records, batch_size)

    monkeypatch.setattr(Reader, "score_records", limited)
    return reader


@pytest.mark.parametrize("left", [b"", b'{"text": "cut off', b'{"text": "whole", "line": 99}\n'])
def test_a_stopped_prediction_goes_on(reader, tmp_path, monkeypatch, left):
    monkeypatch.setattr(predict, "CHUNK", 4)
    records = rated_texts(19, seed=5)
    records[2] = {"text": ""}
    records[9] = {"text": ""}
    source = write(tmp_path / "in.jsonl", records)
    whole, output = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    regjax.predict(reader, source, whole, on_bad_record="skip")
    with monkeypatch.context() as patch:
        stopped_after(3, patch, reader)
        with pytest.raises(KeyboardInterrupt):
            regjax.predict(reader, source, output, on_bad_record="skip")
    assert not output.exists()
    partial = tmp_path / "out.jsonl.partial"
    assert len(lines_of(partial)) == 10
    with partial.open("ab") as file:
        file.write(left)
    other = dataclasses.replace(reader, read_out="median")
    with pytest.raises(InputError, match="begun with another model, input, read-out"):
        regjax.predict(other, source, output, on_bad_record="skip")
    calls = []
    score = Reader.score_records
    monkeypatch.setattr(Reader, "score_records", lambda *a: calls.append(len(a[1])) or score(*a))
    assert regjax.predict(reader, source, output, on_bad_record="skip") == 17
    assert calls == [4, 3]
    assert output.read_bytes() == whole.read_bytes()
    listed = [tmp_path / f"{name}.jsonl.bad_records.jsonl" for name in ("out", "whole")]
    assert listed[0].read_bytes() == listed[1].read_bytes()
    assert not partial.exists()


def test_a_killed_prediction_goes_on(trained, tmp_path):
    source = write(tmp_path / "in.jsonl", rated_texts(2500, seed=6))
    call = [
        sys.executable,
        "-m",
        "regjax",
        "predict",
        "--model",
        str(trained),
        "--input",
        str(source),
    ]
    whole, output = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"

    def start(path):
        return subprocess.Popen([*call, "--output", str(path)], cwd=ROOT, stdout=subprocess.DEVNULL)

    assert start(whole).wait(timeout=100) == 0
    process, partial = start(output), tmp_path / "out.jsonl.partial"
    while process.poll() is None and not (partial.exists() and partial.stat().st_size):
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL and not output.exists()
    assert start(output).wait(timeout=100) == 0
    assert output.read_bytes() == whole.read_bytes()
    assert len(lines_of(output)) == 2500


# A reader from Python, and what export writes


def test_a_reader_scores_records(reader):
    scored = reader(
        [{"text": "The lamp: its price is superb."}, {"text": "The lamp: its price is awful."}]
    )
    for one in scored:
        assert one.probabilities.shape == (5,)
        assert one.score == pytest.approx(one.probabilities @ np.arange(1, 6), rel=1e-6)
        assert 0 < one.mass <= 1 + 1e-6
    with pytest.raises(InputError, match=r"records\[1\]: .*field 'text' is missing"):
        reader([{"text": "a"}, {"txt": "b"}])
    assert reader([]) == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_exported_model_is_read_by_transformers(trained, tmp_path, dtype):
    torch = pytest.importorskip("torch")
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = regjax.export(trained, tmp_path / "exported", dtype=dtype)
    with safe_open(folder / "model.safetensors", "np") as file:
        kinds = {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    assert kinds == {{"float32": "F32", "bfloat16": "BF16"}[dtype]}
    record = experiment.data.test[0]
    (ours,) = Reader.load(folder)([record])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = experiment.template.skeleton(None).render({"text": record["text"]}).text
    with torch.no_grad():
        logits = model(**tokenizer(text, return_tensors="pt")).logits[0, -1]
    digits = [tokenizer.convert_tokens_to_ids(str(score)) for score in range(1, 6)]
    theirs = torch.softmax(logits, -1)[digits].numpy()
    np.testing.assert_allclose(ours.probabilities, theirs, rtol=2e-4)
    (trained_with,) = Reader.load(trained)([record])
    tolerance = 1e-6 if dtype == "float32" else 0.05
    np.testing.assert_allclose(ours.probabilities, trained_with.probabilities, rtol=tolerance)
    with pytest.raises(InputError, match="exists already"):
        regjax.export(trained, folder)


def test_a_damaged_reader_file_is_named(trained, tmp_path):
    folder = regjax.export(trained, tmp_path / "exported")
    (folder / "regjax.json").write_text('{"template": 3')
    with pytest.raises(InputError, match=r"regjax\.json is damaged"):
        Reader.load(folder)
    with pytest.raises(InputError, match="is no model of ours"):
        Reader.load(tmp_path)


# Whatever the input holds

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2)
    ),
    max_leaves=4,
)
RECORDS = st.dictionaries(st.sampled_from(["text", "id", "line", "x"]), VALUES, max_size=3)
LINES = st.one_of(
    RECORDS.map(lambda record: json.dumps(record).encode()),
    st.binary(max_size=12).filter(lambda line: b"\n" not in line),
    st.just(b'{"text": "fine"}'),
)


@settings(
    deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(lines=st.lists(LINES, max_size=5), policy=st.sampled_from(["stop", "skip"]))
def test_any_input_is_scored_or_named(reader, tmp_path, lines, policy):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    for path in tmp_path.iterdir():
        path.unlink()
    source.write_bytes(b"\n".join(lines))
    try:
        count = regjax.predict(reader, source, output, on_bad_record=policy)
    except InputError as error:
        assert str(source) in str(error)
        assert not output.exists()
    else:
        found = lines_of(output)
        assert len(found) == count > 0
        listed = read_log(tmp_path / "out.jsonl.bad_records.jsonl")
        assert policy == "skip" or not listed
        assert count + len(listed) == sum(1 for line in lines if line.strip())
