"""Processes that are started, stopped and started again together, and leave none behind."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from regjax.launch.supervise import Command, supervise

ROOT = Path(__file__).resolve().parents[2]


def shell(name, script):
    return Command(name, ("sh", "-c", script))


def run(*commands, max_restarts=0, save_seconds=5.0):
    return supervise(lambda: commands, max_restarts=max_restarts, save_seconds=save_seconds)


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # A zombie, whose parent has not asked for it yet, does not run.
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


def test_output_is_whole_lines_with_prefixes_on_its_own_stream(capfd):
    # Written in pieces, at the same time, without a newline at the end.
    script = "for i in 1 2 3; do printf 'a '; sleep 0.02; printf '%s\\n' $i; done; printf end"
    assert run(shell("0", script), shell("1 host", script), shell("2", "echo wrong >&2")) == 0
    out, err = capfd.readouterr()
    for name in ("[0]", "[1 host]"):
        mine = [line for line in out.splitlines() if line.startswith(name)]
        assert mine == [f"{name} {text}" for text in ("a 1", "a 2", "a 3", "end")]
    assert len(out.splitlines()) == 8 and err == "[2] wrong\n"


def test_the_rest_is_stopped_at_once_and_all_start_again(tmp_path, capfd):
    # Each begins for the n-th time, then the first waits for the second to have, and fails twice.
    fails, waits = tmp_path / "fails", tmp_path / "waits"
    for file in (fails, waits):
        file.write_text("")
    fails_twice = (
        f"echo x >> {fails}; n=$(wc -l < {fails}); "
        f"until test $(wc -l < {waits}) -ge $n; do sleep 0.1; done; test $n -gt 2 || kill -9 $$"
    )
    stays = f"echo x >> {waits}; test $(wc -l < {waits}) -gt 2 || sleep 600"
    began = time.monotonic()
    assert run(shell("0", fails_twice), shell("1", stays), max_restarts=3) == 0
    assert time.monotonic() - began < 60
    assert [len(file.read_text().split()) for file in (fails, waits)] == [3, 3]
    err = capfd.readouterr().err
    said = "process 0 was ended by SIGKILL; all start again from the last checkpoint"
    assert f"{said} (1 of 3)" in err and f"{said} (2 of 3)" in err


def test_restarts_end_and_the_status_is_passed_on(tmp_path, capfd):
    count = tmp_path / "count"
    assert run(shell("0", f"echo x >> {count}; exit 70"), max_restarts=2) == 70
    assert len(count.read_text().split()) == 3
    assert "process 0 ended with exit status 70; it was started 3 times" in capfd.readouterr().err
    assert run(shell("0", "kill -SEGV $$")) == 128 + signal.SIGSEGV


@pytest.mark.parametrize("status", [1, 2])
def test_what_would_fail_again_is_not_started_again(tmp_path, status):
    count = tmp_path / "count"
    # The others may die of it, and be seen to, before.
    bad = f"trap '' TERM; echo x >> {count}; sleep 0.5; exit {status}"
    assert run(shell("0", bad), shell("1", "exit 134"), max_restarts=3) == status
    assert run(shell("0", f"exit {status}"), shell("1", "sleep 600"), max_restarts=3) == status
    assert len(count.read_text().split()) == 1


def test_those_who_do_not_listen_are_killed_with_all_that_they_started(tmp_path):
    pids = tmp_path / "pids"
    deaf = f"trap '' TERM; sleep 600 & echo $! >> {pids}; echo $$ >> {pids}; wait; sleep 600"
    leaves_a_child = (
        f"sleep 600 & echo $! >> {pids}; while test $(wc -l < {pids}) -lt 3; do :; done"
    )
    assert run(shell("0", deaf), shell("1", f"{leaves_a_child}; exit 9")) == 9
    found = [int(pid) for pid in pids.read_text().split()]
    assert len(found) == 3 and not any(is_alive(pid) for pid in found)


LAUNCHER = """
import json, sys
from regjax.launch.supervise import Command, supervise
commands = [Command(str(i), tuple(argv)) for i, argv in enumerate(json.loads(sys.argv[1]))]
sys.exit(supervise(lambda: commands, max_restarts=3, save_seconds=float(sys.argv[2])))
"""
SAVES = "trap 'sleep 0.3; echo saved; exit 143' TERM; echo begun; while :; do sleep 0.05; done"
DEAF = "trap '' TERM; echo begun; while :; do sleep 0.05; done"


def launcher(*argvs, save_seconds=30):
    process = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, json.dumps(argvs), str(save_seconds)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for _ in argvs:
        assert "begun" in process.stdout.readline()
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_are_passed_on_to_be_saved_first_and_nothing_is_started_again(number):
    process = launcher(["sh", "-c", SAVES], ["sh", "-c", SAVES])
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert sorted(out.split("\n")) == ["", "[0] saved", "[1] saved"] and "again" not in err


def test_a_second_signal_or_too_long_a_wait_ends_it():
    impatient = launcher(["sh", "-c", DEAF])
    impatient.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert impatient.poll() is None
    impatient.send_signal(signal.SIGINT)
    impatient.communicate(timeout=10)
    assert impatient.returncode == 130
    timed = launcher(["sh", "-c", DEAF], save_seconds=0.5)
    timed.send_signal(signal.SIGTERM)
    timed.communicate(timeout=10)
    assert timed.returncode == 143


def test_a_process_that_was_told_to_stop_by_others_has_the_rest_save_too(capfd):
    agreed = "sleep 0.2; exit 143"
    assert (
        run(shell("0", agreed), shell("1", "sleep 0.6; echo saved; exit 143"), max_restarts=3)
        == 143
    )
    out, err = capfd.readouterr()
    assert out == "[1] saved\n" and err == ""
    # One that SIGTERM killed has agreed to nothing.
    began = time.monotonic()
    assert run(shell("0", "kill -TERM $$"), shell("1", "sleep 600"), max_restarts=1) == 143
    assert "process 0 was ended by SIGTERM; all start again" in capfd.readouterr().err
    assert time.monotonic() - began < 60


# The lifeline of a process whose launcher is gone

HELD = """
import os, signal, sys, time
from regjax import lifeline
signal.signal(signal.SIGTERM, signal.SIG_IGN if "deaf" in sys.argv else lambda *_: os._exit(7))
os.environ["REGJAX_LIFELINE"] = "0.5"
lifeline.hold()
assert "REGJAX_LIFELINE" not in os.environ
print("begun", os.getpid(), flush=True)
time.sleep(600)
"""


def held(*arguments):
    process = subprocess.Popen(
        [sys.executable, "-c", HELD, *arguments],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdout.readline().startswith(b"begun")
    process.stdout.close()
    return process


def test_words_and_the_end_of_the_input():
    listens = held()
    listens.stdin.write(b"terminate\n")
    listens.stdin.flush()
    assert listens.wait(timeout=20) == 7
    deaf = held("deaf")
    deaf.stdin.write(b"terminate\n")
    deaf.stdin.flush()
    time.sleep(1)
    assert deaf.poll() is None
    deaf.stdin.write(b"kill\n")
    deaf.stdin.flush()
    assert deaf.wait(timeout=20) == -signal.SIGKILL
    for process, status in ((held(), 7), (held("deaf"), -signal.SIGKILL)):
        process.stdin.close()
        assert process.wait(timeout=20) == status
    for process in (listens, deaf):
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()


def test_a_launcher_that_was_killed_leaves_none_behind(tmp_path):
    path = tmp_path / "held.py"
    path.write_text(HELD)
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            LAUNCHER,
            json.dumps([[sys.executable, str(path), "deaf"]] * 2),
            "30",
        ],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    pids = [int(process.stdout.readline().split()[-1]) for _ in range(2)]
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 20
    while any(map(is_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(is_alive, pids))
