"""The command `regjax launch`: its options, and what each place is given."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import tyro

from regjax.errors import InputError
from regjax.files import write_text
from regjax.launch import clusters, local
from regjax.launch.supervise import Command, supervise

USAGE = """Starts `regjax train` or `regjax predict` as one job of several processes. What stands after --
is the command, as it would be given on one machine:

  regjax launch --local 4 -- train CONFIG --workdir DIR
      processes here, one per GPU or sharing the cores
  regjax launch --hosts FILE -- train CONFIG --workdir DIR
      over ssh; FILE holds [user@]host [slots=N] a line
  regjax launch --slurm --nodes 2 --gpus-per-node 8 --time 12:00:00 -- train CONFIG --workdir DIR
      writes a batch script and submits it
  regjax launch --tpu NAME --zone ZONE -- train CONFIG --workdir DIR
      all hosts of a Cloud TPU, by gcloud
  regjax launch --gke --image IMAGE --topology v5e:4x4 -- train CONFIG --workdir DIR
      writes a JobSet for kubectl

Hosts need the same installation, and a folder that all share for the workdir. With --dry-run what would run
is printed, and nothing else is done. When a process dies the others are stopped and all go on from the last
checkpoint; after bad input (exit status 2) and a run that had to stop (1) they do not. Ctrl-C and SIGTERM are
passed on: the run is saved at the same step by all, and the same command goes on from there."""

LAUNCHED = ("train", "predict")
NO_SLURM, NO_GKE = clusters.Slurm(), clusters.Gke()


@dataclasses.dataclass(frozen=True)
class Launch:
    local: int = 0
    """Processes on this machine."""
    hosts: str = ""
    """File of hosts that ssh reaches without a password."""
    slurm: bool = False
    """A job of Slurm's."""
    tpu: str = ""
    """Name of a Cloud TPU (a pod too)."""
    gke: bool = False
    """A JobSet on Google Kubernetes Engine."""
    dry_run: bool = False
    """Print what would run: commands, a batch script or a manifest."""
    max_restarts: int = 3
    """How often all are started again after one has died."""
    save_seconds: float = 120
    """Time to save after SIGTERM, before what still runs is killed."""
    env: tuple[str, ...] = ()
    """NAME=VALUE for every process, or NAME for the value it has here."""
    name: str = "regjax"
    """Name of the job of Slurm or GKE, and of the file that is written: NAME.sbatch, NAME.yaml."""
    folder: str = ""
    """Where the command runs elsewhere; by default here (ssh, Slurm), the home folder (TPU), the image's."""
    python: str = ""
    """Interpreter elsewhere; by default this one (ssh, Slurm), python3 (TPU, GKE)."""
    coordinator: str = ""
    """Name or address under which the hosts reach the first of them, where it is not ssh's."""
    zone: str = ""
    """Zone of the Cloud TPU."""
    project: str = ""
    """Project of the Cloud TPU, where it is not gcloud's."""
    slurm_options: Annotated[clusters.Slurm, tyro.conf.arg(name="")] = NO_SLURM
    gke_options: Annotated[clusters.Gke, tyro.conf.arg(name="")] = NO_GKE


def launch(arguments: Sequence[str]) -> int:
    """Runs or writes what the options before `--` say of the command after it; returns the exit status.

    Raises:
      InputError: for options that do not fit together, or a command that is not launched.
    """
    arguments = list(arguments)
    split = arguments.index("--") if "--" in arguments else len(arguments)
    options = tyro.cli(
        Launch,
        prog="regjax launch",
        description=USAGE,
        args=arguments[:split],
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    _check(options, arguments[split + 1 :])
    command = ("-m", "regjax", *arguments[split + 1 :])
    if options.slurm:
        return _submit(options, command)
    if options.gke:
        return _write_job_set(options, command)
    return _supervise(options, command)


def _check(options: Launch, command: Sequence[str]) -> None:
    places = ("local", "hosts", "slurm", "tpu", "gke")
    chosen = [f"--{place}" for place in places if getattr(options, place)]
    if len(chosen) != 1:
        one_of = ", ".join(f"--{place}" for place in places)
        raise InputError(
            f"expected one of {one_of}; given: {' and '.join(chosen) or 'none'}. "
            "`regjax launch --help` shows an example of each"
        )
    if not command or command[0] not in LAUNCHED:
        raise InputError(
            f"after the options comes -- and the command, {' or '.join(LAUNCHED)}: "
            f"regjax launch {chosen[0]} ... -- train CONFIG --workdir DIR"
        )
    for name in ("local", "max_restarts", "save_seconds"):
        if getattr(options, name) < 0:
            raise InputError(f"--{name.replace('_', '-')} {getattr(options, name)} is negative")
    if not re.fullmatch(r"[A-Za-z][\w.-]*", options.name):
        raise InputError(f"--name {options.name!r}: expected letters, digits, - . _")
    if options.tpu and not options.zone:
        raise InputError(f"--tpu {options.tpu} needs its --zone")


def _supervise(options: Launch, command: Sequence[str]) -> int:
    commands = _commands(options, command)
    if options.dry_run:
        for one in commands():
            print(one)
        return 0
    return supervise(commands, max_restarts=options.max_restarts, save_seconds=options.save_seconds)


def _commands(options: Launch, command: Sequence[str]) -> Callable[[], list[Command]]:
    """What starts the processes, made anew for each attempt."""
    here = (options.python or sys.executable, *command)
    given = local.given_environment(options.env)
    seconds = options.save_seconds
    if options.local:
        return functools.partial(local.local_commands, options.local, here, given, seconds)
    if options.hosts:
        return functools.partial(
            local.host_commands,
            local.read_hosts(Path(options.hosts)),
            here,
            local.environment_for(options.env),
            options.folder or os.getcwd(),
            options.coordinator,
            seconds,
        )
    there = (options.python or "python3", *command)
    on_all_hosts = clusters.tpu_command(
        options.tpu, options.zone, options.project, there, given,
        name=options.name, folder=options.folder,
    )  # fmt: skip
    return lambda: [on_all_hosts]


def _submit(options: Launch, command: Sequence[str]) -> int:
    script = clusters.sbatch_script(
        (options.python or sys.executable, *command),
        local.given_environment(options.env),
        options.slurm_options,
        name=options.name,
        folder=options.folder or os.getcwd(),
        max_restarts=options.max_restarts,
        save_seconds=options.save_seconds,
    )
    if options.dry_run:
        print(script, end="")
        return 0
    path = Path(f"{options.name}.sbatch")
    write_text(path, script)
    if not shutil.which("sbatch"):
        raise InputError(f"there is no sbatch here; {path} is written: sbatch {path} submits it")
    return subprocess.run(["sbatch", str(path)], check=False).returncode


def _write_job_set(options: Launch, command: Sequence[str]) -> int:
    import yaml

    manifest = clusters.job_set(
        (options.python or "python3", *command),
        local.given_environment(options.env),
        options.gke_options,
        name=options.name,
        folder=options.folder,
        max_restarts=options.max_restarts,
        save_seconds=options.save_seconds,
    )
    text = yaml.safe_dump(manifest, sort_keys=False)
    if options.dry_run:
        print(text, end="")
        return 0
    path = Path(f"{options.name}.yaml")
    write_text(path, text)
    print(f"{path} is written: kubectl apply -f {path}")
    return 0
