"""A compiled program's needs and costs on one chip: memory, operations, traffic, exchanges, time."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax

from regjax import compilation, hlo, hlo_costs
from regjax.chips import Chip
from regjax.hlo_costs import Collective

UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one chip while a program runs."""

    arguments: Mapping[str, int]
    """What is passed in, by part; `padding` is what the chip's layout adds, less what is not read."""
    outputs: int
    """Results that do not take the place of an argument."""
    temporaries: int
    """Everything the program holds meanwhile."""
    program: int
    """The code."""

    @property
    def total(self) -> int:
        return sum(self.arguments.values()) + self.outputs + self.temporaries + self.program


@dataclasses.dataclass(frozen=True)
class Costs:
    """What one run of a program takes on one chip."""

    memory: Memory
    flops: float
    """Of matrix products and convolutions, as often as they run; see `hlo_costs.flops`."""
    traffic: int
    """Bytes read from and written to main memory, see `hlo_costs.traffic`."""
    collectives: tuple[Collective, ...]
    """What chips exchange, the largest first."""
    text: str = dataclasses.field(repr=False)
    """The compiled program."""

    def seconds(self, chip: Chip) -> Seconds:
        """A bound on its time from the chip's peaks; all products at the bfloat16 rate."""
        return Seconds(
            compute=self.flops / chip.flops,
            memory=self.traffic / chip.bandwidth,
            exchange=sum(one.sent for one in self.collectives) / chip.interconnect,
        )


@dataclasses.dataclass(frozen=True)
class Seconds:
    """Three lower bounds on a program's time, each as if it had the chip to itself."""

    compute: float
    memory: float
    exchange: float

    @property
    def bound(self) -> float:
        """The largest: what it takes if the three overlap perfectly, on a chip at its peak."""
        return max(self.compute, self.memory, self.exchange)

    @property
    def limited_by(self) -> str:
        names = [field.name for field in dataclasses.fields(self)]
        return max(names, key=lambda name: getattr(self, name))


@dataclasses.dataclass(frozen=True)
class DoesNotFit:
    """Why a program cannot run on a chip."""

    arguments: Mapping[str, int]
    """Bytes of what is passed in, by part."""
    needed: int
    """Bytes it would take at least."""
    memory: int
    """Bytes there are."""
    message: str = ""
    """The compiler's; empty where the arguments alone are too large, so that nothing was compiled."""


def argument_bytes(parts: Mapping[str, Any]) -> dict[str, int]:
    """Bytes on one device of each part, a tree of arrays or `jax.ShapeDtypeStruct`s with shardings."""
    return {
        name: sum(
            math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            for leaf in jax.tree.leaves(tree)
        )
        for name, tree in parts.items()
    }


def compile_program(
    lower: Callable[[], jax.stages.Lowered], parts: Mapping[str, Any], chip: Chip | None
) -> Costs | DoesNotFit:
    """Compiles a program and says what it costs, or that it does not fit.

    Args:
      lower: gives `jax.jit(...).lower(...)`.
      parts: its arguments by what they are, such as parameters and batch, as `argument_bytes` takes them.
      chip: that it is to run on, by whose memory arguments that cannot fit are refused at once; the
        compiler of a TPU would take minutes for that. None: not known.
    """
    arguments = argument_bytes(parts)
    if chip is not None and sum(arguments.values()) > chip.memory:
        return DoesNotFit(arguments, sum(arguments.values()), chip.memory)
    try:
        with compilation.not_kept():
            compiled = lower().compile()
    except jax.errors.JaxRuntimeError as error:
        found = out_of_memory(str(error))
        if found is None:
            raise
        needed, memory = found
        return DoesNotFit(arguments, needed, memory, str(error))
    return costs(compiled, arguments)


def costs(compiled: jax.stages.Compiled, arguments: Mapping[str, int]) -> Costs:
    """What a compiled program costs; `arguments` are the bytes of its arguments on one device, by part."""
    text = compiled.as_text() or ""
    module = hlo.parse(text)
    memory: Any = compiled.memory_analysis()
    padding = memory.argument_size_in_bytes - sum(arguments.values())
    return Costs(
        memory=Memory(
            arguments={**arguments, "padding": padding},
            outputs=memory.output_size_in_bytes - memory.alias_size_in_bytes,
            temporaries=memory.temp_size_in_bytes,
            program=memory.generated_code_size_in_bytes,
        ),
        flops=hlo_costs.flops(module),
        traffic=hlo_costs.traffic(module),
        collectives=tuple(hlo_costs.collectives(module)),
        text=text,
    )


def out_of_memory(message: str) -> tuple[int, int] | None:
    """`(bytes needed, bytes there are)` of a compiler's RESOURCE_EXHAUSTED; None for any other error.

    >>> out_of_memory("RESOURCE_EXHAUSTED: Ran out of memory. Used 19.50G of 15.75G hbm.")
    (20937965568, 16911433728)
    """
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    used = re.search(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm", message) or re.search(
        r"required for .* \(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)",
        message,
    )
    if used:
        needed, memory = ((used[1], used[2]), (used[3], used[4]))
        return _bytes(*needed), _bytes(*memory)
    single = re.search(r"\(size=(\d+)\) would exceed memory \(size=(\d+)\)", message)
    return (int(single[1]), int(single[2])) if single else (0, 0)


def _bytes(number: str, unit: str) -> int:
    return int(float(number) * UNITS[unit])
