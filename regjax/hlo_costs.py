"""What a compiled program costs on one device: products, memory traffic, exchanges with others.

The compiler's own `cost_analysis()` counts the body of a loop once, so that a model whose layers are
scanned looks as if it had one layer. Here everything counts as often as it runs.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re

import numpy as np

from regjax.hlo import Computation, Instruction, Module, Shape, integers, value_at

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)

MOVES_NOTHING = (
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call",
    "after-all", "iota", "optimization-barrier", "partition-id", "replica-id", "add-dependency",
)  # fmt: skip


SPLASH_PRODUCTS = {"splash_mha_fwd": 2, "splash_mha_dq": 3, "splash_mha_dkv": 4}
"""Products over all pairs of a query and a key in each kernel of splash attention, by how it is named."""


def flops(module: Module) -> float:
    """Floating-point operations of all matrix products and convolutions.

    Of kernels that the compiler cannot look into, causal splash attention counts by its shapes (`H L^2 C`
    for each product of a row, half of a full one's), others where they state their cost.
    """
    return sum(
        times * _flops(module.computations[inner], each)
        for name, one, times in module.executed()
        for inner, each in module.within(name, one)
    )


def _flops(here: Computation, one: Instruction) -> float:
    if one.opcode == "custom-call":
        return _kernel_flops(one)
    if one.opcode not in ("dot", "convolution"):
        return 0.0
    left, right = (here[operand].shapes[0] for operand in one.operands[:2])
    if one.opcode == "dot":
        contracted = integers(one.attribute("lhs_contracting_dims"))
        size = math.prod(left.dims[axis] for axis in contracted)
        return 2.0 * math.prod(one.shapes[0].dims) * size
    return _convolution_flops(one, left, right)


def _kernel_flops(one: Instruction) -> float:
    products = next((n for name, n in SPLASH_PRODUCTS.items() if one.name.startswith(name)), 0)
    if products:
        # The first operand of floating point is the queries, `[..., L, C]`.
        query = re.search(
            r"\b(?:bf16|f16|f32)\[([\d,]+)\]", one.attribute("operand_layout_constraints")
        )
        *outer, length, size = integers(query[1]) if query else (0, 0)
        return float(products * math.prod(outer) * length * length * size)
    stated = re.search(r'"flops":"?(\d+)', one.attributes)
    return float(stated[1]) if stated else 0.0


def _convolution_flops(one: Instruction, left: Shape, right: Shape) -> float:
    """As the compiler counts it: two for every pair of an input and a kernel entry that meet.

    A TPU writes batched matrix products as convolutions over the batch, most of whose window lies in
    the padding.
    """
    labels = re.match(r"(\w+)_(\w+)->(\w+)", one.attribute("dim_labels"))
    if labels is None:
        return 0.0
    inputs, kernel, outputs = labels.groups()
    written = re.findall(r"(\w+)=(\S+)", one.attribute("window")[1:-1])
    window = {key: values.split("x") for key, values in written}
    result = one.shapes[0].dims
    total = 2.0 * result[outputs.index("b")] * result[outputs.index("f")]
    total *= right.dims[kernel.index("i")]
    for axis in itertools.takewhile(lambda axis: str(axis) in kernel, itertools.count()):

        def option(key: str, default: str, axis: int = axis) -> str:
            return window[key][axis] if key in window else default

        size, stride = int(option("size", "1")), int(option("stride", "1"))
        low = int(option("pad", "0_0").split("_")[0])
        dilation, spread = int(option("lhs_dilate", "1")), int(option("rhs_dilate", "1"))
        output = np.arange(result[outputs.index(str(axis))])
        at = output[:, None] * stride + np.arange(size)[None] * spread - low
        meets = (at >= 0) & (at % dilation == 0)
        meets &= at // dilation < left.dims[inputs.index(str(axis))]
        total *= int(meets.sum())
    return total


def traffic(module: Module) -> int:
    """Bytes read from and written to the device's main memory.

    What is read through a slice, or written into one in place, counts by the slice.
    """
    return sum(times * _moved(module, name, one) for name, one, times in module.executed())


def _moved(module: Module, name: str, one: Instruction) -> int:
    if one.opcode in MOVES_NOTHING or one.opcode.endswith("-done"):
        return 0
    here = module.computations[name]
    if one.opcode == "fusion":
        inner = module.computations.get(one.called("calls"), {})
        # What is handed through in place, such as the buffers of an exchange that goes on meanwhile.
        kept = re.findall(r"\{(\d*)\}: \((\d+)", one.attribute("output_to_operand_aliasing"))
        outputs = {int(output or 0) for output, _ in kept}
        in_place = {int(operand) for _, operand in kept}
        read = sum(
            _read(module, inner, index, here[operand].shapes)
            for index, operand in enumerate(one.operands)
            if operand in here and index not in in_place
        )
        return read + sum(
            size for index, size in enumerate(_written(inner, one.shapes)) if index not in outputs
        )
    if one.opcode in ("copy-start", "slice-start"):
        # Their shape lists source and destination; the smaller of the two is what moves.
        pair = [shape for shape in one.shapes if shape.dims][:2]
        size = min((shape.bytes for shape in pair), default=0)
        return size * sum(not shape.on_chip for shape in pair)
    written = sum(shape.main_memory for shape in one.shapes)
    if one.opcode in ("dynamic-slice", "slice", "gather"):
        return 2 * written
    if one.opcode == "dynamic-update-slice":
        return 2 * sum(shape.main_memory for shape in here[one.operands[1]].shapes)
    operands = (here[operand] for operand in one.operands if operand in here)
    return written + sum(shape.main_memory for each in operands for shape in each.shapes)


def _read(module: Module, inner: Computation, index: int, given: tuple[Shape, ...]) -> int:
    """Bytes of the operand `index`, of shapes `given`, that a fusion reads."""
    whole = sum(shape.main_memory for shape in given)
    parameters = [
        one for one in inner.values() if one.opcode == "parameter" and one.arguments == str(index)
    ]
    if whole == 0 or not parameters:
        return whole
    read, names = 0, [parameters[0].name]
    while names:
        name = names.pop()
        for user in (one for one in inner.values() if name in one.operands):
            first = user.operands[0] == name
            if user.opcode == "bitcast":
                names.append(user.name)
            elif user.opcode in ("dynamic-slice", "slice", "gather") and first:
                read += sum(shape.bytes for shape in user.shapes)
            elif user.opcode == "dynamic-update-slice" and first:
                continue
            elif user.opcode == "fusion":
                nested = module.computations.get(user.called("calls"), {})
                read += _read(module, nested, user.operands.index(name), given)
            else:
                return whole
    return min(read, whole)


def _written(inner: Computation, results: tuple[Shape, ...]) -> list[int]:
    """Bytes of each result that a fusion writes: of an array updated in place only the update."""
    root = next((one for one in inner.values() if one.root), None)
    outputs: list[Instruction | None] = [root]
    if root is not None and root.opcode == "tuple":
        outputs = [inner.get(name) for name in root.operands]
    if len(outputs) != len(results):
        return [shape.main_memory for shape in results]
    sizes = []
    for output, shape in zip(outputs, results, strict=True):
        while output is not None and output.opcode == "bitcast":
            output = inner.get(output.operands[0])
        update = None
        if output is not None and output.opcode == "dynamic-update-slice":
            update = inner.get(output.operands[1])
        size = shape.bytes if update is None else min(update.shapes[0].bytes, shape.bytes)
        sizes.append(0 if shape.on_chip else size)
    return sizes


@dataclasses.dataclass(frozen=True)
class Collective:
    """An exchange between devices."""

    kind: str
    """Such as `all-gather`."""
    group: int
    """How many devices take part in each."""
    operands: tuple[str, ...]
    """What each device puts in, such as `f32[8,128]`."""
    bytes: int
    """Of the whole: what is put in, for an all-gather by all of the group."""
    count: int
    """How often it happens."""

    @property
    def sent(self) -> float:
        """Bytes that each device sends at least, over all `count` times.

        With a group of `g` and a whole of `n` bytes: `n (g - 1) / g` for a gather, a scatter or an
        all-to-all, twice that for an all-reduce, `n` for a permutation.
        """
        share = (self.group - 1) / self.group
        if self.kind == "all-reduce":
            share *= 2
        elif self.kind.startswith("collective-"):
            share = 1
        return self.count * self.bytes * share


def collectives(module: Module) -> list[Collective]:
    """What devices exchange, equal ones added up, the largest first.

    A TPU's compiler spreads an exchange over the products that go on meanwhile, be it those of a loop
    between its start and its end: fragments of one channel are one exchange.
    """
    exchanges: dict[tuple[str, str], tuple[Collective, int]] = {}
    for name, outer, times in module.executed():
        for inner, one in module.within(name, outer):
            kind = one.opcode.removesuffix("-start")
            if kind not in COLLECTIVES:
                continue
            group = _group_size(one, module.devices)
            if group == 1:
                continue
            # A TPU fuses a sum over devices with the slice of it that each keeps.
            if kind == "all-reduce" and inner.startswith("all-reduce-scatter"):
                kind = "reduce-scatter"
            here = module.computations[inner]
            operands = [s for each in one.operands if each in here for s in here[each].shapes]
            size = sum(shape.bytes for shape in operands)
            if kind == "all-gather":
                size *= group
            collective = Collective(kind, group, tuple(map(str, operands)), size, 0)
            channel = one.attribute("channel_id") or f"{inner}/{one.name}"
            key = ("" if outer is not one else name, channel)
            _, before = exchanges.get(key, (collective, times))
            exchanges[key] = collective, min(times, before)
    found: dict[Collective, int] = {}
    for collective, times in exchanges.values():
        found[collective] = found.get(collective, 0) + times
    counted = [dataclasses.replace(one, count=count) for one, count in found.items()]
    return sorted(counted, key=lambda one: -one.sent)


def _group_size(one: Instruction, devices: int) -> int:
    """How many devices exchange something with each other, for each way that groups are written."""
    if one.opcode.startswith("collective-permute"):
        pairs = re.findall(r"\{(\d+),(\d+)\}", one.attribute("source_target_pairs"))
        return 2 if any(source != target for source, target in pairs) else 1
    groups = re.search(r"replica_groups=(.*)", one.attributes)
    if groups is None:
        return devices
    text = groups[1]
    if text.startswith("mesh["):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", text[: text.index("]")]))
        chosen = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", value_at(text, text.index("{")))
        return math.prod(int(part or sizes[axis]) for axis, part in chosen)
    if text.startswith("["):
        return integers(text[: text.index("]")])[1]
    first = re.match(r"\{\{([\d,]*)\}", text)
    return len(integers(first[1])) if first and first[1] else devices
