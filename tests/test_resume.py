"""A run that was killed, however often and whenever, ends with the bits of one that was not."""

import random
import signal
import time

import pytest

from regjax.log import read_log
from tests.kills import (
    arrays_of,
    assert_same_runs,
    finish,
    is_writing_checkpoint,
    start,
    wait_for,
)

RUN = """
import dataclasses, sys
from regjax.train import train
from tests.small_experiment import experiment
experiment = dataclasses.replace(
    experiment, steps=100, checkpoint_every=2, eval_every=34, log_every=5, reference_field="",
    stages=(experiment.stages[0], dataclasses.replace(experiment.stages[1], select="mean/rmse")),
)
train(experiment, sys.argv[1], quiet=True)
"""
KILLS = 10


def kill_somewhere(process, workdir, moment, delay):
    """Kills at a moment of the run; returns whether a checkpoint was being written."""
    lines = len(read_log(workdir / "log.jsonl"))
    if moment == "checkpoint":
        before = set(workdir.glob("*/checkpoints/*"))
        wait_for(
            process,
            lambda: (
                is_writing_checkpoint(workdir) and set(workdir.glob("*/checkpoints/*")) - before
            ),
        )
    elif moment == "training":
        wait_for(process, lambda: len(read_log(workdir / "log.jsonl")) > lines)
    elif moment == "results":
        done = len(list(workdir.glob("*/predictions_validation.jsonl*")))
        wait_for(process, lambda: len(list(workdir.glob("*/predictions_validation.jsonl*"))) > done)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return is_writing_checkpoint(workdir)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    finish(start(RUN, workdir))
    return workdir


def test_ten_kills_leave_no_trace(undisturbed, tmp_path):
    workdir = tmp_path / "run"
    draw = random.Random(0)
    moments = ["start", *["checkpoint"] * 5, *["training"] * 3, "results"]
    draw.shuffle(moments)
    longest = {"start": 5.0, "checkpoint": 0.02, "training": 0.3, "results": 0.05}
    killed = inside = 0
    for moment in moments:
        process = start(RUN, workdir)
        inside += kill_somewhere(process, workdir, moment, draw.uniform(0, longest[moment]))
        killed += process.returncode == -signal.SIGKILL
    finish(start(RUN, workdir))
    assert killed == KILLS
    assert inside >= 2

    assert_same_runs(workdir, undisturbed)
    names = arrays_of(workdir)
    assert sum("optimizer" in name for name in names) > 20
    assert len(list(workdir.glob("*/predictions*"))) == 4
