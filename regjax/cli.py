"""The command line: `regjax COMMAND ...`."""

import dataclasses
import errno
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from regjax import distributed, lifeline
from regjax.data import Data
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


WORKDIR = (
    "Folder for checkpoints, log, predictions, results and plots; a run that is there goes on."
)
PROFILE = (
    "Traces these steps of every stage with jax.profiler, first and last included, into "
    "WORKDIR/profile; open with `xprof --logdir WORKDIR/profile` (pip install xprof)."
)

TRAIN_USAGE = """usage: regjax train CONFIG [--field value ...] --workdir DIR

Runs the stages of an experiment; the same command goes on with a run that was stopped.

CONFIG is a Python file that sets `experiment = regjax.Experiment(...)`. Every field of it can be given
on the command line: `regjax train CONFIG --help` lists them with their values, for example
  regjax train configs/quickstart.py --steps 200 --optimizer.learning-rate 1e-3 --workdir runs/a"""


def train(arguments: Sequence[str]) -> None:
    """train a model: run the stages of a config"""
    import jax
    import tyro

    from regjax.profiling import parse_steps
    from regjax.train import train as run

    if not arguments or arguments[0].startswith("-"):
        print(TRAIN_USAGE)
        if not arguments or arguments[0] not in ("-h", "--help"):
            raise InputError("the first argument of train is the config file")
        return
    default = _default(arguments[0])
    kind = type(default)

    def parsed(
        workdir: Annotated[Path, tyro.conf.arg(help=WORKDIR)],
        experiment: Annotated[kind, tyro.conf.arg(name="")] = default,  # type: ignore[valid-type]
        profile: Annotated[str, tyro.conf.arg(help=PROFILE, metavar="START:STOP")] = "",
    ) -> tuple[Path, Any, str]:
        return workdir, experiment, profile

    workdir, experiment, profile = tyro.cli(
        parsed,
        prog=f"regjax train {arguments[0]}",
        description=f"Runs the stages of {arguments[0]}.",
        args=arguments[1:],
        config=(tyro.conf.AvoidSubcommands,),
    )
    _use_cores(experiment)
    run(experiment, workdir, profile=parse_steps(profile) if profile else None)
    if jax.process_index() > 0:
        return
    from regjax.plots import plot_workdir

    for path in plot_workdir(workdir):
        print(path)


def _default(config: str) -> Any:
    """The config's experiment, as `--help` may show it."""
    from regjax.experiment import load_config

    default = load_config(config)
    if isinstance(default.data, Data):
        return dataclasses.replace(default, data=_short_to_show(default.data))
    return default


def _use_cores(experiment: Any) -> None:
    from regjax.classification import ImageExperiment
    from regjax.cores import one_device_a_core

    if isinstance(experiment, ImageExperiment):
        one_device_a_core(experiment.batch_size)


SWEEP_USAGE = """usage: regjax sweep CONFIG --workdir DIR [--seeds N] [--grid FIELD VALUE ...] [--field value]

Runs a config for several seeds and every combination of the grids' values, and ends with one table (mean
and standard error over the seeds) and one plot. The same command goes on with a sweep that was stopped.

  regjax sweep configs/noisy_fashion.py --seeds 5 --workdir runs/noise
  regjax sweep CONFIG --seeds 3 --grid student.alpha 0 .5 .9 --grid data.noise.rate .2 .4 --workdir runs/b

FIELD is a field of the config, fields joined by dots, or STAGE.FIELD of a stage or of its objective.
Image experiments that differ in seed, label noise and numbers of their objectives alone are trained side by
side in one compiled program, as many as memory holds; all others one after another."""


