"""The loop: one stage's compiled updates run to its last step, logged, evaluated, saved and resumed."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from regjax import checkpoint, preemption
from regjax.errors import InputError
from regjax.log import Log, progress
from regjax.profiling import Profiler
from regjax.recorder import Chunk, Recorder, is_due


@dataclasses.dataclass(frozen=True)
class Policy:
    """When a run logs, saves and gives up, in steps; the fields of an experiment say what they mean."""

    log_every: int
    checkpoint_every: int
    keep_latest: int
    max_bad_steps: int
    keep_best: int = 1
    keep_every: int = 0


@dataclasses.dataclass(frozen=True)
class Work:
    """A stage that is ready to be run."""

    name: str
    """Of the stage, as the log has it."""

    folder: Path
    """Where its checkpoints are."""

    steps: int
    """The last step."""

    update: Callable[[Any, Any], tuple[Any, Mapping[str, jax.Array]]]
    """`(state, chunk.placed) -> (state, metrics)`; the state is donated and has a `step`."""

    chunks: Callable[[int], Iterator[Chunk]]
    """What the updates after a step are given, up to the last."""

    evaluate: Callable[[Any], dict[str, float]] | None
    """Validation figures of a state; None: there is nothing to validate on."""

    position: Mapping[str, Any]
    """What has to be the same when the stage is resumed, besides the shapes of its state."""

    eval_every: int = 0
    """Steps between evaluations; 0: only at the end."""

    evaluate_first: bool = False
    """Whether a run that begins is evaluated before its first step."""

    select: str = ""
    """Validation figure whose best checkpoint is the result; empty: the last step is."""

    largest: bool = False
    """Whether the best is the largest."""


def run(
    work: Work, state: Any, policy: Policy, log: Log, profiler: Profiler
) -> tuple[Any, int, Recorder]:
    """`(state, step, recorder)` of the stage's result; what checkpoints it has is not done again.

    Evaluations, checkpoints and lines of the log fall on the ends of chunks: where a chunk holds the
    step that one is due at, it is done at the chunk's end.

    Raises:
      InputError: if what is saved is of another run.
      TrainingStopped: after `max_bad_steps` steps in a row that were not finite.
      preemption.Interrupted: on SIGTERM or SIGINT, once the step was saved; a `KeyboardInterrupt`.
    """
    with (
        checkpoint.open_manager(
            work.folder / "checkpoints",
            select=work.select,
            largest=work.largest,
            keep_latest=policy.keep_latest,
            keep_best=policy.keep_best,
            keep_every=policy.keep_every,
        ) as manager,
        progress(work.name, work.steps) as advance,
        contextlib.closing(profiler),
        preemption.watch() as stop,
    ):
        recorder = Recorder(
            log, work.name, work.steps, advance,
            log_every=policy.log_every, max_bad_steps=policy.max_bad_steps,
        )  # fmt: skip

        # resume
        resumed = manager.latest_step() is not None
        if resumed:
            state, saved = checkpoint.restore(manager, state)
            _check_position(saved, work.position, work.folder)
            recorder.resume(saved["recorder"])
        step = int(state.step)
        if step > work.steps:
            raise InputError(
                f"{work.folder} was trained for {step} steps, {work.steps} are asked for: raise the "
                "steps, or give another --workdir"
            )
        log.rewind(work.name, step if resumed else -1)
        advance(step)

        def evaluate(step: int) -> dict[str, float]:
            if work.evaluate is None:
                return {}
            report = work.evaluate(state)
            log.write(work.name, step, {f"validation/{k}": v for k, v in report.items()})
            return report

        if step == 0 and work.evaluate_first and not resumed:
            evaluate(0)
        for chunk in recorder.waiting(work.chunks(step)):
            profiler.before(step + 1, recorder.flush)
            with jax.profiler.StepTraceAnnotation("train", step_num=step + 1):
                state, metrics = work.update(state, chunk.placed)
            before, step = step, step + chunk.steps
            recorder.add(step, metrics, chunk)
            profiler.after(step, recorder.flush)
            last, signal = step == work.steps, stop(step)
            report: dict[str, float] = {}
            if work.evaluate is not None and (last or is_due(before, step, work.eval_every)):
                recorder.flush()
                report = evaluate(step)
            if last or report or signal or is_due(before, step, policy.checkpoint_every):
                recorder.flush()
                saved = {**work.position, "step": step, "recorder": recorder.state}
                checkpoint.save(manager, step, state, saved, report)
            if signal:
                checkpoint.wait(manager)
                raise preemption.Interrupted(
                    f"stopped at step {step} of stage {work.name!r}, which is saved; the same "
                    "command goes on from there",
                    signal,
                )
        checkpoint.wait(manager)

        # result
        best = manager.best_step() if work.select else None
        if best not in (None, step):
            step = best
            state, _ = checkpoint.restore(manager, state, step)
    return state, step, recorder


MEANINGS = {
    "seed": "with another seed",
    "data": "on other training data",
    "batches": "in other batches",
    "start": "from other parameters (another model, or an earlier stage that has changed since)",
    "lora": "with other adapters",
    "runs": "of other runs",
}
"""What it means that an entry of a position has changed."""


def _check_position(saved: Mapping[str, Any], expected: Mapping[str, Any], folder: Path) -> None:
    for name, meaning in MEANINGS.items():
        before, now = saved.get(name), expected.get(name)
        if before != now:
            raise InputError(
                f"{folder} was trained {meaning}: {before} then, {now} now. Give "
                f"another --workdir, or delete {folder} to train the stage anew"
            )
