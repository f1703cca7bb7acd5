"""The log: whole lines after any kill, and numbers to the sinks that were asked for."""

import json
import sys
import types

import pytest

from regjax import InputError
from regjax.log import Log, print_table, progress, read_log


def test_lines_come_back(tmp_path):
    log = Log(tmp_path)
    log.write("a", 1, {"loss": 0.1 + 0.2})
    log.write("a", 2, {"not_finite": True, "record_ids": ["x", "é"]})
    assert read_log(log.path) == [
        {"stage": "a", "step": 1, "loss": 0.1 + 0.2},
        {"stage": "a", "step": 2, "not_finite": True, "record_ids": ["x", "é"]},
    ]
    assert read_log(tmp_path / "none.jsonl") == []


@pytest.mark.parametrize("cut", ['{"stage": "a", "st', "12", '"a', "\ufffd"])
def test_rewinding_drops_later_and_cut_lines(tmp_path, cut):
    log = Log(tmp_path)
    for stage, step in [("a", 1), ("a", 2), ("b", 1), ("b", 2), ("b", 3)]:
        log.write(stage, step, {"loss": float(step)})
    with log.path.open("a") as file:
        file.write(cut)
    log.rewind("b", 1)
    log.write("b", 2, {"loss": 2.0})
    found = [(line["stage"], line["step"]) for line in read_log(log.path)]
    assert found == [("a", 1), ("a", 2), ("b", 1), ("b", 2)]
    assert all(isinstance(json.loads(line), dict) for line in log.path.read_text().splitlines())


def test_rewinding_nothing_is_nothing(tmp_path):
    log = Log(tmp_path)
    log.rewind("a", 0)
    assert not log.path.exists()


@pytest.mark.parametrize(("name", "module"), [("tensorboard", "tensorboardX"), ("wandb", "wandb")])
def test_a_sink_without_its_package_names_the_extra(tmp_path, monkeypatch, name, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=rf"pip install 'regjax\[{name}\]'"):
        Log(tmp_path, (name,))


def test_unknown_sink(tmp_path):
    with pytest.raises(InputError, match="unknown logger 'mlflow'; known: tensorboard, wandb"):
        Log(tmp_path, ("mlflow",))


def test_tensorboard_receives_numbers(tmp_path, monkeypatch):
    received = []

    class Writer:
        def __init__(self, folder):
            received.append(folder)

        def add_scalar(self, name, value, step):
            received.append((name, value, step))

        def flush(self):
            received.append("flushed")

    module = types.SimpleNamespace(SummaryWriter=Writer)
    monkeypatch.setitem(sys.modules, "tensorboardX", module)
    Log(tmp_path, ("tensorboard",)).write("a", 4, {"loss": 0.5, "record_ids": ["x"]})
    assert received == [str(tmp_path / "tensorboard"), ("a/loss", 0.5, 4), "flushed"]


def test_wandb_receives_numbers(tmp_path, monkeypatch):
    received = []
    run = types.SimpleNamespace(log=lambda numbers, step: received.append((numbers, step)))
    module = types.SimpleNamespace(init=lambda **options: received.append(options) or run)
    monkeypatch.setitem(sys.modules, "wandb", module)
    Log(tmp_path, ("wandb",)).write("a", 4, {"loss": 0.5, "rate": 1, "note": "x"})
    assert received[0]["dir"] == str(tmp_path)
    numbers, _ = received[1]
    logged = {name: value for name, value in numbers.items() if name.startswith("a/")}
    assert logged == {"a/loss": 0.5, "a/rate": 1}


def test_table_and_progress(capsys):
    print_table(
        "title", [{"name": "a", "rmse": 1.23456, "r": None}, {"name": "b", "rmse": 2, "r": 0.5}]
    )
    out = capsys.readouterr().out
    assert "title" in out and "1.235" in out and "undefined" in out and "0.500" in out
    with progress("x", 3) as advance:
        advance(2, note="loss 1")
        advance()
    assert capsys.readouterr() == ("", "")


def test_of_several_processes_the_first_says_how_far_it_is(capsys, monkeypatch):
    monkeypatch.setattr("jax.process_count", lambda: 2)
    for seconds, process, expected in (
        (0, 0, "x: 7 of 9  loss 1\nx: 8 of 9\n"),
        (0, 1, ""),
        (100, 0, ""),
    ):
        monkeypatch.setattr("regjax.log.PROGRESS_SECONDS", seconds)
        monkeypatch.setattr("jax.process_index", lambda process=process: process)
        with progress("x", 9, 5) as advance:
            advance(2, note="loss 1")
            advance()
        assert capsys.readouterr() == ("", expected)
