"""The plot of a sweep: what its figures do along a grid, or by stage where there is none."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regjax.class_metrics import TradeOff
from regjax.class_plots import plot_trade_off
from regjax.errors import InputError
from regjax.sweep import RESULTS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FIGURES = {
    "accuracy": "accuracy",
    "balanced": "balanced accuracy",
    "worst": "worst-class accuracy",
    "rmse": "RMSE",
    "pearson": "Pearson's correlation",
}
"""Figures that are drawn where a table has them, and their names."""

Rows = Sequence[Mapping[str, Any]]


def plot_sweep(workdir: str | Path) -> list[Path]:
    """Draws `workdir/sweep.png`, means with standard errors, and of classifiers `trade_off.png`, balanced
    against worst-class accuracy; returns the files.

    Raises:
      InputError: if `workdir` holds no finished sweep.
    """
    import matplotlib.pyplot as plt

    path = Path(workdir) / RESULTS
    if not path.is_file():
        raise InputError(f"{workdir} holds no finished sweep: is it the --workdir of one?")
    found = json.loads(path.read_text(encoding="utf-8"))
    table = found["table"]
    names = [name for name in FIGURES if any(row.get(name) is not None for row in table)]
    pairs = [(row.get("accuracy"), row.get("balanced")) for row in table]
    if all(None not in pair and math.isclose(*pair) for pair in pairs):
        names = [name for name in names if name != "balanced"]  # classes of one size
    if not names:
        return []
    axes = [name for name in found["points"][0] if name != "seed"]
    numeric = [a for a in axes if all(_number(row[a]) is not None for row in table)]
    draw = along_grid if numeric else by_stage
    width = 4.6 if numeric else max(4.0, 1.2 + 0.45 * len(table))
    figure, panels = plt.subplots(
        1, len(names), figsize=(width * len(names), 3.8), squeeze=False, layout="constrained"
    )
    for name, panel in zip(names, panels[0], strict=True):
        draw(panel, table, name, numeric[0] if numeric else "", axes)
    target = Path(workdir) / "sweep.png"
    figure.savefig(target, dpi=150)
    plt.close(figure)
    return [target, *_trade_off(Path(workdir), table, axes)]


def _trade_off(workdir: Path, table: Rows, axes: Sequence[str]) -> list[Path]:
    """Balanced against worst-class accuracy of every row of a sweep over image experiments."""
    points = [
        TradeOff(
            _label(row, axes),
            row["balanced"],
            row["worst"],
            row.get("balanced_se") or 0.0,
            row.get("worst_se") or 0.0,
        )
        for row in table
        if row.get("balanced") is not None and row.get("worst") is not None
    ]
    if len(points) < 2:
        return []
    return [plot_trade_off(workdir / "trade_off.png", {point.name: [point] for point in points})]


def along_grid(panel: Axes, table: Rows, figure: str, axis: str, axes: Sequence[str]) -> None:
    """A line for each stage and value of the other axes, over the values of `axis`."""
    lines: dict[str, list[Mapping[str, Any]]] = {}
    for row in table:
        if row.get(figure) is not None:
            lines.setdefault(_label(row, [a for a in axes if a != axis]), []).append(row)
    for label, rows in lines.items():
        rows = sorted(rows, key=lambda row: _number(row[axis]) or 0.0)
        panel.errorbar(
            [_number(row[axis]) or 0.0 for row in rows],
            [row[figure] for row in rows],
            yerr=[row.get(f"{figure}_se") or 0.0 for row in rows],
            label=label, marker="o", markersize=4, linewidth=1.2, capsize=3,
        )  # fmt: skip
    panel.set_xlabel(axis)
    panel.set_ylabel(FIGURES[figure])
    panel.legend(fontsize=7)
    panel.grid(alpha=0.3)


def by_stage(panel: Axes, table: Rows, figure: str, axis: str, axes: Sequence[str]) -> None:
    """A point for each row, from the lowest to the highest of the panel."""
    rows = [row for row in table if row.get(figure) is not None]
    panel.errorbar(
        range(len(rows)),
        [row[figure] for row in rows],
        yerr=[row.get(f"{figure}_se") or 0.0 for row in rows],
        linestyle="none", marker="o", capsize=4,
    )  # fmt: skip
    panel.set_xticks(
        range(len(rows)), [_label(row, axes) for row in rows], rotation=40, ha="right", fontsize=8
    )
    panel.set_ylabel(FIGURES[figure])
    panel.grid(alpha=0.3, axis="y")


def _label(row: Mapping[str, Any], axes: Sequence[str]) -> str:
    parts = [str(row["stage"]), *([str(row["read-out"])] if "read-out" in row else [])]
    return ", ".join(parts + [f"{axis.rpartition('.')[2]} {row[axis]}" for axis in axes])


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return None if isinstance(value, bool) or math.isnan(number) else number
