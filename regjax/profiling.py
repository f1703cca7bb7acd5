"""Traces of a few training steps by `jax.profiler`."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import jax

from regjax.errors import InputError

Steps = tuple[int, int]


def parse_steps(text: str) -> Steps:
    """`START:STOP`, both included and counted from 1 as in the log.

    >>> parse_steps("100:103")
    (100, 103)

    Raises:
      InputError: for anything else, and for a stop before the start.
    """
    found = re.fullmatch(r"(\d+):(\d+)", text.strip())
    first, last = map(int, found.groups()) if found else (0, 0)
    if not 1 <= first <= last:
        raise InputError(
            f"profile is {text!r}; expected START:STOP, the first and the last step to trace, counted "
            "from 1, such as 100:103"
        )
    return first, last


class Profiler:
    """Writes one trace into `folder`, of the steps from `steps[0]` to `steps[1]`; None: nothing.

    A run that goes on in the middle of them traces the rest.
    """

    def __init__(self, folder: Path, steps: Steps | None) -> None:
        self._folder, self._steps, self._running = folder, steps, False

    def before(self, step: int, settle: Callable[[], None]) -> None:
        """To be called before `step` is dispatched; `settle` waits for what was dispatched earlier."""
        if self._steps and not self._running and self._steps[0] <= step <= self._steps[1]:
            settle()
            jax.profiler.start_trace(str(self._folder))
            self._running = True

    def after(self, step: int, settle: Callable[[], None]) -> None:
        """To be called after it; the trace ends once the last step is done."""
        if self._running and self._steps and step >= self._steps[1]:
            settle()
            self.close()

    def close(self) -> None:
        """Ends a trace that is still running."""
        if self._running:
            jax.profiler.stop_trace()
            self._running = False
