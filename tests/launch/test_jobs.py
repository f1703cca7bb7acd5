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
Job, newest = KILLS["Job"], KILLS["newest"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    Job(workdir, 2).finish()
    return workdir


def test_two_kills_leave_no_trace(undisturbed, tmp_path):
    workdir, draw = tmp_path / "run", random.Random(0)
    job = Job(workdir, 2, max_restarts=2)
    wait_for(job.process, lambda: newest(workdir).get("first", 0) >= 10)
    assert job.kill(draw, time.monotonic()).after["first"] >= 10
    assert job.wait_until_started()
    wait_for(job.process, lambda: newest(workdir).get("second") and is_writing_checkpoint(workdir))
    assert job.kill(draw, time.monotonic()).after["second"] >= 5
    job.finish()
    assert sum("was ended by SIGKILL; all start again" in line for line in job.errors) == 2
    assert_same_bits(workdir, undisturbed)


def test_a_signal_to_the_launcher_or_to_one_process_saves_the_same_step(undisturbed, tmp_path):
    workdir = tmp_path / "run"
    for stage in ("first", "second"):
        job = Job(workdir, 2, max_restarts=2)
        wait_for(job.process, lambda stage=stage: newest(workdir).get(stage, 0) >= 10)
        # Of the launcher, and then of a process, as by a machine that is preempted.
        os.kill(job.process.pid if stage == "first" else job.pids()[1], signal.SIGTERM)
        job.process.wait(timeout=120)
        job.close()
        err = "".join(job.errors)
        assert job.process.returncode == 143, err
        said = re.findall(rf"^\[(\d)\] regjax: stopped at step (\d+) of stage '{stage}'", err, re.M)
        assert sorted(process for process, _ in said) == ["0", "1"]
        assert {int(step) for _, step in said} == {newest(workdir)[stage]}
        assert "again" not in err and "Traceback" not in err
    job = Job(workdir, 2)
    job.finish()
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
