"""One job of several processes: found before a device is touched, and left without waiting for the dead."""

from __future__ import annotations

import importlib.util
import os
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from regjax.errors import InputError

COORDINATOR, PROCESSES, PROCESS = (
    "JAX_COORDINATOR_ADDRESS",
    "JAX_NUM_PROCESSES",
    "JAX_PROCESS_ID",
)
"""The environment variables that say where process 0 is, how many there are, and which one this is."""

CRASHED = 70
"""Exit status of a process of a job that failed in a way that starting it again may help against."""

FINAL = (1, 2)
"""Exit statuses of a process that has said what is wrong: a run that had to stop, and bad input."""

FINAL_STATUS = "REGJAX_FINAL_STATUS"
"""Environment variable: a file for such a status, for launchers that see only one of the whole job."""

CONNECT_SECONDS = 300
HEARTBEAT_SECONDS = 30
# At its ordinary end a process waits for the others, who may have more to do. One that fails never
# gets there, see `leave`.
SHUTDOWN_SECONDS = 24 * 3600


def initialize(connect_seconds: float = CONNECT_SECONDS) -> bool:
    """Joins the processes of this job, if it has several; returns whether it has.

    The command line calls it. In Python it has to come before the first computation. It calls
    `jax.distributed.initialize` with no arguments under Slurm, Open MPI, Kubernetes and on TPU pods, with
    those of the environment (`JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES`, `JAX_PROCESS_ID`) where
    they are set, and not at all for a process on its own. `JAX_NUM_PROCESSES=1` says that it is.

    Args:
      connect_seconds: after so long without all of the others this process says so and ends.

    Raises:
      InputError: for settings that are not whole or contradict each other, and whatever a cluster
        does not tell.
    """
    import jax

    if jax.distributed.is_initialized():
        return True
    found = arguments(os.environ)
    asking = found is None and _on_cloud_tpu(os.environ)
    if found is None and not asking:
        return False
    found = found or {}
    where = found.get("coordinator_address") or "the first process"
    # jax would end the process itself, with a stack trace of C++.
    alarm = threading.Timer(connect_seconds, _give_up, (where, connect_seconds))
    alarm.daemon = True
    alarm.start()
    try:
        jax.distributed.initialize(
            **found,
            initialization_timeout=int(connect_seconds) + 60,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
        )
    except (ValueError, RuntimeError) as error:
        # What jax raises where it has found no cluster; any other error is one of several hosts.
        if asking and isinstance(error, ValueError):
            return False
        raise InputError(
            f"this looks like a process of a job of several, which cannot be joined: {error} Set "
            f"{COORDINATOR}=HOST:PORT, {PROCESSES} and {PROCESS}, or {PROCESSES}=1 for a process on "
            "its own"
        ) from error
    finally:
        alarm.cancel()
    return True


