"""Python code in several processes of `jax.distributed`, on this machine."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PREAMBLE = """
import sys
import jax
jax.distributed.initialize(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
del sys.argv[1:4]
"""


def run_in_processes(code, *arguments, count, devices=1, timeout=900):
    """Runs `code` in `count` processes of `devices` CPU devices each; all have to end well."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PREAMBLE + code, coordinator, str(count), str(index)]
            + [str(argument) for argument in arguments],
            env={**os.environ, "JAX_NUM_CPU_DEVICES": str(devices), "JAX_PLATFORMS": "cpu"},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(count)
    ]
    try:
        outputs = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
            process.stdout.close()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output
    return outputs
