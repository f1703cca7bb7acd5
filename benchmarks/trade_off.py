"""Post-shift beside what a sweep over `configs/robust_fashion.py` trained: a table and the trade-off curve.

The scores of students are shifted by class so that a mean of balanced and worst-class accuracy on the
held-out images is as large as can be; every seed has shifts of its own. Printed are means and standard errors
over the seeds of the sweep.

    python benchmarks/trade_off.py runs/robust_fashion [--stages standard_standard] [--tradeoffs 0 .5 1]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from regjax.class_metrics import TradeOff
from regjax.class_plots import plot_trade_off
from regjax.classification import post_shift_reports
from regjax.log import print_table

FIGURES = ("accuracy", "balanced", "worst")


def summary(name: str, reports: list[dict[str, Any]]) -> dict[str, Any]:
    row: dict[str, Any] = {"model": name}
    for figure in FIGURES:
        values = np.array([report[figure] for report in reports], np.float64)
        row[figure] = values.mean()
        row[f"{figure}_se"] = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else 0.0
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--stages", nargs="+", default=["standard_standard"])
    parser.add_argument("--tradeoffs", nargs="+", type=float, default=[0.0, 0.5, 1.0])
    given = parser.parse_args()
    parts = sorted((given.workdir / "runs").iterdir())
    trained: dict[str, list[dict[str, Any]]] = {}
    for part in parts:
        for name, stage in json.loads((part / "results.json").read_text())["stages"].items():
            trained.setdefault(name, []).extend(stage["runs"])
    rows = [summary(name, reports) for name, reports in trained.items()]
    groups = {row["model"]: row["model"].partition("_")[0] for row in rows}
    for stage in given.stages:
        for share in given.tradeoffs:
            reports = [
                one for part in parts for one in post_shift_reports(part, stage, tradeoff=share)
            ]
            name = f"{stage}, post-shift {share:g}"
            rows.append(summary(name, reports))
            groups[name] = f"{stage}, post-shift"
    shown = [
        {"model": row["model"]}
        | {figure: f"{row[figure]:.4f} ± {row[f'{figure}_se']:.4f}" for figure in FIGURES}
        for row in rows
    ]
    print_table(f"{given.workdir.name}: test images, mean ± standard error", shown)
    curves: dict[str, list[TradeOff]] = {}
    for row in rows:
        point = TradeOff(
            row["model"].rpartition(" ")[2] if "post-shift" in row["model"] else row["model"],
            row["balanced"], row["worst"], row["balanced_se"], row["worst_se"],
        )  # fmt: skip
        curves.setdefault(groups[row["model"]], []).append(point)
    joined = {name for name in curves if "post-shift" in name}
    curves = {
        label: points
        for name, curve in curves.items()
        for label, points in (
            [(name, curve)] if name in joined else [(point.name, [point]) for point in curve]
        )
    }
    print(plot_trade_off(given.workdir / "trade_off.png", curves))


if __name__ == "__main__":
    main()