def sweep(arguments: Sequence[str]) -> None:
    """run a config over seeds and grids of values, side by side where possible"""
    import argparse

    import tyro

    from regjax.sweep import sweep as run

    if not arguments or arguments[0].startswith("-"):
        print(SWEEP_USAGE)
        if not arguments or arguments[0] not in ("-h", "--help"):
            raise InputError("the first argument of sweep is the config file")
        return
    if {"-h", "--help"} & {*arguments}:
        print(SWEEP_USAGE)
        print()
    options = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    options.add_argument("--seeds", default="1")
    options.add_argument("--grid", action="append", nargs="+", default=[])
    given, rest = options.parse_known_args(arguments[1:])
    if not given.seeds.isdigit():
        raise InputError(f"--seeds is {given.seeds!r}; expected a number of seeds, such as 5")
    short = [names[0] for names in given.grid if len(names) < 2]
    if short:
        raise InputError(f"--grid {short[0]}: give the field and its values")
    default = _default(arguments[0])
    kind = type(default)

    def parsed(
        workdir: Annotated[Path, tyro.conf.arg(help=WORKDIR)],
        experiment: Annotated[kind, tyro.conf.arg(name="")] = default,  # type: ignore[valid-type]
    ) -> tuple[Path, Any]:
        return workdir, experiment

    workdir, experiment = tyro.cli(
        parsed,
        prog=f"regjax sweep {arguments[0]}",
        description=f"Runs {arguments[0]} over seeds and grids.",
        args=rest,
        config=(tyro.conf.AvoidSubcommands,),
    )
    _use_cores(experiment)
    run(
        experiment,
        workdir,
        axes={name: values for name, *values in given.grid},
        seeds=int(given.seeds),
    )
    from regjax.sweep_plots import plot_sweep

    for path in plot_sweep(workdir):
        print(path)


PLAN_USAGE = """usage: regjax plan CONFIG [--field value ...] [--topology v5e:4x4]

Compiles every stage's training step and scorer without making or reading a weight, and says what they
take: memory by what it is, operations, exchanges between chips, and how fast a step can be at best.

  regjax plan configs/quickstart.py                         for the devices of this machine
  regjax plan CONFIG --topology v5e:4x4                     for a TPU slice that need not be there
  regjax plan CONFIG --topology v5p:4x4x4 --mesh.fsdp -1 --mesh.data 1
                                                            with parameters dealt out over all chips
Slices: v4, v5e, v5p and v6e, such as v5e:2x2 ... v5e:16x16, v5p:2x2x1 ... v5p:4x4x8. They need the TPU's
compiler, pip install 'regjax[tpu]', on any x86 Linux machine; JAX_PLATFORMS=cpu where there is no TPU.

Training records that are not on this machine are taken to fill rows of data.max_length. For a step that
does not fit, changes are tried that would make it fit.

regjax plan CONFIG --help lists the fields of the config."""

TOPOLOGY = "A TPU slice such as v5e:4x4; empty: the devices at hand."
SAVE_HLO = "Folder for the text of the compiled programs."
PLAN_OUTPUT = "Where to write all figures as JSON."
REMEDIES = "Look for changes that make a step fit which does not; each is compiled."


