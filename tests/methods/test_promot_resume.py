"""Killed inside the first stage, between the stages and inside the second: nothing shows it."""

import signal

import pytest

from regjax.log import read_log
from tests.kills import assert_same_runs, finish, start, wait_for

RUN = """
import dataclasses, sys
from regjax.methods import promot
from regjax.train import train
from tests import small_promot as small
recipe = dataclasses.replace(small.recipe, prompt_steps=40, model_steps=40, prompt_eval_every=14)
stages = (small.pretraining, *promot.promot(recipe))
experiment = dataclasses.replace(small.experiment, stages=stages, checkpoint_every=3)
train(experiment, sys.argv[1], quiet=True)
"""


def steps(workdir, stage):
    lines = read_log(workdir / "log.jsonl")
    return max((line["step"] for line in lines if line["stage"] == stage), default=0)


def is_done(workdir, stage):
    return (workdir / stage / "results.json").exists()


MOMENTS = {
    "inside stage 1": (
        lambda w: 10 <= steps(w, "promot_prompt") < 40,
        lambda w: not is_done(w, "promot_prompt"),
    ),
    "between the stages": (
        lambda w: is_done(w, "promot_prompt"),
        lambda w: steps(w, "promot") == 0,
    ),
    "inside stage 2": (
        lambda w: 10 <= steps(w, "promot") < 40,
        lambda w: not is_done(w, "promot"),
    ),
}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    finish(start(RUN, workdir))
    return workdir


def test_three_kills_leave_no_trace(undisturbed, tmp_path):
    workdir = tmp_path / "run"
    for name, (reached, held) in MOMENTS.items():
        process = start(RUN, workdir)
        wait_for(process, lambda reached=reached: reached(workdir))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL, name
        assert held(workdir), name
    finish(start(RUN, workdir))
    assert_same_runs(workdir, undisturbed)
    assert steps(workdir, "promot") == 40
