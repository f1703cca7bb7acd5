"""The command line: `regjax COMMAND ...`."""

import errno
import os
import sys
import traceback
from collections.abc import Callable, Sequence

from regjax import distributed, lifeline
from regjax.commands.plan import plan
from regjax.commands.show import grid, plot
from regjax.commands.sweep import sweep
from regjax.commands.train import train
from regjax.commands.trained import evaluate, export, predict
from regjax.errors import InputError
from regjax.preemption import Interrupted
from regjax.recorder import TrainingStopped

BAD_INPUT, FAILED, INTERRUPTED = 2, 1, 130
WRONG_PATH = (
    PermissionError,
    FileNotFoundError,
    FileExistsError,
    NotADirectoryError,
    IsADirectoryError,
)
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit status.

    It is 0, 2 for bad input, 1 for a run that had to stop, 130 and 143 for one that SIGINT and SIGTERM
    stopped, and `distributed.CRASHED` for a process of a job of several that failed otherwise.
    """
    lifeline.hold()
    try:
        status = _run(list(sys.argv[1:] if arguments is None else arguments))
    except Interrupted as error:
        # All processes of a job have come here, at the same step.
        _complain(str(error))
        return 128 + error.signal
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(bool(error.code))
        if not distributed.is_part():
            raise
    except Exception:
        if not distributed.is_part():
            raise
        traceback.print_exc()
        status = distributed.CRASHED
    if status and distributed.is_part():
        distributed.leave(status)
    return status


def _run(arguments: Sequence[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview())
        return 0 if arguments else BAD_INPUT
    if arguments[0] == "--version":
        import importlib.metadata

        print(importlib.metadata.version("regjax"))
        return 0
    name, rest = arguments[0], arguments[1:]
    if name not in COMMANDS:
        _complain(f"no command {name!r}; the commands are {', '.join(COMMANDS)}")
        return BAD_INPUT
    try:
        if name in OF_SEVERAL_PROCESSES and not {"-h", "--help"} & {*rest}:
            distributed.initialize()
        COMMANDS[name](rest)
    except InputError as error:
        _complain(str(error))
        return BAD_INPUT
    except Interrupted:
        raise
    except KeyboardInterrupt:
        _complain("interrupted; the same command goes on from the last checkpoint")
        return INTERRUPTED
    except TrainingStopped as error:
        _complain(str(error))
        return FAILED
    except BrokenPipeError:
        # Whoever read our output went away; nothing more can be said to them.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except OSError as error:
        if error.filename is None and error.errno not in NO_ROOM:
            raise
        if error.filename is None:
            _complain(f"{error.strerror}: make room, then give the same command again")
        else:
            _complain(f"{error.filename}: {error.strerror}")
        return BAD_INPUT if isinstance(error, WRONG_PATH) else FAILED
    return 0


def _complain(message: str) -> None:
    print(f"regjax: {message}", file=sys.stderr)


def _overview() -> str:
    lines = ["usage: regjax COMMAND ... (regjax COMMAND --help says more)", "", "commands:"]
    for name, command in COMMANDS.items():
        summary = (command.__doc__ or "").strip().splitlines()[0]
        lines.append(f"  {name:<9}{summary}")
    lines += ["", "first steps:", "  regjax train configs/quickstart.py --workdir runs/quickstart"]
    lines += ["  regjax plot runs/quickstart"]
    return "\n".join(lines)


def launch(arguments: Sequence[str]) -> None:
    """start train or predict on several hosts, GPUs or processes"""
    from regjax.launch.command import launch as run

    status = run(arguments)
    if status:
        raise SystemExit(status)


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "train": train,
    "sweep": sweep,
    "eval": evaluate,
    "predict": predict,
    "plan": plan,
    "export": export,
    "plot": plot,
    "grid": grid,
    "launch": launch,
}

OF_SEVERAL_PROCESSES = ("train", "predict")
"""The commands whose work is dealt out over the processes of a job."""