def plan(arguments: Sequence[str]) -> None:
    """say what a run needs and how fast it could be, on a TPU that need not be there"""
    import tyro

    from regjax import plan as planning
    from regjax import plan_tables
    from regjax.experiment import Experiment, load_config
    from regjax.files import write_json
    from regjax.log import print_table

    if not arguments or arguments[0].startswith("-"):
        print(PLAN_USAGE)
        if not arguments or arguments[0] not in ("-h", "--help"):
            raise InputError("the first argument of plan is the config file")
        return
    default = load_config(arguments[0])
    if not isinstance(default, Experiment):
        raise InputError(f"{arguments[0]} is an image experiment; plan takes those on text")
    default = dataclasses.replace(default, data=_short_to_show(default.data))

    def parsed(
        topology: Annotated[str, tyro.conf.arg(help=TOPOLOGY)] = "",
        save_hlo: Annotated[Path | None, tyro.conf.arg(help=SAVE_HLO)] = None,
        output: Annotated[Path | None, tyro.conf.arg(help=PLAN_OUTPUT)] = None,
        remedies: Annotated[bool, tyro.conf.arg(help=REMEDIES)] = True,
        experiment: Annotated[Experiment, tyro.conf.arg(name="")] = default,
    ) -> tuple[str, Path | None, Path | None, bool, Experiment]:
        return topology, save_hlo, output, remedies, experiment

    topology, save_hlo, output, search, experiment = tyro.cli(
        parsed,
        prog=f"regjax plan {arguments[0]}",
        description=f"Plans the stages of {arguments[0]}.",
        args=arguments[1:],
        config=(tyro.conf.AvoidSubcommands,),
    )
    if output is not None and not output.parent.is_dir():
        raise InputError(f"{output.parent} is no folder: make it, or give another --output")

    def say(planned: planning.Planned) -> None:
        program = planned.program
        print(f"{program.name} {program.kind}, rows of {program.length}: compiled", file=sys.stderr)

    found = planning.plan(experiment, topology, save_hlo=save_hlo, on_program=say)
    for task in planning.absent_tasks(experiment):
        print(f"no records at {task.data.train}: rows of {task.data.max_length} tokens taken")
    print_table(plan_tables.title(found, experiment.name), plan_tables.memory_rows(found))
    speed = plan_tables.speed_rows(found)
    if speed:
        print_table("at the peaks of the chip, which nothing reaches", speed)
    for planned in found:
        exchanges = plan_tables.exchange_rows(planned)
        if exchanges:
            name = f"{planned.program.name} {planned.program.kind}"
            print_table(f"{name}: what chips exchange", exchanges)
    tried = []
    too_large = [one for one in found if one.program.kind == "step" and not one.fits]
    if too_large and search:
        stage = too_large[-1].program.name
        tried = [
            plan_tables.remedy_row(one) for one in planning.remedies(experiment, stage, topology)
        ]
        print_table(f"what would make {stage} fit, each with those above it", tried)
    if output is not None:
        write_json(output, {"programs": [one.to_json() for one in found], "remedies": tried})


class _InMemory(list):
    """Records given in the config, which --help would print in full otherwise."""

    def __str__(self) -> str:
        return f"{len(self)} records in memory"


def _short_to_show(data: Data) -> Data:
    sources = {name: getattr(data, name) for name in ("train", "validation", "test")}
    shown: dict[str, Any] = {
        name: _InMemory(source)
        for name, source in sources.items()
        if not isinstance(source, str | os.PathLike)
    }
    return dataclasses.replace(data, **shown)


def evaluate(arguments: Sequence[str]) -> None:
    """score a file with known scores and report every metric"""
    import tyro

    from regjax.evaluate import evaluate as run
    from regjax.evaluation import READ_OUTS, to_json
    from regjax.files import write_json
    from regjax.log import print_table

    def parsed(
        model: str,
        input: str,
        score_field: str = "score",
        columns: tuple[str, ...] = (),
        on_bad_record: Literal["stop", "skip"] = "stop",
        output: Path | None = None,
        batch_size: int = 64,
    ) -> None:
        """Scores records whose true score is known, and reports the metrics of every read-out.

        Args:
            model: A workdir, a stage's model folder, or an exported one.
            input: Records: .jsonl, .csv, .tsv (or .gz of one), or tfds:NAME:SPLIT.
            score_field: Field that holds the true score.
            columns: Names of the columns of a CSV or TSV without a header.
            on_bad_record: Records that cannot be used: stop, or skip and count them.
            output: Where to write the report as JSON.
            batch_size: Rows scored at once, rounded up to what divides among the devices.
        """
        if output is not None and not output.parent.is_dir():
            raise InputError(f"{output.parent} is no folder: make it, or give another --output")
        report = run(
            model, input, score_field=score_field, columns=columns,
            on_bad_record=on_bad_record, batch_size=batch_size,
        ).report  # fmt: skip
        figures = {name: name for name in ("rmse", "mae", "pearson", "spearman", "kendall")}
        figures["within 0.5"] = "accuracy_within"
        rows = [
            {"read-out": read_out.replace("normalized_", "norm. ")}
            | {label: report[f"{read_out}/{name}"] for label, name in figures.items()}
            for read_out in READ_OUTS
        ]
        title = (
            f"{Path(input).name}: {report['count']:.0f} records, {report['skipped']:.0f} skipped\n"
            f"standard deviation of the true scores: {report['target_std']:.3f}"
        )
        print_table(title, rows)
        shared = [
            {
                "the distribution's": name,
                "value": report[name],
                "95 % from": report[f"{name}_low"],
                "to": report[f"{name}_high"],
            }
            for name in ("crps", "coverage_90", "grid_mass")
        ]
        print_table("", shared)
        if output is not None:
            write_json(output, to_json(report))

    tyro.cli(parsed, prog="regjax eval", args=arguments)


