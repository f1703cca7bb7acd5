"""What a cluster is given: a script for Slurm, a JobSet for GKE, a shell command for all hosts of a TPU."""

from __future__ import annotations

import dataclasses
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from regjax.distributed import FINAL, FINAL_STATUS
from regjax.errors import InputError
from regjax.launch.supervise import Command


@dataclasses.dataclass(frozen=True)
class Slurm:
    """With --slurm."""

    nodes: int = 1
    """Slurm: machines."""
    gpus_per_node: int = 0
    """Slurm: GPUs of each, and processes; 0: one process a node that takes what it finds."""
    cpus_per_task: int = 0
    """Slurm: cores of each process; 0: what the cluster gives."""
    time: str = ""
    """Slurm: time limit, such as 12:00:00; the run is saved --save-seconds before it."""
    partition: str = ""
    """Slurm: partition."""
    account: str = ""
    """Slurm: account."""
    sbatch_options: tuple[str, ...] = ()
    """Slurm: any other options of sbatch: qos=high constraint=a100."""


@dataclasses.dataclass(frozen=True)
class Gke:
    """With --gke."""

    image: str = ""
    """GKE: container image with regjax and jax[tpu] installed."""
    topology: str = ""
    """GKE: TPU generation and shape of a slice, as for `regjax plan`: v5e:4x4, v5p:2x2x4, v6e:2x4."""
    slices: int = 1
    """GKE: slices of that shape."""
    chips_per_host: int = 0
    """GKE: chips of a node; 0: as GKE makes nodes of several (4, or all of a smaller slice)."""
    claim: str = ""
    """GKE: CLAIM:/PATH, a PersistentVolumeClaim that all hosts share, and where it is mounted."""
    namespace: str = ""
    """GKE: namespace, where it is not kubectl's."""


def sbatch_script(
    program: Sequence[str],
    environment: Mapping[str, str],
    options: Slurm,
    *,
    name: str,
    folder: str,
    max_restarts: int,
    save_seconds: float,
) -> str:
    """A batch script: `srun` of the program, again from the last checkpoint where a process died.

    Slurm sends SIGTERM to the script before the time limit and when the job is preempted; it is passed
    on to the processes, which save and end.

    Raises:
      InputError: for an option that would not be one word.
    """
    asked = {
        "job-name": name,
        "nodes": str(options.nodes),
        "ntasks-per-node": str(options.gpus_per_node or 1),
        "gpus-per-node": str(options.gpus_per_node or ""),
        "cpus-per-task": str(options.cpus_per_task or ""),
        "time": options.time,
        "partition": options.partition,
        "account": options.account,
        "output": "%x-%j.log",
        "open-mode": "append",
        "signal": f"B:TERM@{math.ceil(save_seconds)}",
    }
    lines = [f"--{option}={value}" for option, value in asked.items() if value]
    lines += ["--requeue", *(f"--{option}" for option in options.sbatch_options)]
    for line in lines:
        if not re.fullmatch(r"--[a-z][\w-]*(=[^\s\"'#\\]+)?", line):
            raise InputError(f"sbatch option {line!r}: expected NAME=VALUE of no blanks or quotes")
    cores = 'export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"\n' if options.cpus_per_task else ""
    exports = "".join(f"export {n}={shlex.quote(value)}\n" for n, value in environment.items())
    header = "".join(f"#SBATCH {line}\n" for line in lines)
    return f"""#!/bin/bash
{header}
cd {shlex.quote(folder)} || exit 2
export PYTHONUNBUFFERED=1
{exports}{cores}
# srun reports the highest status of all tasks, which may be that of those it has ended itself; here a
# process says that starting it again would not help.
export {FINAL_STATUS}="$PWD/.{name}-$SLURM_JOB_ID.status"
rm -f "${FINAL_STATUS}"

# Before the time limit and on preemption: the processes save, and are not started again.
stopped=
step=
trap 'stopped=yes; test -n "$step" && kill -TERM "$step"' TERM

for attempt in {" ".join(map(str, range(max_restarts + 1)))}; do
    export JAX_COORDINATOR_PORT=$((20000 + (SLURM_JOB_ID * 16 + attempt) % 40000))
    srun --kill-on-bad-exit=1 --label {shlex.join(program)} &
    step=$!
    wait "$step"
    status=$?
    # A signal ends the wait, not the step.
    while kill -0 "$step" 2>/dev/null; do
        wait "$step"
        status=$?
    done
    step=
    if test -s "${FINAL_STATUS}"; then
        status=$(cat "${FINAL_STATUS}")
        rm -f "${FINAL_STATUS}"
        break
    fi
    if test "$status" -le {max(FINAL)} || test -n "$stopped"; then
        break
    fi
    echo "attempt $attempt ended with exit status $status" >&2
done
exit "$status"
"""


# Chips of a node of several, see "Plan TPUs in GKE" in Google's documentation.
ACCELERATORS = {
    "v4": "tpu-v4-podslice",
    "v5e": "tpu-v5-lite-podslice",
    "v5p": "tpu-v5p-slice",
    "v6e": "tpu-v6e-slice",
}


