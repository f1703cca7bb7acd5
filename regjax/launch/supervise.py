"""A job's processes on this machine's side: started together, stopped together, started again together."""

from __future__ import annotations

import contextlib
import os
import queue
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import IO, NamedTuple

from regjax.distributed import FINAL
from regjax.lifeline import KILL, TERMINATE

AGREED = (130, 143)
"""Exit statuses of a process that was told to stop, and has agreed with the others after which step."""

PEER_SECONDS = 5
"""How long those are given who wait for a process that is dead: they have nothing left to save."""


class Command(NamedTuple):
    """What one process, or one connection to several, is started with."""

    name: str
    """What its output is prefixed with; empty where the output has a prefix."""
    argv: tuple[str, ...]
    remote: bool = False
    """It stands for processes elsewhere, which are told to end over standard input."""
    terminate: tuple[str, ...] = ()
    """What sends SIGTERM to those that standard input does not reach,"""
    kill: tuple[str, ...] = ()
    """and what sends SIGKILL."""

    def __str__(self) -> str:
        return shlex.join(self.argv)


class _Exit(NamedTuple):
    process: int
    status: int
    """As of `subprocess`: negative for a signal."""


def supervise(
    commands: Callable[[], Sequence[Command]], *, max_restarts: int, save_seconds: float
) -> int:
    """Runs `commands()` together until all end well, and returns the job's exit status.

    Each attempt asks for them anew: for a coordinator's port that none has used. When one process fails
    the rest are stopped at once, and all are started anew, up to `max_restarts` times, but not after an
    exit status in `distributed.FINAL`. SIGINT, SIGTERM and SIGHUP are passed on once, to be saved before,
    within `save_seconds`; a second one stops all at once.
    """
    signals: list[int] = []
    with _noted(signals):
        for attempt in range(max_restarts + 1):
            end = _Job(commands(), signals, save_seconds).run()
            if not end.again or signals:
                break
            again = attempt < max_restarts
            rest = f"all start again from the last checkpoint ({attempt + 1} of {max_restarts})"
            _say(f"{end.why}; {rest if again else f'it was started {attempt + 1} times'}")
    return 128 + signals[0] if signals and end.status else end.status


class _End(NamedTuple):
    """How an attempt ended."""

    status: int = 0
    why: str = ""
    again: bool = False
    """It may end otherwise when it is started again."""


class _Job:
    """One attempt."""

    def __init__(
        self, commands: Sequence[Command], signals: list[int], save_seconds: float
    ) -> None:
        self._commands, self._signals, self._save_seconds = commands, signals, save_seconds
        self._exits: queue.Queue[_Exit] = queue.Queue()
        self._running: dict[int, subprocess.Popen[bytes]] = {}
        self._threads: list[threading.Thread] = []
        self._output = threading.Lock()

    def run(self) -> _End:
        """Returns when no process is left."""
        end = _End()
        deadline: float | None = None
        passed_on = 0
        try:
            for index, command in enumerate(self._commands):
                self._start(index, command)
            while self._running:
                if len(self._signals) > passed_on:
                    passed_on = len(self._signals)
                    self._terminate()
                    seconds = self._save_seconds if passed_on == 1 else 0
                    deadline = min(deadline or float("inf"), time.monotonic() + seconds)
                if deadline is not None and time.monotonic() >= deadline:
                    self._kill()
                    deadline = None
                with contextlib.suppress(queue.Empty):
                    exit = self._exits.get(timeout=0.1)
                    del self._running[exit.process]
                    first = exit.status and not end.status
                    if first or (exit.status in FINAL and end.status not in FINAL):
                        end = self._judge(exit)
                    if first and not passed_on:
                        agreed = exit.status in AGREED
                        if not agreed:
                            self._terminate()
                        seconds = self._save_seconds if agreed else PEER_SECONDS
                        deadline = time.monotonic() + seconds
        finally:
            self._kill()
            for thread in self._threads:
                # One that has left its group may hold on to the output.
                thread.join(timeout=2)
        return end

    def _judge(self, exit: _Exit) -> _End:
        name = self._commands[exit.process].name or self._commands[exit.process].argv[0]
        if exit.status >= 0:
            why = f"process {name} ended with exit status {exit.status}"
            return _End(exit.status, why, exit.status not in (*FINAL, *AGREED))
        why = f"process {name} was ended by {signal.Signals(-exit.status).name}"
        return _End(128 - exit.status, why, again=True)

    def _start(self, index: int, command: Command) -> None:
        process = subprocess.Popen(
            command.argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        self._running[index] = process
        prefix = f"[{command.name}] ".encode() if command.name else b""
        streams = ((process.stdout, sys.stdout), (process.stderr, sys.stderr))
        for source, sink in streams:
            self._thread(self._copy, source, sink, prefix)
        self._thread(self._wait, index, process)

    def _thread(self, target: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True)
        thread.start()
        self._threads.append(thread)

    def _copy(self, source: IO[bytes], sink: IO[str], prefix: bytes) -> None:
        """Whole lines, each with its prefix, so that those of several processes do not mix."""
        for line in source:
            text = (prefix + line.rstrip(b"\r\n")).decode(errors="replace")
            with self._output, contextlib.suppress(BrokenPipeError, ValueError):
                print(text, file=sink, flush=True)
        source.close()

    def _wait(self, index: int, process: subprocess.Popen[bytes]) -> None:
        if hasattr(os, "waitid"):
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        else:
            process.wait()
        # Before its number is free for another: what it has started and not ended goes with it.
        _signal_group(process, signal.SIGKILL)
        status = process.wait()
        assert process.stdin is not None
        with contextlib.suppress(OSError):
            process.stdin.close()
        self._exits.put(_Exit(index, status))

    def _terminate(self) -> None:
        """SIGTERM to all that run, here or elsewhere."""
        for command, process in self._still_running():
            if not command.remote:
                _signal_group(process, signal.SIGTERM)
            elif command.terminate:
                subprocess.Popen(command.terminate, stdin=subprocess.DEVNULL)
            else:
                _write(process, TERMINATE)

    def _kill(self) -> None:
        """SIGKILL to all that run, here or elsewhere."""
        remote = [
            (command, process) for command, process in self._still_running() if command.remote
        ]
        for command, process in remote:
            if command.kill:
                subprocess.run(command.kill, stdin=subprocess.DEVNULL, check=False)
            else:
                _write(process, KILL)
        if remote:
            # For the word to arrive before the connection is gone.
            time.sleep(1)
        for _, process in self._still_running():
            _signal_group(process, signal.SIGKILL)

    def _still_running(self) -> list[tuple[Command, subprocess.Popen[bytes]]]:
        return [(self._commands[index], process) for index, process in self._running.items()]


def _write(process: subprocess.Popen[bytes], word: bytes) -> None:
    assert process.stdin is not None
    with contextlib.suppress(OSError):
        process.stdin.write(word)
        process.stdin.flush()


def _signal_group(process: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


@contextlib.contextmanager
def _noted(signals: list[int]) -> Iterator[None]:
    """Appends to `signals` what would have ended this process."""
    names = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, lambda n, _: signals.append(n)) for number in names}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _say(message: str) -> None:
    print(f"regjax launch: {message}", file=sys.stderr, flush=True)
