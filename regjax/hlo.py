"""The text of a compiled program as computations, and how often each of them runs."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

BITS = {
    "pred": 8, "s2": 2, "u2": 2, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "s32": 32,
    "u32": 32, "s64": 64, "u64": 64, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128,
}  # fmt: skip


class Shape(NamedTuple):
    """One array of an instruction's result."""

    dtype: str
    dims: tuple[int, ...]
    on_chip: bool
    """In a memory of the compute units' own (a TPU's VMEM or SMEM), not in the chip's main memory."""

    @property
    def bytes(self) -> int:
        """Bytes without the padding of tiles."""
        bits = BITS.get(self.dtype, 8 if self.dtype.startswith("f8") else 0)
        return -(-math.prod(self.dims) * bits // 8)

    @property
    def main_memory(self) -> int:
        """Bytes in the chip's main memory."""
        return 0 if self.on_chip else self.bytes

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    shapes: tuple[Shape, ...]
    opcode: str
    operands: tuple[str, ...]
    arguments: str
    """What stands between the parentheses."""
    attributes: str
    root: bool

    def attribute(self, name: str) -> str:
        """The value of `name=...`, with nested braces; empty where there is none."""
        found = re.search(rf"(?:^|[ ,]){name}=", self.attributes)
        return value_at(self.attributes, found.end()) if found else ""

    def called(self, name: str) -> str:
        return self.attribute(name).lstrip("%")


Computation = dict[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Module:
    """The computations of a compiled program by name."""

    computations: Mapping[str, Computation]
    entry: str
    devices: int
    """How many devices it runs on."""

    @functools.cached_property
    def runs(self) -> dict[str, int]:
        """How often each computation runs; those of a fusion, a reduction or a sort are left out.

        A loop whose length is not known counts as run once, and so does each branch of a conditional.
        """
        runs: dict[str, int] = {}

        def visit(name: str, times: int) -> None:
            runs[name] = runs.get(name, 0) + times
            for one in self.computations.get(name, {}).values():
                if one.opcode == "while":
                    length = self.loop_length(name, one)
                    visit(one.called("body"), times * length)
                    visit(one.called("condition"), times * length)
                elif one.opcode == "conditional":
                    for branch in _branches(one):
                        visit(branch, times)
                elif one.opcode == "call":
                    visit(one.called("to_apply"), times)
                elif one.opcode == "async-start":
                    visit(one.called("calls"), times)

        visit(self.entry, 1)
        return runs

    def loop_length(self, name: str, loop: Instruction) -> int:
        """How often the body of a `while` in computation `name` runs; 1 where that is not known."""
        stated = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
        if stated:
            return int(stated[1])
        condition = self.computations.get(loop.called("condition"), {})
        root = next((one for one in condition.values() if one.root), None)
        inner: Computation = {}
        if root is not None and root.opcode == "fusion":
            inner = self.computations.get(root.called("calls"), {})
        compare = next(
            (one for one in (*inner.values(), *condition.values()) if one.opcode == "compare"), None
        )
        if root is None or compare is None or compare.attribute("direction") != "LT":
            return 1

        def resolve(operand: str) -> Instruction | None:
            found = inner.get(operand) or condition.get(operand)
            if found is not None and found.opcode == "parameter" and found.name in inner:
                found = condition.get(root.operands[int(found.arguments)])
            return found

        counter, limit = (resolve(operand) for operand in compare.operands)
        if limit is None or limit.opcode != "constant":
            return 1
        start, step = self._start(name, loop, counter), self._step(loop, counter)
        return max(-(-(int(limit.arguments) - start) // step), 0)

    def _step(self, loop: Instruction, counter: Instruction | None) -> int:
        """What a turn adds to a loop's counter: constants, in one or more sums, or else 1."""
        body = self.computations.get(loop.called("body"), {})
        root = next((one for one in body.values() if one.root), None)
        if counter is None or counter.opcode != "get-tuple-element":
            return 1
        if root is None or root.opcode != "tuple":
            return 1
        step, one = 0, body.get(root.operands[int(counter.attribute("index"))])
        while one is not None and one.opcode in ("add", "copy"):
            added = [body[name] for name in one.operands if body[name].opcode == "constant"]
            others = [body[name] for name in one.operands if body[name].opcode != "constant"]
            step += sum(int(each.arguments) for each in added)
            one = others[0] if len(others) == 1 else None
        return max(step, 1)

    def _start(self, name: str, loop: Instruction, counter: Instruction | None) -> int:
        """What a loop's counter begins with: a constant, or else 0 as `jax.lax.scan` has it."""
        if counter is None or counter.opcode != "get-tuple-element":
            return 0
        here = self.computations[name]
        state = here.get(loop.operands[0])
        if state is None or state.opcode != "tuple":
            return 0
        first = here.get(state.operands[int(counter.attribute("index"))])
        while first is not None and first.opcode == "copy":
            first = here.get(first.operands[0])
        return int(first.arguments) if first is not None and first.opcode == "constant" else 0

    def executed(self) -> Iterator[tuple[str, Instruction, int]]:
        """Every instruction outside of fusions with its computation's name and how often it runs."""
        for name, times in self.runs.items():
            for one in self.computations.get(name, {}).values():
                yield name, one, times

    def within(self, name: str, one: Instruction) -> Iterator[tuple[str, Instruction]]:
        """An instruction and, of a fusion, all that it is made of, each with its computation's name."""
        yield name, one
        if one.opcode == "fusion":
            inner = one.called("calls")
            for each in self.computations.get(inner, {}).values():
                yield from self.within(inner, each)


def parse(text: str) -> Module:
    """The computations in the text of a compiled program, `jax.stages.Compiled.as_text()`.

    >>> module = parse('''HloModule m, num_partitions=4
    ...
    ... ENTRY %main (x: f32[8,4]) -> f32[8,8] {
    ...   %x = f32[8,4]{1,0} parameter(0)
    ...   %all-gather = f32[8,16]{1,0} all-gather(%x), replica_groups=[1,4]<=[4], dimensions={1}
    ...   %y = f32[16,8]{1,0:T(8,128)S(1)} constant({...})
    ...   ROOT %dot = f32[8,8]{1,0} dot(%all-gather, %y), lhs_contracting_dims={1}, rhs_contracting_dims={0}
    ... }
    ... ''')
    >>> module.devices, [one.opcode for one in module.computations["main"].values()]
    (4, ['parameter', 'all-gather', 'constant', 'dot'])
    """
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        if line.startswith(("%", "ENTRY")) and line.endswith("{"):
            name = line.removeprefix("ENTRY ").split(" ", 1)[0].lstrip("%")
            current = computations.setdefault(name, {})
            entry = name if line.startswith("ENTRY") else entry
        elif current is not None and " = " in line:
            one = _instruction(line.strip())
            current[one.name] = one
    devices = re.search(r"num_partitions=(\d+)", text[: text.find("\n")])
    return Module(computations, entry, int(devices[1]) if devices else 1)


def _instruction(line: str) -> Instruction:
    name, rest = line.split(" = ", 1)
    root = name.startswith("ROOT ")
    kind = value_at(rest, 0)
    rest = rest[len(kind) :].lstrip()
    opcode, _, rest = rest.partition("(")
    arguments = value_at("(" + rest, 0)[1:-1]
    return Instruction(
        name=name.removeprefix("ROOT ").lstrip("%"),
        shapes=tuple(
            Shape(dtype, integers(dims), "S(" in layout)
            for dtype, dims, layout in re.findall(r"([a-z]\w*)\[([\d,<=]*)\](\{[^}]*\})?", kind)
        ),
        opcode=opcode,
        operands=tuple(re.findall(r"%([\w.\-]+)", arguments)),
        arguments=arguments,
        attributes=rest[len(arguments) + 1 :],
        root=root,
    )


def value_at(text: str, start: int) -> str:
    """The part of `text` from `start` to the comma, blank or bracket at which a value there ends."""
    depth = 0
    for index in range(start, len(text)):
        letter = text[index]
        depth += (letter in "({[") - (letter in ")}]")
        if depth < 0 or (depth == 0 and letter in ", "):
            return text[start:index]
        if depth == 0 and text[start] == "(" and letter == ")":
            return text[start : index + 1]
    return text[start:]


def integers(text: str) -> tuple[int, ...]:
    """All numbers in a text."""
    return tuple(map(int, re.findall(r"\d+", text)))


def _branches(one: Instruction) -> list[str]:
    names = one.attribute("branch_computations") or ",".join(
        (one.attribute("true_computation"), one.attribute("false_computation"))
    )
    return list(re.findall(r"[\w.\-]+", names))
