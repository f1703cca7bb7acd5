"""Training by two processes under the launcher: killed, stopped and misconfigured."""

import os
import random
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.kills import assert_same_bits, is_writing_checkpoint, wait_for

ROOT = Path(__file__).resolve().parents[2]
KILLS = runpy.run_path(str(ROOT / "benchmarks" / "kills.py"), run_name="kills")
newest = KILLS["newest"]
CONFIG = ROOT / "tests" / "launch" / "one_stage.py"


def start(workdir, max_restarts=0):
    return KILLS["Job"](workdir, 2, max_restarts, CONFIG)


def step_of(workdir):
    return newest(workdir).get("second", 0)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    start(workdir).finish()
    return workdir


def test_two_kills_leave_no_trace(undisturbed, tmp_path):
    workdir, draw = tmp_path / "run", random.Random(0)
    job = start(workdir, max_restarts=2)
    wait_for(job.process, lambda: step_of(workdir) >= 10)
    assert job.kill(draw, time.monotonic()).after["second"] >= 10
    assert job.wait_until_started()
    wait_for(job.process, lambda: step_of(workdir) >= 25 and is_writing_checkpoint(workdir))
    assert job.kill(draw, time.monotonic()).after["second"] >= 25
    job.finish()
    assert sum("was ended by SIGKILL; all start again" in line for line in job.errors) == 2
    assert_same_bits(workdir, undisturbed)


def test_a_signal_to_the_launcher_or_to_one_process_saves_the_same_step(undisturbed, tmp_path):
    workdir = tmp_path / "run"
    for to_launcher in (True, False):
        job, before = start(workdir, max_restarts=2), step_of(workdir)
        wait_for(job.process, lambda before=before: step_of(workdir) >= before + 10)
        # To one process: as where one machine of several is preempted.
        os.kill(job.process.pid if to_launcher else job.pids()[1], signal.SIGTERM)
        job.process.wait(timeout=120)
        job.close()
        err = "".join(job.errors)
        assert job.process.returncode == 143, err
        said = re.findall(r"^\[(\d)\] regjax: stopped at step (\d+) of stage 'second'", err, re.M)
        assert sorted(process for process, _ in said) == ["0", "1"]
        assert {int(step) for _, step in said} == {step_of(workdir)}
        assert "again" not in err and "Traceback" not in err
    start(workdir).finish()
    assert_same_bits(workdir, undisturbed)


def test_bad_input_is_said_and_not_started_again(tmp_path):
    found = subprocess.run(
        [sys.executable, "-m", "regjax", "launch", "--local", "2", "--", "train", "none.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert found.returncode == 2
    assert "] regjax: no config file none.py" in found.stderr
    assert "again" not in found.stderr and "Traceback" not in found.stderr
