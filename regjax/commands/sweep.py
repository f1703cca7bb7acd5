"""`regjax sweep`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from regjax.commands.configs import WORKDIR, default_of, use_cores
from regjax.errors import InputError

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

    from regjax.sweep import points
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
    default = default_of(arguments[0])
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
    axes, seeds = {name: values for name, *values in given.grid}, int(given.seeds)
    use_cores([point.experiment for point in points(experiment, axes, seeds)])
    run(experiment, workdir, axes=axes, seeds=seeds)
    from regjax.sweep_plots import plot_sweep

    for path in plot_sweep(workdir):
        print(path)
