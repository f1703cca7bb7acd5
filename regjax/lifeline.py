"""Standard input as a lifeline: a launched process ends when its launcher says so, or is gone."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import NoReturn

LIFELINE = "REGJAX_LIFELINE"
"""Environment variable: seconds from SIGTERM to SIGKILL once standard input has ended; unset: no lifeline."""

TERMINATE, KILL = b"terminate\n", b"kill\n"


def hold() -> None:
    """Listens, in a thread, to a launcher that wrote `REGJAX_LIFELINE`; does nothing without one.

    `terminate` is SIGTERM to this process, `kill` is SIGKILL to its group. At the end of the input, where
    the launcher was killed or the connection to it broke, one follows the other. So nothing is left
    running on a machine that its launcher no longer reaches.
    """
    seconds = os.environ.pop(LIFELINE, "")
    if seconds:
        threading.Thread(target=_listen, args=(float(seconds),), daemon=True).start()


def _listen(seconds: float) -> NoReturn:
    while said := os.read(0, 64):
        if KILL in said:
            _kill()
        os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(seconds)
    _kill()


def _kill() -> NoReturn:
    """Ends the process and, where it leads a group of its own, all of the group."""
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError
