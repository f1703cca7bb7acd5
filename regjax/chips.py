"""What accelerators can do: memory, peak speed and bandwidths of one chip, as their makers state them.

TPUs: the tables of https://docs.cloud.google.com/tpu/docs/v4, .../v5e, .../v5p-training and .../v6e, read
in November 2026. A bandwidth between chips is that of all links of a chip in one direction: half of what
the tables call bidirectional (400, 1200 and 800 GB/s for v5e, v5p and v6e); for v4, whose table has
none, six links of 50 GB/s (Jouppi et al., 2023, *TPU v4: an optically reconfigurable supercomputer*). The
memory is what the TPU compiler allocates from where a program that does not fit makes it say so.

NVIDIA GPUs: the data sheets of the A100, H100 and H200 (SXM), without sparsity; NVLink in one direction.
"""

from __future__ import annotations

import dataclasses

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip; for a TPU with two cores, both."""

    name: str
    memory: int
    """Main memory in bytes."""
    flops: float
    """Peak of bfloat16 matrix products, in operations a second."""
    bandwidth: float
    """Of the main memory, in bytes a second."""
    interconnect: float
    """To other chips of a slice or server, over all links in one direction, in bytes a second."""


V4 = Chip("TPU v4", 32 * GIB, 275e12, 1.2e12, 3.0e11)
V5E = Chip("TPU v5e", 16 * GIB, 197e12, 8.19e11, 2.0e11)
V5P = Chip("TPU v5p", 95 * GIB, 459e12, 2.765e12, 6.0e11)
V6E = Chip("TPU v6e", 32 * GIB, 918e12, 1.64e12, 4.0e11)
A100_40 = Chip("NVIDIA A100 40GB", 40 * 10**9, 312e12, 1.555e12, 3.0e11)
A100_80 = Chip("NVIDIA A100 80GB", 80 * 10**9, 312e12, 2.039e12, 3.0e11)
H100 = Chip("NVIDIA H100", 80 * 10**9, 989e12, 3.35e12, 4.5e11)
H200 = Chip("NVIDIA H200", 141 * 10**9, 989e12, 4.8e12, 4.5e11)

BY_DEVICE_KIND = {
    "TPU v4": V4,
    "TPU v5 lite": V5E,
    "TPU v5e": V5E,
    "TPU v5": V5P,
    "TPU v5p": V5P,
    "TPU v6 lite": V6E,
    "TPU v6e": V6E,
    "NVIDIA A100-SXM4-40GB": A100_40,
    "NVIDIA A100-SXM4-80GB": A100_80,
    "NVIDIA H100 80GB HBM3": H100,
    "NVIDIA H200": H200,
}


def find(device_kind: str) -> Chip | None:
    """The chip of a `jax.Device.device_kind`; None where its figures are not known here, as for a CPU.

    >>> find("TPU v5 lite").name, find("cpu")
    ('TPU v5e', None)
    """
    return BY_DEVICE_KIND.get(device_kind)
