"""SIGTERM and SIGINT: the step is saved, the message says how to go on, and the bits do not change."""

import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from regjax import checkpoint, preemption
from regjax.log import read_log
from tests.kills import assert_same_bits, wait_for

ROOT = Path(__file__).resolve().parents[1]
CONFIG = str(ROOT / "tests" / "small_experiment.py")
OPTIONS = ["--steps", "200", "--checkpoint-every", "1000", "--eval-every", "0", "--log-every", "5"]
OPTIONS += ["--stages.1.steps", "2"]


def start(workdir):
    return subprocess.Popen(
        [sys.executable, "-m", "regjax", "train", CONFIG, "--workdir", str(workdir), *OPTIONS],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    _, err = process.communicate(timeout=120)
    return process.returncode, err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_the_step_and_the_run_goes_on_with_the_same_bits(tmp_path, number):
    workdir = tmp_path / "run"
    process = start(workdir)
    wait_for(process, lambda: len(read_log(workdir / "log.jsonl")) > 2)
    process.send_signal(number)
    status, err = finish(process)
    assert status == 128 + number
    assert "Traceback" not in err and "stopping after this step" in err
    said = re.search(
        r"stopped at step (\d+) of stage 'first', which is saved; the same command", err
    )
    step = int(said[1])
    assert 10 < step < 200
    with checkpoint.open_manager(workdir / "first" / "checkpoints") as manager:
        # The only one: none was due.
        assert manager.all_steps() == [step]
    if number == signal.SIGINT:
        return
    undisturbed = tmp_path / "undisturbed"
    for folder in (workdir, undisturbed):
        status, err = finish(start(folder))
        assert status == 0 and "Traceback" not in err
    assert_same_bits(workdir, undisturbed)


def test_handlers_are_put_back_and_a_second_interrupt_stops_at_once():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with preemption.watch() as stop:
        assert stop(1) == 0
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop(2) == signal.SIGTERM
        # A scheduler may repeat its signal; that is no reason not to save.
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop(3) == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_outside_of_the_main_thread_nothing_is_caught():
    found = []

    def watch():
        with preemption.watch() as stop:
            found.append(stop(1))

    thread = threading.Thread(target=watch)
    thread.start()
    thread.join()
    assert found == [0]
