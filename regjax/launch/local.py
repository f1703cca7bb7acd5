"""Processes on this machine, and over ssh on others: what each is started with."""

from __future__ import annotations

import os
import random
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from regjax.distributed import COORDINATOR, PROCESS, PROCESSES
from regjax.errors import InputError
from regjax.launch.supervise import Command
from regjax.lifeline import LIFELINE

SSH = (
    "ssh",
    "-T",
    "-o",
    "BatchMode=yes",
    "-o",
    "ConnectTimeout=20",
    "-o",
    "ServerAliveInterval=10",
)

FORWARDED = re.compile(
    r"(JAX|XLA|LIBTPU|NCCL|GLOO|CUDA|HF|TRANSFORMERS|XDG)_\w+|PYTHONPATH|TF_CPP_\w+"
)
SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|KEY")
OURS = (COORDINATOR, PROCESSES, PROCESS, LIFELINE, "CUDA_VISIBLE_DEVICES", "PYTHONUNBUFFERED")


class Host(NamedTuple):
    """A line of a hosts file."""

    address: str
    """What ssh connects to: `[user@]name`."""
    slots: int = 1
    """Processes there; with several, each is given the GPU of its number."""


def local_commands(
    count: int, program: Sequence[str], environment: Mapping[str, str], save_seconds: float
) -> list[Command]:
    """`count` processes here, each with its share of the GPUs where there are any, else of the cores."""
    shares = _shares_of_gpus(count)
    pins = [()] * count if shares else _shares_of_cores(count)
    address = f"127.0.0.1:{_free_port()}"
    commands = []
    for process in range(count):
        own = {**environment, **_job(address, count, process, save_seconds)}
        if shares:
            own["CUDA_VISIBLE_DEVICES"] = ",".join(shares[process])
        settings = [f"{name}={value}" for name, value in own.items()]
        argv = ("env", *settings, *pins[process], *program)
        commands.append(Command(str(process), argv))
    return commands


def host_commands(
    hosts: Sequence[Host],
    program: Sequence[str],
    environment: Mapping[str, str],
    folder: str,
    coordinator: str,
    save_seconds: float,
) -> list[Command]:
    """Processes on hosts, each started by an ssh of its own in the same folder and environment."""
    first = coordinator or hosts[0].address.rpartition("@")[2]
    # Which ports are free there is not known here; one that is taken costs a restart.
    address = f"{first}:{random.SystemRandom().randrange(20_000, 60_000)}"
    places = [(host, slot) for host in hosts for slot in range(host.slots)]
    commands = []
    for process, (host, slot) in enumerate(places):
        own = {**environment, **_job(address, len(places), process, save_seconds)}
        if host.slots > 1:
            own["CUDA_VISIBLE_DEVICES"] = str(slot)
        script = remote_script(program, own, folder)
        name = f"{process} {host.address.rpartition('@')[2]}"
        commands.append(Command(name, (*SSH, host.address, script), remote=True))
    return commands


def remote_script(program: Sequence[str], environment: Mapping[str, str], folder: str) -> str:
    """A line of POSIX shell that becomes the program, in its folder and environment."""
    settings = [f"{name}={value}" for name, value in environment.items()]
    return f"cd {shlex.quote(folder)} && exec {shlex.join(['env', *settings, *program])}"


def read_hosts(path: Path) -> list[Host]:
    """The hosts of a file: `[user@]host [slots=N]` a line, `#` begins a comment.

    Raises:
      InputError: for a file that cannot be read, a line of another form, or no host.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--hosts {path} cannot be read: {error}") from error
    hosts = []
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        # No option of ssh's in place of a host.
        found = re.fullmatch(r"([\w.@:%][\w.@:%-]*)(?:\s+slots=([1-9]\d*))?", text)
        if not found:
            raise InputError(f"{path}:{number}: {text!r}: expected [user@]host [slots=N]")
        hosts.append(Host(found[1], int(found[2] or 1)))
    if not hosts:
        raise InputError(f"{path} holds no host: expected [user@]host [slots=N] a line")
    return hosts


def environment_for(extra: Sequence[str]) -> dict[str, str]:
    """What processes elsewhere are given of this environment, and what `--env` adds.

    jax's and XLA's variables and their like are; none whose name says that it is a secret.

    Raises:
      InputError: for an `--env` without a name, or of a variable that is not set here.
    """
    found = {
        name: value
        for name, value in sorted(os.environ.items())
        if FORWARDED.fullmatch(name) and not SECRET.search(name) and name not in OURS
    }
    return {**found, **given_environment(extra)}


def given_environment(extra: Sequence[str]) -> dict[str, str]:
    """`NAME=VALUE`, or `NAME` for the value it has here."""
    found = {}
    for entry in extra:
        name, equals, value = entry.partition("=")
        if not re.fullmatch(r"[A-Za-z_]\w*", name):
            raise InputError(f"--env {entry!r}: expected NAME=VALUE or NAME")
        if not equals and name not in os.environ:
            raise InputError(f"--env {name}: it is not set here; give {name}=VALUE")
        found[name] = value if equals else os.environ[name]
    return found


def _job(address: str, count: int, process: int, save_seconds: float) -> dict[str, str]:
    return {
        COORDINATOR: address,
        PROCESSES: str(count),
        PROCESS: str(process),
        LIFELINE: f"{save_seconds:g}",
        "PYTHONUNBUFFERED": "1",
    }


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _shares_of_gpus(count: int) -> list[list[str]]:
    """The GPUs of each process; empty where there are none, or jax is told to use something else."""
    if os.environ.get("JAX_PLATFORMS", "cuda").split(",")[0] not in ("cuda", "gpu"):
        return []
    gpus = _gpus()
    if gpus and len(gpus) % count:
        raise InputError(
            f"--local {count}: {len(gpus)} GPUs cannot be shared equally; take a number that divides "
            "them, or choose some with CUDA_VISIBLE_DEVICES"
        )
    each = len(gpus) // count
    return [gpus[i * each : (i + 1) * each] for i in range(count)] if gpus else []


def _gpus() -> list[str]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name]
    if not shutil.which("nvidia-smi"):
        return []
    listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True)
    lines = [line for line in listed.stdout.splitlines() if line.startswith("GPU ")]
    return [str(index) for index in range(len(lines))] if listed.returncode == 0 else []


def _shares_of_cores(count: int) -> list[tuple[str, ...]]:
    """What pins each process to its share of the cores, where there are enough and Linux can."""
    if not (shutil.which("taskset") and sys.platform == "linux"):
        return [()] * count
    cores = sorted(os.sched_getaffinity(0))
    each = len(cores) // count
    if count == 1 or not each:
        return [()] * count
    shares = [cores[i * each : (i + 1) * each] for i in range(count)]
    return [("taskset", "--cpu-list", ",".join(map(str, share))) for share in shares]
