"""A plan as tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from regjax.compiled import DoesNotFit
from regjax.plan import Planned, Remedy

LARGEST_EXCHANGES = 8


def in_bytes(count: float) -> str:
    """A number of bytes in the unit that suits it.

    >>> in_bytes(512), in_bytes(3 * 2**20), in_bytes(15.75 * 2**30)
    ('512 B', '3.00 MiB', '15.75 GiB')
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            break
        count /= 1024
    return f"{count:.0f} B" if unit == "B" else f"{count:.2f} {unit}"


def in_thousands(count: float, unit: str) -> str:
    """A number with the prefix that suits it.

    >>> in_thousands(2.5e12, "flop"), in_thousands(40, "B")
    ('2.50 Tflop', '40.00 B')
    """
    for prefix in ("", "k", "M", "G", "T", "P"):
        if count < 1000 or prefix == "P":
            break
        count /= 1000
    return f"{count:.2f} {prefix}{unit}"


def title(planned: Sequence[Planned], name: str) -> str:
    """What was planned, for which devices."""
    mesh, chip = planned[0].program.mesh, planned[0].chip
    device = mesh.devices.flat[0]
    what = chip.name if chip else device.device_kind
    axes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    return f"{name} on {mesh.size} x {what} ({axes}); all figures of one chip"


def memory_rows(planned: Sequence[Planned]) -> list[dict[str, Any]]:
    """Bytes on one chip, by what they are."""
    rows = []
    for one in planned:
        result = one.result
        parts = result.arguments if isinstance(result, DoesNotFit) else result.memory.arguments
        held = [parts.get(part, 0) for part in ("trained", "optimizer", "frozen")]
        rest = sum(parts.values()) - sum(held)
        meanwhile = "?"
        if not isinstance(result, DoesNotFit):
            memory = result.memory
            meanwhile = in_bytes(memory.temporaries + memory.program + memory.outputs)
        rows.append(
            {
                "program": f"{one.program.name} {one.program.kind}",
                "rows": f"{one.program.rows} x {one.program.length}",
                "trained": in_bytes(held[0]),
                "optimizer": in_bytes(held[1]),
                "frozen": in_bytes(held[2]),
                "batch, padding": in_bytes(rest),
                "meanwhile": meanwhile,
                "in all": in_bytes(one.needed),
                "of": in_bytes(one.chip.memory) if one.chip else "?",
                "fits": "yes" if one.fits else "no",
            }
        )
    return rows


def speed_rows(planned: Sequence[Planned]) -> list[dict[str, Any]]:
    """Operations, bytes and a bound on the time of what was compiled."""
    rows = []
    for one in planned:
        if isinstance(one.result, DoesNotFit):
            continue
        row: dict[str, Any] = {
            "program": f"{one.program.name} {one.program.kind}",
            "rows": f"{one.program.rows} x {one.program.length}",
            "products": in_thousands(one.result.flops, "flop"),
            "moved": in_thousands(one.result.traffic, "B"),
            "sent": in_thousands(sum(each.sent for each in one.result.collectives), "B"),
        }
        if one.chip is not None and one.seconds:
            row["ms at least"] = one.seconds * 1e3
            row["limited by"] = one.result.seconds(one.chip).limited_by
            tokens = one.program.rows * one.program.length / one.seconds
            row["tokens/s at most"] = f"{tokens:,.0f}"
            share = one.utilisation
            row["MFU at most"] = "" if share is None else f"{share:.0%}"
        rows.append(row)
    return rows


def exchange_rows(planned: Planned) -> list[dict[str, Any]]:
    """The largest exchanges of a program; none of one that was not compiled."""
    if isinstance(planned.result, DoesNotFit):
        return []
    return [
        {
            "exchange": one.kind,
            "among": one.group,
            "times": one.count,
            "each": in_thousands(one.bytes, "B"),
            "sent in all": in_thousands(one.sent, "B"),
            "arrays": ", ".join(one.operands[:3]) + (", ..." if len(one.operands) > 3 else ""),
        }
        for one in planned.result.collectives[:LARGEST_EXCHANGES]
    ]


def remedy_row(remedy: Remedy) -> dict[str, Any]:
    """What a change would do."""
    one = remedy.planned
    if one.fits:
        verdict = "yes, compiled"
    else:
        verdict = "no, compiled" if remedy.compiled else "no: its arguments alone are too large"
    return {
        "change": remedy.change,
        "flags": remedy.flags or "in the config file",
        "in all": in_bytes(one.needed),
        "fits": verdict,
    }