def predict(arguments: Sequence[str]) -> None:
    """add score, distribution and grid mass to every record of a JSONL file"""
    import jax
    import tyro

    from regjax.predict import predict as run

    def parsed(
        model: str,
        input: Path,
        output: Path,
        read_out: Literal["", "mean", "normalized_mean", "median", "mode"] = "",
        batch_size: int = 64,
        on_bad_record: Literal["stop", "skip"] = "stop",
        overwrite: bool = False,
    ) -> None:
        """Scores the records of a JSONL file; a stopped call goes on where it was.

        Args:
            model: A workdir, a stage's model folder, or an exported one.
            input: Records with the fields of the model's template: .jsonl or .jsonl.gz.
            output: The same records with predicted_score, distribution, grid_mass and line.
            read_out: How a score is read from the distribution; empty: the model's own.
            batch_size: Rows scored at once, rounded up to what divides among the devices.
            on_bad_record: Records that cannot be used: stop, or skip and list them.
            overwrite: Replace an output that exists.
        """
        count = run(
            model, input, output, read_out=read_out, batch_size=batch_size,
            on_bad_record=on_bad_record, overwrite=overwrite,
        )  # fmt: skip
        if jax.process_index() == 0:
            print(f"{count} records scored: {output}")

    tyro.cli(parsed, prog="regjax predict", args=arguments)


def export(arguments: Sequence[str]) -> None:
    """write a trained model as a folder that transformers and regjax load"""
    import tyro

    from regjax.reader import export as run

    def parsed(
        workdir: Path, output: Path, dtype: Literal["float32", "bfloat16"] = "float32"
    ) -> None:
        """Writes config.json, model.safetensors, the tokenizer and regjax.json.

        Args:
            workdir: A workdir (its last stage) or a stage's folder in it.
            output: The folder to write; must not exist.
            dtype: Type of the weights.
        """
        run(workdir, output, dtype=dtype)
        print(output)

    tyro.cli(parsed, prog="regjax export", args=arguments)


def plot(arguments: Sequence[str]) -> None:
    """draw a run: learning curve, predicted against true, reliability, error by score"""
    import tyro

    from regjax.plots import plot_workdir

    def parsed(workdir: Annotated[Path, tyro.conf.Positional]) -> None:
        """Draws what a run left behind as PNG files.

        Args:
            workdir: The folder given to `regjax train --workdir`.
        """
        for path in plot_workdir(workdir):
            print(path)

    tyro.cli(parsed, prog="regjax plot", args=arguments)


def grid(arguments: Sequence[str]) -> None:
    """show how a tokenizer writes the values of a score grid"""
    import tyro

    from regjax.data import load_tokenizer
    from regjax.log import print_table
    from regjax.scores import ScoreGrid

    def parsed(tokenizer: str, values: str, prefix: str = "", text: str = "{}") -> None:
        """Prints the tokens of every value after a prefix, or says which value cannot be told apart.

        Args:
            tokenizer: Folder or hub id.
            values: 0:100, 0:5:0.1 (start:stop:step, the end included) or 1,2.5,10.
            prefix: The text that stands before the score.
            text: Pattern around each number, such as " {}" for a space before it.
        """
        loaded = load_tokenizer(tokenizer)
        codec = ScoreGrid.parse(values, text=text).tokenize(loaded, prefix)
        rows = [{**row._asdict(), "value": f"{row.value:.9g}"} for row in codec.table(loaded)]
        print_table(f"{len(rows)} values after {prefix!r}", rows)
        if codec.terminator is not None:
            print(f"terminator: token {codec.terminator} ends every value")

    tyro.cli(parsed, prog="regjax grid", args=arguments)


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
