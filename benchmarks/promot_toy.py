"""ProMoT on the toy with a known answer, several seeds: a table, and a picture of how formats are forgotten.

for s in 0 1 2; do regjax train configs/promot_toy.py --seed $s --workdir runs/promot_$s; done
python benchmarks/promot_toy.py runs/promot_0 runs/promot_1 runs/promot_2 --picture docs/promot_toy.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from regjax.log import read_log

FIGURES = {
    "main/exact_match": "trained task",
    "larger/exact_match": "other task",
    "larger/format_ratio": "label answers to the other task",
}
SHOWN = {
    "fine_tuning": "fine-tuning",
    "joint_training": "joint training",
    "fixed_prompt": "fixed random prompt",
    "promot": "ProMoT, second stage",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("workdirs", type=Path, nargs="+")
    parser.add_argument("--picture", type=Path)
    arguments = parser.parse_args()
    print_table(arguments.workdirs)
    if arguments.picture:
        draw(arguments.workdirs, arguments.picture)


def print_table(workdirs: list[Path]) -> None:
    tables = [json.loads((w / "results.json").read_text())["text_table"] for w in workdirs]
    print("| stage |", " | ".join(FIGURES.values()), "|")
    print("|---|" + "---:|" * len(FIGURES))
    for rows in zip(*tables, strict=True):
        cells = []
        for figure in FIGURES:
            found = np.array([row[figure] for row in rows], float)
            cell = f"{found.mean():.3f} ± {found.std(ddof=1):.3f}"
            cells.append("" if np.isnan(found).any() else cell)
        print("|", " | ".join([rows[0]["stage"], *cells]), "|")


def draw(workdirs: list[Path], path: Path) -> None:
    """Mean over the seeds, and their range, by step of each method."""
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    axes = figure.subplots(1, 2, sharex=True)
    panels = {
        "validation/larger/format_ratio": "Other task: answers that are a label",
        "validation/main/exact_match": "Trained task: right answers",
    }
    logs = [read_log(workdir / "log.jsonl") for workdir in workdirs]
    for ax, (name, title) in zip(axes, panels.items(), strict=True):
        for color, stage in enumerate(SHOWN):
            _curve(ax, logs, stage, name, f"C{color}")
        ax.set(xlabel="step", ylabel="share", ylim=(-0.03, 1.03), title=title)
        ax.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    figure.savefig(path, dpi=120)


def _curve(ax: Axes, logs: list[list[dict]], stage: str, name: str, color: str) -> None:
    found = [
        [(x["step"], x[name]) for x in log if x["stage"] == stage and name in x] for log in logs
    ]
    points = np.array(found)  # [seeds, points, 2]
    steps, values = points[0, :, 0], points[:, :, 1]
    ax.fill_between(steps, values.min(0), values.max(0), color=color, alpha=0.15, linewidth=0)
    ax.plot(steps, values.mean(0), color=color, marker="o", markersize=3, label=SHOWN[stage])


if __name__ == "__main__":
    main()