def job_set(
    program: Sequence[str],
    environment: Mapping[str, str],
    options: Gke,
    *,
    name: str,
    folder: str,
    max_restarts: int,
    save_seconds: float,
) -> dict[str, Any]:
    """A JobSet (`jobset.x-k8s.io/v1alpha2`) of one Job a slice and one pod a host.

    All start again when a pod fails, but not after an exit status in `FINAL`.

    Raises:
      InputError: for what is missing, or a slice that does not divide into hosts.
    """
    if not options.image:
        raise InputError("--gke needs --image: a container image with regjax and jax[tpu]")
    if not re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", name):
        raise InputError(
            f"--name {name!r}: expected at most 40 of a-z, 0-9 and -, beginning with a letter"
        )
    generation, _, shape = options.topology.partition(":")
    if generation not in ACCELERATORS or not re.fullmatch(r"\d+(x\d+){1,2}", shape):
        known = ", ".join(ACCELERATORS)
        raise InputError(
            f"--topology {options.topology!r}: expected a generation of {known} and a shape, v5e:4x4"
        )
    chips = math.prod(map(int, shape.split("x")))
    per_host = options.chips_per_host or min(chips, 4)
    if chips % per_host:
        raise InputError(
            f"{chips} chips of {options.topology} are no multiple of {per_host} a host"
        )
    container: dict[str, Any] = {
        "name": "regjax",
        "image": options.image,
        # Kubernetes puts the values of variables in the place of $(NAME), and $( in that of $$(.
        "command": [word.replace("$(", "$$(") for word in program],
        "env": [
            {"name": key, "value": value.replace("$(", "$$(")}
            for key, value in {"PYTHONUNBUFFERED": "1", **environment}.items()
        ],
        "resources": {"limits": {"google.com/tpu": per_host}},
    }
    pod: dict[str, Any] = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": math.ceil(save_seconds),
        "nodeSelector": {
            "cloud.google.com/gke-tpu-accelerator": ACCELERATORS[generation],
            "cloud.google.com/gke-tpu-topology": shape,
        },
        "containers": [container],
    }
    if folder:
        container["workingDir"] = folder
    if options.claim:
        claim, _, path = options.claim.partition(":")
        if not (claim and path.startswith("/")):
            raise InputError(f"--claim {options.claim!r}: expected CLAIM:/PATH")
        container["volumeMounts"] = [{"name": "shared", "mountPath": path}]
        pod["volumes"] = [{"name": "shared", "persistentVolumeClaim": {"claimName": claim}}]
    final = {"containerName": "regjax", "operator": "In", "values": list(FINAL)}
    job = {
        "completionMode": "Indexed",
        "completions": chips // per_host,
        "parallelism": chips // per_host,
        "backoffLimit": 0,
        "podFailurePolicy": {"rules": [{"action": "FailJob", "onExitCodes": final}]},
        "template": {"spec": pod},
    }
    rule = {
        "name": "said_what_is_wrong",
        "action": "FailJobSet",
        "onJobFailureReasons": ["PodFailurePolicy"],
    }
    metadata: dict[str, Any] = {
        "name": name,
        "annotations": {
            "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
        },
    }
    if options.namespace:
        metadata["namespace"] = options.namespace
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {
            "failurePolicy": {"maxRestarts": max_restarts, "rules": [rule]},
            "replicatedJobs": [
                {"name": "slice", "replicas": options.slices, "template": {"spec": job}}
            ],
        },
    }


def tpu_command(
    tpu: str,
    zone: str,
    project: str,
    program: Sequence[str],
    environment: Mapping[str, str],
    *,
    name: str,
    folder: str,
) -> Command:
    """One gcloud that runs the program on all hosts of a Cloud TPU; jax there knows how many they are.

    Each host ends what an earlier start has left there before it begins, since a connection that breaks
    does not.
    """
    settings = [f"{key}={value}" for key, value in {"PYTHONUNBUFFERED": "1", **environment}.items()]
    become = f"cd {shlex.quote(folder or '.')} && exec {shlex.join(['env', *settings, *program])}"
    begin = f'echo $$ > "$0"; {become}'
    held = f'held="$HOME/.{name}.pid"; old=$(cat "$held" 2>/dev/null)'

    def end(signal: str) -> str:
        return (
            f'test -n "$old" && grep -qs regjax "/proc/$old/cmdline" && kill -{signal} -- "-$old"'
        )

    start = (
        f'{held}; {end("KILL")}; setsid --wait bash -c {shlex.quote(begin)} "$held" '
        '</dev/null 2>&1 | sed -u "s/^/[$(hostname)] /"; exit "${PIPESTATUS[0]}"'
    )

    def gcloud(script: str) -> tuple[str, ...]:
        where = ["--zone", zone, *(["--project", project] if project else [])]
        on_all = ["--worker", "all", "--batch-size", "all"]
        # The login shell may be another one.
        command = ["--command", shlex.join(["bash", "-c", script])]
        return ("gcloud", "compute", "tpus", "tpu-vm", "ssh", tpu, *where, *on_all, *command)

    return Command(
        "",
        gcloud(start),
        remote=True,
        terminate=gcloud(f"{held}; {end('TERM')}"),
        kill=gcloud(f"{held}; {end('KILL')}"),
    )
