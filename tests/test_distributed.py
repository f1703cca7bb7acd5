"""Which processes join into one job, which do not, and what happens when they cannot."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from regjax import InputError
from regjax.distributed import CRASHED, arguments

ROOT = Path(__file__).resolve().parents[1]
EXPLICIT = {
    "JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234",
    "JAX_NUM_PROCESSES": "4",
    "JAX_PROCESS_ID": "3",
}
SLURM = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_NTASKS": "8"}
OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "2"}
GIVEN = {
    "coordinator_address": "10.0.0.1:1234",
    "num_processes": 4,
    "process_id": 3,
    "cluster_detection_method": "deactivate",
}
FOUND = {
    "nothing": ({}, None),
    "explicit": (EXPLICIT, GIVEN),
    "explicit in an allocation": ({**SLURM, **EXPLICIT, "SLURM_STEP_NUM_TASKS": "8"}, GIVEN),
    "said to be on its own": ({**SLURM, "SLURM_STEP_NUM_TASKS": "8", "JAX_NUM_PROCESSES": "1"}, None),
    "a shell in an allocation": (SLURM, None),
    "an interactive step": ({**SLURM, "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NODELIST": "a"}, None),
    "tasks of a step": ({**SLURM, "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NODELIST": "a"}, {}),
    "mpirun": ({**OPEN_MPI, "OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:1"}, {}),
    "mpirun -n 1": ({"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"}, None),
    "mpirun 5 started by Slurm": (
        {**OPEN_MPI, **SLURM, "SLURM_STEP_NUM_TASKS": "2", "JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234"},
        {**GIVEN, "process_id": 2},
    ),
    "Colab's TPU": ({"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}, None),
    "one host of GKE": ({"TPU_WORKER_HOSTNAMES": "a", "TPU_WORKER_ID": "0"}, None),
    "hosts of GKE": ({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "0"}, {}),
    "slices of GKE": ({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, {}),
    "hosts of GKE, on the CPU": ({"TPU_WORKER_HOSTNAMES": "a,b", "JAX_PLATFORMS": "cpu"}, None),
    "libtpu without a TPU": (
        {"TPU_WORKER_HOSTNAMES": "WARNING: could not determine TPU worker hostnames, please set it"},
        None,
    ),
    "a pod": ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),
}  # fmt: skip


@pytest.mark.parametrize("name", FOUND)
def test_what_jax_is_given(name):
    environment, expected = FOUND[name]
    assert arguments(environment) == expected


def test_a_pod_of_an_indexed_job(monkeypatch):
    pod = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "3"}
    for installed, expected in ((None, None), (object(), {})):
        monkeypatch.setattr("importlib.util.find_spec", lambda name, found=installed: found)
        assert arguments(pod) == expected


REFUSED = {
    "two of three": ({**EXPLICIT, "JAX_PROCESS_ID": ""}, "JAX_PROCESS_ID is not"),
    "one of three": ({"JAX_PROCESS_ID": "1"}, "JAX_COORDINATOR_ADDRESS is not"),
    "an address alone": ({"JAX_COORDINATOR_ADDRESS": "a:1"}, "set all three"),
    "no port": ({**EXPLICIT, "JAX_COORDINATOR_ADDRESS": "localhost"}, "expected HOST:PORT"),
    "too large an id": ({**EXPLICIT, "JAX_PROCESS_ID": "4"}, "from 0 up to below it"),
    "no number": ({**EXPLICIT, "JAX_NUM_PROCESSES": "many"}, "a number of processes"),
    "Open MPI 5": (OPEN_MPI, "mpirun -x JAX_COORDINATOR_ADDRESS=HOST:PORT"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_settings_that_are_not_whole_are_refused(name):
    environment, message = REFUSED[name]
    with pytest.raises(InputError, match=message):
        arguments(environment)


# Processes that meet, or do not

JOIN = """
import sys
from regjax import distributed
distributed.initialize(float(sys.argv[1]))
import jax
import jax.numpy as jnp
from jax.experimental.multihost_utils import process_allgather
print(jax.process_count(), process_allgather(jnp.array(10 + jax.process_index())).tolist())
"""


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start(environment, seconds=60):
    return subprocess.Popen(
        [sys.executable, "-c", JOIN, str(seconds)],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def job(port, processes, process):
    return {
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": str(processes),
        "JAX_PROCESS_ID": str(process),
    }


def test_two_processes_meet_and_the_rest_keeps_to_itself():
    port = free_port()
    both = [start(job(port, 2, process)) for process in range(2)]
    found = [process.communicate(timeout=90) for process in both]
    assert [process.returncode for process in both] == [0, 0], found
    assert ["2 [10, 11]" in out for out, _ in found] == [True, True]
    alone = start({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"})
    assert alone.communicate(timeout=90)[0] == "1 [10]\n"


@pytest.mark.parametrize("process", [0, 1])
def test_who_waits_in_vain_says_so(process):
    port = free_port()
    found = start(job(port, 2, process), seconds=3)
    out, err = found.communicate(timeout=60)
    assert found.returncode == CRASHED and not out
    assert f"not all processes of the job met at 127.0.0.1:{port} within 3 s" in err
    assert "stack trace" not in err


def test_a_cluster_that_does_not_answer_is_no_traceback_of_jax():
    # A step of Slurm that does not say which nodes it has.
    found = start({"SLURM_JOB_ID": "7", "SLURM_STEP_NUM_TASKS": "2"})
    _, err = found.communicate(timeout=60)
    assert "InputError: this looks like a process of a job of several" in err


def test_of_a_cloud_tpu_only_its_metadata_server_knows(monkeypatch):
    """One host, or a machine that is no Cloud TPU after all, is on its own; a pod's failure is said."""
    from regjax import distributed

    # Compiling for a TPU that is not there, as other tests do, leaves the name of a host.
    hosts = ("TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES")
    for name in (*EXPLICIT, *hosts, "TPU_SKIP_MDS_QUERY", "JAX_PLATFORMS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    calls = []

    def initialize(error, **options):
        calls.append(options)
        if error:
            raise error

    def found(error=None):
        monkeypatch.setattr("jax.distributed.initialize", lambda **o: initialize(error, **o))
        return distributed.initialize()

    assert found()
    assert not found(ValueError("coordinator_address should be defined."))
    with pytest.raises(InputError, match="cannot be joined: no such host"):
        found(RuntimeError("no such host."))
    assert len(calls) == 3 and not any("coordinator_address" in options for options in calls)
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    assert not found() and len(calls) == 3
