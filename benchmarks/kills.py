"""SIGKILL of a random process at random moments of runs of 2 and of 4 processes: does every run recover?

    python benchmarks/kills.py --kills 20

For each number of processes it trains `tests/small_experiment.py` undisturbed, then with kills at moments
drawn uniformly from the time that took, each in a process drawn at random. After every kill the newest
checkpoint of every stage has to be one that was there before, or a newer one, and whole; at the end all
parameters, optimizer states and figures have to be those of the undisturbed run, bit for bit. A run that
ended before its kill counts, and another one is begun. Prints a table; the exit status is 1 where any of it
did not hold.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import queue
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.kills import arrays_of_checkpoint, assert_same_bits  # noqa: E402

CONFIG = ROOT / "tests" / "small_experiment.py"
OPTIONS = ["--steps", "60", "--checkpoint-every", "5", "--eval-every", "30", "--log-every", "5"]


class Kill(NamedTuple):
    seconds: float
    """From the start of all processes to the kill."""
    where: str
    before: dict[str, int]
    """Newest checkpoint of each stage when the process was killed,"""
    after: dict[str, int]
    """and when all processes were gone."""
    recovery: float
    """Seconds from the kill to a new start."""


class Job:
    """`regjax launch --local` of a training run, in a process of its own."""

    def __init__(
        self, workdir: Path, processes: int, max_restarts: int = 0, config: Path = CONFIG
    ) -> None:
        self.workdir, self.processes = workdir, processes
        command = [sys.executable, "-m", "regjax", "launch", "--local", str(processes)]
        command += ["--max-restarts", str(max_restarts), "--", "train", str(config), *OPTIONS]
        self.process = subprocess.Popen(
            [*command, "--workdir", str(workdir)],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.errors: list[str] = []
        self._restarts: queue.Queue[float] = queue.Queue()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.errors.append(line)
            if "all start again" in line:
                self._restarts.put(time.monotonic())
        self.process.stderr.close()

    def pids(self) -> list[int]:
        """The processes of the job that run."""
        found = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                state, parent = path.read_text().rpartition(")")[2].split()[:2]
                if int(parent) == self.process.pid and state != "Z":
                    found.append(int(path.parent.name))
        return found

    def wait_until_started(self) -> bool:
        """Waits for all processes; False where the job has ended."""
        while len(self.pids()) < self.processes:
            if self.process.poll() is not None:
                return False
            time.sleep(0.002)
        return True

    def kill(self, draw: random.Random, began: float) -> Kill | None:
        """Kills one of the processes, waits until none is left, and looks at the checkpoints.

        None where they have ended by themselves.
        """
        victims = self.pids()
        victim = draw.choice(victims)
        before, where = newest(self.workdir), position(self.workdir)
        killed = time.monotonic()
        try:
            os.kill(victim, signal.SIGKILL)
        except ProcessLookupError:
            return None
        restarted = self._restarts.get(timeout=60)
        after = newest(self.workdir)
        for stage, step in after.items():
            check(self.workdir / stage / "checkpoints" / str(step), step)
        for stage, step in before.items():
            if after.get(stage, -1) < step:
                raise AssertionError(f"checkpoint {step} of {stage} is lost: {after}")
        return Kill(killed - began, where, before, after, restarted - killed)

    def finish(self) -> None:
        self.process.wait(timeout=600)
        self.close()
        if self.process.returncode:
            raise AssertionError(f"exit status {self.process.returncode}: {''.join(self.errors)}")

    def close(self) -> None:
        """Waits for the end of what the job says."""
        self._reader.join()


def newest(workdir: Path) -> dict[str, int]:
    found: dict[str, int] = {}
    for path in workdir.glob("*/checkpoints/*"):
        if path.name.isdecimal():
            stage = path.parent.parent.name
            found[stage] = max(int(path.name), found.get(stage, 0))
    return found


def position(workdir: Path) -> str:
    """What can be seen from outside of where a run is."""
    if any(workdir.glob("*/checkpoints/*tmp*")):
        return "a checkpoint is unfinished"
    stages = newest(workdir)
    return f"training {list(stages)[-1]}" if stages else "starting"


def check(folder: Path, step: int) -> None:
    """Reads a copy of a checkpoint; the run may delete it meanwhile, when it has a newer one."""
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary) / folder.name
        shutil.copytree(folder, copy)
        arrays = arrays_of_checkpoint(copy)
        if int(arrays["step"]) != step:
            raise AssertionError(f"{folder} holds step {arrays['step']}")


def disturbed(
    workdirs: Iterator[Path], processes: int, kills: int, longest: float, draw: random.Random
) -> Iterator[tuple[Kill | None, Path | None]]:
    """Yields every kill, and the workdir of every run when it has ended."""
    left = kills
    while left:
        workdir = next(workdirs)
        job = Job(workdir, processes, max_restarts=left)
        while left and job.wait_until_started():
            began = time.monotonic()
            moment = began + draw.uniform(0, longest)
            while time.monotonic() < moment and job.process.poll() is None:
                time.sleep(0.005)
            if job.process.poll() is not None or len(job.pids()) < processes:
                break
            kill = job.kill(draw, began)
            if kill is None:
                break
            yield kill, None
            left -= 1
        job.finish()
        yield None, workdir


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print("| processes | kill | seconds after start | while | newest before | after | recovery s |")
    print("|---:|---:|---:|---|---|---|---:|")
    with tempfile.TemporaryDirectory() as folder:
        for processes in options.processes:
            undisturbed = Path(folder) / f"{processes}-undisturbed"
            began = time.monotonic()
            Job(undisturbed, processes).finish()
            longest = time.monotonic() - began
            workdirs = (Path(folder) / f"{processes}-{index}" for index in range(1000))
            draw = random.Random(options.seed)
            number = runs = 0
            for kill, ended in disturbed(workdirs, processes, options.kills, longest, draw):
                if kill is not None:
                    number += 1
                    before, after = (
                        ", ".join(f"{stage} {step}" for stage, step in steps.items()) or "none"
                        for steps in (kill.before, kill.after)
                    )
                    print(
                        f"| {processes} | {number} | {kill.seconds:.1f} | {kill.where} | {before} "
                        f"| {after} | {kill.recovery:.1f} |",
                        flush=True,
                    )
                if ended is not None:
                    runs += 1
                    assert_same_bits(ended, undisturbed)
            print(
                f"\n{processes} processes: {number} kills in {runs} runs of {longest:.0f} s, all recovered, "
                "no checkpoint lost or half-written, all bits those of the undisturbed run\n",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
