"""Where arrays live: one mesh with named axes, and short rules that place parameters on it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from regjax.errors import InputError

if TYPE_CHECKING:
    from regjax.models import DecoderConfig

AXES = ("data", "fsdp", "tensor")

AnyMesh: TypeAlias = Mesh | AbstractMesh

Rules = Sequence[tuple[str, P]]
"""`(pattern, PartitionSpec)`: the first whose pattern is found (`re.search`) in a parameter's path counts."""


@dataclasses.dataclass(frozen=True)
class MeshShape:
    """How the devices are arranged; their number is the product, one size may be -1: what is left.

    By default every device has all parameters and its share of the rows.
    """

    data: int = -1
    """Parts the rows are dealt out in, with all parameters in each."""

    fsdp: int = 1
    """Parts both the rows and every parameter are dealt out in; parameters are gathered when used."""

    tensor: int = 1
    """Parts that heads of attention, hidden units of MLPs and the vocabulary are dealt out in."""


def make_mesh(shape: MeshShape = MeshShape(), devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of all devices with the axes `data`, `fsdp`, `tensor`.

    Args:
      shape: of the mesh.
      devices: those of another platform to compile for; by default all that there are.

    Raises:
      InputError: for sizes whose product is not the number of devices.
    """
    asked = sizes = [shape.data, shape.fsdp, shape.tensor]
    count = jax.device_count() if devices is None else len(devices)
    if sizes.count(-1) == 1:
        known = math.prod(size for size in sizes if size != -1)
        sizes = [count // max(known, 1) if size == -1 else size for size in sizes]
    if min(sizes) < 1 or math.prod(sizes) != count:
        named = ", ".join(f"{axis} {size}" for axis, size in zip(AXES, asked, strict=True))
        raise InputError(
            f"mesh of {named}: expected positive sizes whose product is {count}, the number of "
            "devices; one of them may be -1, what is left"
        )
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def replicated(mesh: AnyMesh) -> NamedSharding:
    """The same array on every device."""
    return NamedSharding(mesh, P())


def by_row(mesh: AnyMesh, axis: int = 0) -> NamedSharding:
    """Rows of a batch (dimension `axis`) dealt out over the `data` and `fsdp` axes."""
    return NamedSharding(mesh, P(*[None] * axis, ("data", "fsdp")))


@dataclasses.dataclass(frozen=True)
class RowLayout:
    """How the rows of a batch lie on a mesh: dealt out over `data` and `fsdp`, the same over `tensor`."""

    mesh: Mesh
    count: int
    """B: rows of the whole batch; `row_parts(mesh)` divides it, or each of its micro-batches."""
    micro_batches: int | None = None
    """A: arrays are `[A, B / A, ...]`; None: `[B, ...]`."""

    @functools.cached_property
    def here(self) -> np.ndarray:
        """Which rows the devices of this process hold, ascending."""
        places = self._sharding.addressable_devices_indices_map(self._rows.shape)
        return np.unique(np.concatenate([self._rows[index].ravel() for index in places.values()]))

    def put(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """The arrays of a batch on the devices; each has the rows `here`, or all."""
        return {name: self._put(array) for name, array in batch.items()}

    @functools.cached_property
    def _sharding(self) -> NamedSharding:
        return by_row(self.mesh, self._rows.ndim - 1)

    @functools.cached_property
    def _rows(self) -> np.ndarray:
        rows = np.arange(self.count)
        return rows if self.micro_batches is None else rows.reshape(self.micro_batches, -1)

    def _put(self, array: np.ndarray) -> jax.Array:
        shape = (*self._rows.shape, *array.shape[1:])
        if len(self.here) == self.count:
            return jax.device_put(array.reshape(shape), self._sharding)
        own = np.arange(self.count) if len(array) == self.count else self.here

        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            return array[np.searchsorted(own, self._rows[index[: self._rows.ndim]])]

        return jax.make_array_from_callback(shape, self._sharding, part)


def put(array: Any, where: NamedSharding) -> jax.Array:
    """An array laid out anew; of one that is whole on every host, each device takes its part."""
    if where.is_fully_addressable or not getattr(array, "is_fully_addressable", True):
        return jax.device_put(array, where)
    whole = np.asarray(array)
    return jax.make_array_from_callback(whole.shape, where, whole.__getitem__)


def fetch(array: Any) -> np.ndarray:
    """The whole array on this host; where it is dealt out over processes, all of them have to ask."""
    if not isinstance(array, jax.Array) or array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def row_parts(mesh: AnyMesh) -> int:
    """How many parts the rows of a batch are dealt out in."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def rules_for(config: DecoderConfig | None, mesh: AnyMesh) -> Rules:
    """The rules of a model's family; of a model that the caller brought (None) that its soft prompts
    and adapters stay whole.

    Matrices with a wide inner side (heads of attention, hidden units of an MLP, the vocabulary) are
    dealt out on that side over `tensor`, so that a layer needs one sum over it, and on the other side
    over `fsdp`. Heads stay whole: fewer than the axis has devices are not dealt out. Adapters
    `A [in, r]`, `B [r, out]` of a kernel go where its `in` and its `out` go, so that `x A B` meets `x W`
    as the devices hold it.
    """
    if config is None:
        return ((r"^(soft_prompt|lora)/", P()),)

    def heads(count: int) -> str | None:
        return None if count % mesh.shape["tensor"] else "tensor"

    query, keys = heads(config.heads), heads(config.key_value_heads)
    kernels = {
        "head": P("fsdp", "tensor"),
        "layers/attention/query": P(None, "fsdp", query),
        "layers/attention/(key|value)": P(None, "fsdp", keys),
        "layers/attention/output": P(None, query, "fsdp"),
        "layers/mlp/(gate|up)": P(None, "fsdp", "tensor"),
        "layers/mlp/down": P(None, "tensor", "fsdp"),
    }
    adapters = [
        rule
        for place, (*stack, inputs, outputs) in kernels.items()
        for rule in (
            (f"^lora/{place}/a$", P(*stack, inputs)),
            (f"^lora/{place}/b$", P(*stack, None, outputs)),
        )
    ]
    return (
        (r"^soft_prompt/", P()),
        *adapters,
        (r"norm/scale$", P()),
        (r"^embedding/table$", P("tensor", "fsdp")),
        *((f"^{place}/kernel$", spec) for place, spec in kernels.items()),
        (r"^layers/attention/query/bias$", P(None, query)),
        (r"^layers/attention/(key|value)/bias$", P(None, keys)),
        (r"^layers/mlp/(gate|up)/bias$", P(None, "tensor")),
        (r"/bias$", P()),
    )


def place(shapes: Mapping[str, Any], mesh: AnyMesh, rules: Rules) -> dict[str, NamedSharding]:
    """Where each of the parameters `{path: array or shape}` lives.

    A dimension that does not divide among its axis stays whole. A parameter without a rule has its
    largest dimension that divides dealt out over `fsdp`; one of fewer than two dimensions stays whole.
    """
    return {
        path: NamedSharding(
            mesh, _fitting(leaf.shape, _wanted(path, leaf.shape, mesh, rules), mesh)
        )
        for path, leaf in shapes.items()
    }


def follow(leaf: Any, parameter: Any, placed: NamedSharding) -> NamedSharding:
    """Where an optimizer's array lives that belongs to a parameter: as it, where the shapes agree.

    One of the parameter's shape less a dimension, such as Adafactor's means of rows and columns, is
    dealt out in those that are left; any other is replicated.
    """
    shape, mesh = tuple(parameter.shape), placed.mesh
    spec = _padded(placed.spec, len(shape))
    if leaf.shape == shape:
        return placed
    for index in range(len(shape)):
        if leaf.shape == shape[:index] + shape[index + 1 :]:
            left = P(*spec[:index], *spec[index + 1 :])
            return NamedSharding(mesh, _fitting(leaf.shape, left, mesh))
    return replicated(mesh)


def table(shapes: Mapping[str, Any], mesh: AnyMesh, rules: Rules) -> list[dict[str, Any]]:
    """A row a parameter: shape, partition, bytes on a device, and what does not divide; then the sum."""
    rows: list[dict[str, Any]] = []
    for path, sharding in place(shapes, mesh, rules).items():
        leaf = shapes[path]
        wanted = _padded(_wanted(path, leaf.shape, mesh, rules), leaf.ndim)
        found = _padded(sharding.spec, leaf.ndim)
        left = [
            f"{size} by {axis} {_parts(axis, mesh)}"
            for size, axis, kept in zip(leaf.shape, wanted, found, strict=True)
            if axis and not kept and _parts(axis, mesh) > 1
        ]
        size = leaf.dtype.itemsize * math.prod(sharding.shard_shape(leaf.shape))
        rows.append(
            {
                "parameter": path,
                "shape": " x ".join(map(str, leaf.shape)),
                "partition": ", ".join(str(axis or "-") for axis in found) if any(found) else "",
                "bytes a device": size,
                "does not divide": ", ".join(left),
            }
        )
    total = sum(row["bytes a device"] for row in rows)
    empty = {"shape": "", "partition": "", "bytes a device": total, "does not divide": ""}
    return [*rows, {"parameter": "all", **empty}]


def known_inside(mesh: AnyMesh) -> contextlib.AbstractContextManager[Any]:
    """What is traced in this context finds `current_mesh()`."""
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def current_mesh(vocabulary: int = 0) -> AbstractMesh | None:
    """The mesh of the step that is being traced, for what deals out its own work, such as
    `losses.linear_cross_entropy(..., mesh=)`.

    None on one device, and where `vocabulary` does not divide among the `tensor` axis.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.axis_names != AXES or set(mesh.axis_types) != {AxisType.Auto} or mesh.size == 1:
        return None
    return None if vocabulary % mesh.shape["tensor"] else mesh


def _wanted(path: str, shape: Sequence[int], mesh: AnyMesh, rules: Rules) -> P:
    for pattern, spec in rules:
        if re.search(pattern, path):
            return spec
    dividing = [i for i, size in enumerate(shape) if size % mesh.shape.get("fsdp", 1) == 0]
    if len(shape) < 2 or not dividing:
        return P()
    largest = max(dividing, key=lambda index: shape[index])
    return P(*[None] * largest, "fsdp")


def _fitting(shape: Sequence[int], spec: P, mesh: AnyMesh) -> P:
    """`spec` less the axes that do not divide their dimension, and those of one device."""
    axes = [
        axis if axis and _parts(axis, mesh) > 1 and size % _parts(axis, mesh) == 0 else None
        for size, axis in zip(shape, _padded(spec, len(shape)), strict=True)
    ]
    while axes and axes[-1] is None:
        axes.pop()
    return P(*axes)


def _padded(spec: P, dimensions: int) -> tuple[Any, ...]:
    return (*spec, *[None] * (dimensions - len(spec)))


def _parts(axis: str | tuple[str, ...], mesh: AnyMesh) -> int:
    return math.prod(mesh.shape[name] for name in ((axis,) if isinstance(axis, str) else axis))
