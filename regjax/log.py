"""What a run says: JSONL always, TensorBoard and Weights & Biases by extras, progress on a terminal."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from regjax.errors import InputError
from regjax.files import write_text


class Log:
    """Appends one JSON object a line to `workdir/log.jsonl`, and hands numbers to the other sinks.

    Of several processes the first alone does.
    """

    def __init__(self, workdir: Path, sinks: Sequence[str] = ()) -> None:
        self.path = workdir / "log.jsonl"
        self._writes = jax.process_index() == 0
        self._sinks = [_open_sink(name, workdir) for name in sinks] if self._writes else []

    def write(self, stage: str, step: int, entries: Mapping[str, Any]) -> None:
        if not self._writes:
            return
        line = json.dumps({"stage": stage, "step": step, **entries}, allow_nan=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        numbers = {
            f"{stage}/{name}": value
            for name, value in entries.items()
            if isinstance(value, int | float)
        }
        for sink in self._sinks:
            sink(step, numbers)

    def rewind(self, stage: str, step: int) -> None:
        """Drops the lines of `stage` after `step`, which a resumed run writes again, and cut-off ones."""
        if not self._writes or not self.path.is_file():
            return
        lines = read_log(self.path)
        kept = [line for line in lines if line["stage"] != stage or line["step"] <= step]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        if text != self.path.read_text(encoding="utf-8"):
            write_text(self.path, text)


def read_log(path: Path) -> list[dict[str, Any]]:
    """The log's lines; one cut off by a killed process is left out."""
    if not path.is_file():
        return []
    lines = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            entry = json.loads(line)
            # A cut-off line may be JSON of its own, such as a number.
            if isinstance(entry, dict):
                lines.append(entry)
    return lines


Sink = Callable[[int, Mapping[str, float]], None]


def _open_sink(name: str, workdir: Path) -> Sink:
    try:
        if name == "tensorboard":
            import tensorboardX

            writer = tensorboardX.SummaryWriter(str(workdir / "tensorboard"))

            def to_tensorboard(step: int, numbers: Mapping[str, float]) -> None:
                for key, value in numbers.items():
                    writer.add_scalar(key, value, step)
                writer.flush()

            return to_tensorboard
        if name == "wandb":
            import wandb

            run = wandb.init(project="regjax", name=workdir.name, dir=str(workdir))
            return lambda step, numbers: run.log(dict(numbers), step=step)
    except ImportError as error:
        raise InputError(
            f"logging to {name} needs its package: pip install 'regjax[{name}]'"
        ) from error
    raise InputError(f"unknown logger {name!r}; known: tensorboard, wandb")


@contextlib.contextmanager
def progress(description: str, total: int | None, done: int = 0) -> Iterator[Callable[..., None]]:
    """A progress bar on stderr where that is a terminal or a notebook, and nothing elsewhere.

    Yields `advance(count=1, note="")`.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
        disable=jax.process_index() > 0 or not (console.is_terminal or console.is_jupyter),
    )
    with bar:
        task = bar.add_task(description, total=total, completed=done, note="")

        def advance(count: int = 1, note: str = "") -> None:
            bar.update(task, advance=count, note=note)

        yield advance


def print_table(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Prints rows of equal keys as a table; numbers with three decimals, right-aligned.

    It is as wide as it needs to be where the output is no terminal.
    """
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for name in rows[0] if rows else ():
        number = all(isinstance(row[name], int | float | None) for row in rows)
        table.add_column(name, justify="right" if number else "left")
    for row in rows:
        table.add_row(*(_cell(value) for value in row.values()))
    console = Console()
    if not console.is_terminal:
        console.width = 1000
    console.print(table)


def _cell(value: Any) -> str:
    if value is None or value != value:
        return "undefined"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
