"""Where arrays live: one mesh with named axes."""

from __future__ import annotations

import math

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from regjax.errors import InputError

AXES = ("data", "fsdp", "tensor")


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1) -> Mesh:
    """A mesh over all devices with the axes `data`, `fsdp`, `tensor`; one size may be -1: what is left.

    Raises:
      InputError: for sizes whose product is not the number of devices.
    """
    asked = sizes = [data, fsdp, tensor]
    count = jax.device_count()
    if sizes.count(-1) == 1:
        known = math.prod(size for size in sizes if size != -1)
        sizes = [count // max(known, 1) if size == -1 else size for size in sizes]
    if min(sizes) < 1 or math.prod(sizes) != count:
        named = ", ".join(f"{axis} {size}" for axis, size in zip(AXES, asked, strict=True))
        raise InputError(
            f"mesh of {named}: expected positive sizes whose product is {count}, the number of "
            "devices; one of them may be -1, what is left"
        )
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3)


def replicated(mesh: Mesh) -> NamedSharding:
    """The same array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def by_row(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Rows of a batch (dimension `axis`) dealt out over the `data` and `fsdp` axes."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, ("data", "fsdp")))
