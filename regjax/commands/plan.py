"""`regjax plan`."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from regjax.commands.configs import short_to_show
from regjax.errors import InputError

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
    default = dataclasses.replace(default, data=short_to_show(default.data))

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
