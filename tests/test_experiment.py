"""Experiments: what they resolve to, and what is written of them."""

import dataclasses
import json

import pytest

from regjax import InputError, Stage
from regjax.data import Data
from regjax.experiment import load_config, to_json, write_config
from regjax.objectives import Raft
from regjax.optim import Optimizer
from tests.small_experiment import experiment


def test_a_stage_takes_what_it_does_not_say():
    own = Stage(
        "own", Raft(), steps=7, optimizer=Optimizer(learning_rate=3.0), data=Data(train="x")
    )
    run = dataclasses.replace(experiment, stages=(own, Stage("none", Raft())))
    first, second = (run.resolve(stage) for stage in run.stages)
    assert (first.steps, first.optimizer.learning_rate, first.data.train) == (7, 3.0, "x")
    assert (second.steps, second.optimizer, second.data) == (
        20,
        experiment.optimizer,
        experiment.data,
    )
    assert run.resolve(Stage("zero", Raft(), steps=0)).steps == 0


def test_written_config_is_resolved(tmp_path):
    write_config(experiment, tmp_path / "config.json")
    found = json.loads((tmp_path / "config.json").read_text())
    assert [stage["steps"] for stage in found["stages"]] == [20, 20]
    assert found["stages"][1]["objective"] == {"type": "Raft", **dataclasses.asdict(Raft())}
    assert found["stages"][0]["data"]["test"] == "40 records in memory"
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_json_of_values_without_a_json_form():
    assert to_json((1, "a", None, (2.5, True))) == [1, "a", None, [2.5, True]]
    assert to_json(len) == "<built-in function len>"


def test_a_config_file_is_its_experiment(tmp_path):
    path = tmp_path / "config.py"
    path.write_text("from tests.small_experiment import experiment\n")
    assert load_config(path) == experiment


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[
            (name, 0)
            for name in ("batch_size", "accumulation", "steps", "log_every", "max_bad_steps")
        ],
        ("checkpoint_every", 0),
        ("keep_latest", 0),
        ("keep_best", 0),
        ("keep_every", -5),
        ("keep_every", 7),
        ("eval_every", -1),
        ("seed", -1),
        ("seed", 2**32),
    ],
)
def test_numbers_out_of_range_are_named(field, value):
    with pytest.raises(InputError, match=rf"{field} is {value}; it has to be"):
        dataclasses.replace(experiment, **{field: value})


def test_stages_have_to_fit_together():
    cases = {
        "has no stages": (),
        "two stages are named 'a'": (Stage("a", Raft()), Stage("a", Raft())),
        "starts from 'b'": (Stage("a", Raft(), start="b"), Stage("b", Raft())),
        "not callable": (Stage("a", "raft"),),
        "stage name 'previous'": (Stage("previous", Raft()),),
        "stage name '../a'": (Stage("../a", Raft()),),
    }
    for message, stages in cases.items():
        with pytest.raises(InputError, match=message.replace(".", r"\.")):
            dataclasses.replace(experiment, stages=stages)
