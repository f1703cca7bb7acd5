"""Stopping at a step: SIGTERM and SIGINT save first, at the same step in all processes."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator

FIRST = b"regjax: stopping after this step, which will be saved; Ctrl-C again stops at once\n"


class Interrupted(KeyboardInterrupt):
    """Training was stopped by a signal, after the step it had reached was saved."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.signal = number


def end_at_once() -> None:
    """Gives SIGTERM its ordinary effect, where jax's preemption service waits for steps that do not come."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextlib.contextmanager
def watch() -> Iterator[Callable[[int], int]]:
    """Yields `stop(step)`: the signal after which this step is to be saved and be the last, or 0.

    On its own a process stops at the first step after the signal. Of several, any may get the signal;
    jax's preemption service then finds the step that none has passed, so all have to call `stop` at
    every step. A second SIGINT raises `KeyboardInterrupt` at once. Outside of the main thread, where Python
    has no signal handlers, only those of several processes can be stopped.
    """
    import jax
    from jax.experimental import multihost_utils

    several = jax.distributed.is_initialized()
    received: list[int] = []

    def note(number: int, _: object) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not received:
            os.write(2, FIRST)
            if several:
                # What jax's service listens to, in a handler of its own.
                os.kill(os.getpid(), signal.SIGTERM)
        received.append(number)

    def stop(step: int) -> int:
        if not several:
            return received[0] if received else 0
        agreed = multihost_utils.reached_preemption_sync_point(step)
        return (received or [signal.SIGTERM])[0] if agreed else 0

    ours: tuple[int, ...] = (signal.SIGINT,) if several else (signal.SIGINT, signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread():
        ours = ()
    before = {number: signal.signal(number, note) for number in ours}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
