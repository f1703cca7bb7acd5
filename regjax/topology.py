"""Devices to compile for that need not be there: any TPU slice, by the compiler that libtpu brings."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import jax

from regjax.errors import InputError

ENVIRONMENT = {
    # Ask no metadata server what machine this is.
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    # Without a TPU that two processes could fight over, both may compile.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

# A v4 chip's two cores are one device, as on v5p where that is the default.
OPTIONS = {"v4": {"chip_config_name": "megacore"}}


def tpu_devices(topology: str) -> list[Any]:
    """The chips of a TPU slice such as `v5e:4x4`, for `make_mesh` and ahead-of-time compilation.

    Sets `ENVIRONMENT` for this process, as far as it is not set. Nothing can be run on them.

    Raises:
      InputError: libtpu is not installed, or there is no such slice.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise InputError(
            f"--topology {topology} needs the TPU compiler, which runs on any x86 Linux machine: "
            "pip install 'regjax[tpu]', and with no TPU in the machine set JAX_PLATFORMS=cpu"
        )
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    options = OPTIONS.get(topology.partition(":")[0], {})
    try:
        return list(topologies.get_topology_desc(topology, "tpu", **options).devices)
    except jax.errors.JaxRuntimeError as error:
        raise InputError(
            f"--topology {topology}: {str(error).partition(chr(10))[0]}; expected a generation and "
            "its chips, such as v5e:2x2, v5e:4x4, v5p:4x4x4 or v6e:4x4"
        ) from None
