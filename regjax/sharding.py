"""Where arrays live: one mesh with named axes."""

from __future__ import annotations

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor")


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1) -> Mesh:
    """A mesh over all devices with the axes `data`, `fsdp`, `tensor`; one size may be -1: what is left."""
    sizes = [data, fsdp, tensor]
    if -1 in sizes:
        known = int(np.prod([size for size in sizes if size != -1]))
        sizes[sizes.index(-1)] = jax.device_count() // known
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3)


def replicated(mesh: Mesh) -> NamedSharding:
    """The same array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def by_row(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Rows of a batch (dimension `axis`) dealt out over the `data` and `fsdp` axes."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, ("data", "fsdp")))