def arguments(environment: Mapping[str, str]) -> dict[str, Any] | None:
    """What `jax.distributed.initialize` is to be given: `{}` on a cluster it knows, None for no call.

    An allocation of a cluster is no job of several processes: one task of Slurm, one Cloud TPU host, a
    pod that is not of an Indexed Job.

    >>> arguments({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8"})
    >>> arguments({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "8"})
    {}
    """
    given = {n: environment[n] for n in (COORDINATOR, PROCESSES, PROCESS) if environment.get(n)}
    if given.get(PROCESSES) == "1":
        return None
    if len(given) == 3:
        return _explicit(*given.values())
    if PROCESSES in given or PROCESS in given:
        missing = next(n for n in (COORDINATOR, PROCESSES, PROCESS) if n not in given)
        raise InputError(
            f"{' and '.join(given)} {'is' if len(given) == 1 else 'are'} set and {missing} is not: "
            "set all three, or none of them"
        )
    # Open MPI first: where it was started by Slurm its processes see a step of Slurm's as well.
    size = environment.get("OMPI_COMM_WORLD_SIZE", "1")
    if size != "1":
        if "OMPI_MCA_orte_hnp_uri" in environment:
            return {}
        # Open MPI 5 no longer says where the first process is.
        if COORDINATOR in given:
            return _explicit(given[COORDINATOR], size, environment["OMPI_COMM_WORLD_RANK"])
        raise InputError(
            f"{size} processes of Open MPI 5, which does not say where the first one is: give "
            f"`mpirun -x {COORDINATOR}=HOST:PORT ...`, HOST the machine of rank 0 and PORT a free port"
        )
    if environment.get("SLURM_STEP_NUM_TASKS", "1") != "1":
        return {}
    if COORDINATOR in given:
        raise InputError(f"{COORDINATOR} is set, {PROCESSES} and {PROCESS} are not: set all three")
    if _on_tpu_pod(environment):
        return {}
    # Its completion index is what makes a pod one of several; jax asks Kubernetes for the rest.
    if "JOB_COMPLETION_INDEX" in environment and "KUBERNETES_SERVICE_HOST" in environment:
        return {} if importlib.util.find_spec("kubernetes") else None
    return None


def _explicit(coordinator: str, processes: str, process: str) -> dict[str, Any]:
    host, _, port = coordinator.rpartition(":")
    numbers = processes.isdecimal() and process.isdecimal() and port.isdecimal()
    if not (host and numbers and int(process) < int(processes)):
        raise InputError(
            f"{COORDINATOR}={coordinator}, {PROCESSES}={processes}, {PROCESS}={process}: expected "
            "HOST:PORT, a number of processes, and one from 0 up to below it"
        )
    return {
        "coordinator_address": coordinator,
        "num_processes": int(processes),
        "process_id": int(process),
        # Or jax would still ask a cluster which devices are this process's.
        "cluster_detection_method": "deactivate",
    }


def _on_tpu_pod(environment: Mapping[str, str]) -> bool:
    """Whether this is one of several TPU hosts whose names the environment holds, as on GKE."""
    hosts = _tpu_hosts(environment)
    if not hosts or not _wants_tpu(environment):
        return False
    return "," in hosts or environment.get("MEGASCALE_NUM_SLICES", "1") != "1"


def _on_cloud_tpu(environment: Mapping[str, str]) -> bool:
    """Whether this is a Cloud TPU machine; how many there are only its metadata server knows.

    Where there is no TPU chip, importing jax sets `TPU_SKIP_MDS_QUERY`; Colab sets it too.
    """
    if "TPU_SKIP_MDS_QUERY" in environment or environment.get(PROCESSES) == "1":
        return False
    alone = not _tpu_hosts(environment) and _wants_tpu(environment)
    return alone and importlib.util.find_spec("libtpu") is not None


def _wants_tpu(environment: Mapping[str, str]) -> bool:
    return environment.get("JAX_PLATFORMS", "tpu").split(",")[0] == "tpu"


def _tpu_hosts(environment: Mapping[str, str]) -> str:
    names = ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")
    found = next((environment[name] for name in names if environment.get(name)), "")
    # Where there is no TPU libtpu leaves a sentence there, for its child processes too.
    return "" if " " in found else found


def is_part() -> bool:
    """Whether this process belongs to a job, also one that has no other process yet, or no more than it."""
    import jax

    return PROCESSES in os.environ or jax.distributed.is_initialized()


def _give_up(where: str, seconds: float) -> None:
    print(
        f"regjax: not all processes of the job met at {where} within {seconds:g} s: start the others, "
        "and see that they can reach that address (firewall, host name, another coordinator's port)",
        file=sys.stderr,
    )
    leave(CRASHED)


def leave(status: int) -> NoReturn:
    """Ends this process at once; an ordinary exit would wait for the others, who wait for this one."""
    path = os.environ.get(FINAL_STATUS)
    if path and status in FINAL:
        Path(path).write_text(f"{status}\n", encoding="utf-8")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
