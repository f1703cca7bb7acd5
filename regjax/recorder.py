"""The metrics of each step, fetched without making the device wait, and the guard against bad steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from regjax.data import Examples
from regjax.experiment import Experiment
from regjax.log import Log


class TrainingStopped(RuntimeError):
    """The loss or a gradient was not finite for too many steps in a row."""


class _Step(NamedTuple):
    step: int
    metrics: Mapping[str, jax.Array]
    record_ids: np.ndarray


class Recorder:
    """Fetches a step's metrics after the next step has been dispatched, and logs their averages."""

    def __init__(
        self,
        log: Log,
        stage: str,
        experiment: Experiment,
        steps: int,
        examples: Examples,
        advance: Callable[..., None],
    ) -> None:
        self._log, self._stage, self._experiment = log, stage, experiment
        self._steps, self._examples, self._advance = steps, examples, advance
        self._pending: _Step | None = None
        self._sums: dict[str, np.ndarray] = {}
        self._bad_in_a_row = 0

    @property
    def state(self) -> dict[str, Any]:
        """What a resumed run needs to log the same averages, as JSON; complete after `flush`."""
        sums = {name: value.tolist() for name, value in self._sums.items()}
        return {"sums": sums, "bad_in_a_row": self._bad_in_a_row}

    def resume(self, state: Mapping[str, Any]) -> None:
        """Goes on from the `state` of a run that was stopped."""
        self._sums = {name: np.array(value, np.float64) for name, value in state["sums"].items()}
        self._bad_in_a_row = state["bad_in_a_row"]

    def add(self, step: int, metrics: Mapping[str, jax.Array], record_ids: np.ndarray) -> None:
        """Takes the metrics `{name: [sum, weight]}` of `step`, and handles those of the one before."""
        self.flush()
        self._pending = _Step(step, metrics, record_ids)

    def flush(self) -> None:
        """Handles the metrics that were taken last.

        Raises:
          TrainingStopped: after `max_bad_steps` steps in a row that were not finite.
        """
        if self._pending is None:
            return
        step, pending, record_ids = self._pending
        self._pending = None
        metrics = {name: np.asarray(value, np.float64) for name, value in pending.items()}
        if metrics["bad"][0] > 0:
            self._advance(note="loss or gradient not finite")
            self._count_bad(step, record_ids)
        else:
            self._bad_in_a_row = 0
            self._advance(note=f"loss {_average(metrics['loss']):.4g}")
            for name, value in metrics.items():
                self._sums[name] = self._sums.get(name, np.zeros(2)) + value
        due = step % self._experiment.log_every == 0 or step == self._steps
        if due and self._sums:
            averages = {name: _average(v) for name, v in self._sums.items() if name != "bad"}
            self._log.write(self._stage, step, averages)
            self._sums = {}

    def _count_bad(self, step: int, record_ids: np.ndarray) -> None:
        ids = [self._examples.ids[index] for index in np.unique(record_ids[record_ids >= 0])]
        self._log.write(self._stage, step, {"not_finite": True, "record_ids": ids})
        self._bad_in_a_row += 1
        if self._bad_in_a_row >= self._experiment.max_bad_steps:
            raise TrainingStopped(
                f"stage {self._stage!r}: loss or gradient not finite in {self._bad_in_a_row} steps in "
                f"a row, up to step {step}. None of these updates was applied, and the last "
                f"checkpoint is intact; {self._log.path} lists the records. Lower the learning rate "
                "or look at the records, then run the same command again."
            )


def _average(value: np.ndarray) -> float:
    return float(value[0] / value[1]) if value[1] > 0 else math.nan
