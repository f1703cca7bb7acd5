"""`regjax train`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from regjax.commands.configs import WORKDIR, default_of, use_cores
from regjax.errors import InputError

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
    default = default_of(arguments[0])
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
    use_cores([experiment])
    run(experiment, workdir, profile=parse_steps(profile) if profile else None)
    if jax.process_index() > 0:
        return
    from regjax.plots import plot_workdir

    for path in plot_workdir(workdir):
        print(path)
