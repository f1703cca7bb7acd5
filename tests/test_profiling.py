"""Profiles: a trace of the steps that were asked for, and nothing else."""

import dataclasses
import gzip
import json

import pytest

import regjax
from regjax import InputError, cli
from regjax.profiling import parse_steps
from tests.small_experiment import experiment

FEW = dataclasses.replace(experiment, stages=experiment.stages[:1], steps=6, eval_every=0)


@pytest.mark.parametrize("text", ["", "3", "5:4", "0:2", "a:b", "1:2:3", "-1:2", "1.5:2", "3:"])
def test_malformed_steps_are_refused(text):
    with pytest.raises(InputError, match="expected START:STOP"):
        parse_steps(text)


def test_steps():
    assert parse_steps("1:1") == (1, 1)
    assert parse_steps(" 20:25 ") == (20, 25)


def steps_in(folder):
    """The numbers of the steps that stand in a trace."""
    (path,) = folder.rglob("*.trace.json.gz")
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    named = [event for event in events if event.get("name") == "train"]
    return sorted({int(event["args"]["step_num"]) for event in named})


def test_a_trace_holds_the_steps_that_were_asked_for(tmp_path):
    for name, profile, steps in (("middle", (2, 4), [2, 3, 4]), ("end", (6, 9), [6])):
        regjax.train(FEW, tmp_path / name, quiet=True, profile=profile)
        folder = tmp_path / name / "profile" / "first"
        assert list(folder.rglob("*.xplane.pb"))
        assert steps_in(folder) == steps
    regjax.train(FEW, tmp_path / "none", quiet=True)
    assert not (tmp_path / "none" / "profile").exists()


def test_a_run_that_goes_on_traces_the_rest(tmp_path):
    regjax.train(dataclasses.replace(FEW, steps=3), tmp_path, quiet=True)
    regjax.train(FEW, tmp_path, quiet=True, profile=(2, 5))
    assert steps_in(tmp_path / "profile") == [4, 5]


def test_the_command_line_refuses_what_cannot_be_traced(tmp_path, capsys):
    config = tmp_path / "config.py"
    config.write_text("from tests.small_experiment import experiment\n")
    for text, said in (("4:2", "expected START:STOP"), ("21:30", "the longest stage has 20")):
        assert (
            cli.main(["train", str(config), "--workdir", str(tmp_path / "w"), "--profile", text])
            == 2
        )
        assert said in capsys.readouterr().err
