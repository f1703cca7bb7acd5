"""Pictures of a run, saved as PNG."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from regjax.errors import InputError
from regjax.log import read_log

if TYPE_CHECKING:
    from matplotlib.axes import Axes


FEW = 12
"""Up to so many distinct scores are drawn one by one; more are binned."""


def plot_workdir(workdir: str | Path) -> list[Path]:
    """Draws what a run left behind into `workdir/plots`: learning curve, comparison, and for every stage
    with predictions predicted against true, reliability and error by true score. Returns the files.

    Raises:
      InputError: if `workdir` holds no log of a run.
    """
    workdir = Path(workdir)
    log = read_log(workdir / "log.jsonl")
    if not log:
        raise InputError(
            f"{workdir} holds no log.jsonl with entries: is it the --workdir of a run?"
        )
    folder = workdir / "plots"
    folder.mkdir(exist_ok=True)
    written = [_save(folder / "learning_curve.png", lambda ax: learning_curve(ax, log), 2)]
    results = workdir / "results.json"
    if results.is_file():
        table = json.loads(results.read_text())["table"]
        if table:
            written.append(_save(folder / "comparison.png", lambda ax: comparison(ax[0], table)))
    for path in sorted(workdir.glob("*/predictions_*.jsonl")):
        predictions = read_predictions(path)
        title = f"{path.parent.name}, {path.stem.removeprefix('predictions_')}"
        name = f"{path.parent.name}_{path.stem.removeprefix('predictions_')}.png"
        written.append(
            _save(folder / name, lambda ax, p=predictions, t=title: _panels(ax, p, t), 3)
        )
    return written


def read_predictions(path: Path) -> dict[str, np.ndarray]:
    """Columns of a predictions file: `target`, one per read-out, `values` `[K]`, `probabilities` `[N, K]`."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    skip = ("id", "distribution", "grid_mass")
    columns = {key: np.array([line[key] for line in lines]) for key in lines[0] if key not in skip}
    columns["probabilities"] = np.array([list(line["distribution"].values()) for line in lines])
    return columns


def learning_curve(axes: Sequence[Axes], log: Sequence[Mapping[str, Any]]) -> None:
    """Training loss by step on the left, validation error by step on the right, a line a stage."""
    for stage in dict.fromkeys(line["stage"] for line in log):
        lines = [line for line in log if line["stage"] == stage]
        loss = [(line["step"], line["loss"]) for line in lines if "loss" in line]
        axes[0].plot(*zip(*loss, strict=True), label=stage) if loss else None
        names = [name for line in lines for name in line if name.endswith("/rmse")]
        for name in dict.fromkeys(names):
            points = [(line["step"], line[name]) for line in lines if name in line]
            label = f"{stage}, {name.split('/')[1]}"
            axes[1].plot(*zip(*points, strict=True), marker=".", label=label)
    axes[0].set(xlabel="step", ylabel="training loss", title="Training", yscale="log")
    axes[1].set(xlabel="step", ylabel="RMSE", title="Validation")
    for ax in axes:
        if ax.get_legend_handles_labels()[1]:
            ax.legend(frameon=False)


def comparison(ax: Axes, table: Sequence[Mapping[str, Any]]) -> None:
    """RMSE of every stage and read-out as bars, a known bound as a line."""
    bars = [row for row in table if row["stage"] != "reference"]
    names = [f"{row['stage']}\n{row['read-out']}" for row in bars]
    errors = [row["rmse"] for row in bars]
    colors = [f"C{list(dict.fromkeys(r['stage'] for r in bars)).index(r['stage'])}" for r in bars]
    drawn = ax.bar(names, errors, color=colors, width=0.6)
    ax.bar_label(drawn, fmt="%.3f", padding=2)
    for row in table:
        if row["stage"] == "reference":
            label = f"{row['read-out']}: {row['rmse']:.3f}"
            ax.axhline(row["rmse"], color="black", linestyle="--", linewidth=1, label=label)
            ax.legend(frameon=False, loc="upper right")
    split = table[0]["split"]
    ax.set(ylabel=f"RMSE on {split}", title="Read-outs side by side (lower is better)")
    ax.set_ylim(0, 1.2 * max(row["rmse"] for row in table))


def predicted_against_true(ax: Axes, predicted: np.ndarray, target: np.ndarray, name: str) -> None:
    """Each example as a point, jittered sideways where few true scores are distinct, and the diagonal."""
    low, high = float(target.min()), float(target.max())
    jitter = np.zeros(len(target))
    if len(np.unique(target)) <= FEW:
        jitter = np.random.default_rng(0).uniform(-1, 1, len(target)) * (high - low) / 30
    ax.plot([low, high], [low, high], color="gray", linewidth=1, linestyle="--")
    ax.scatter(target + jitter, predicted, s=6, alpha=0.3, linewidth=0)
    ax.set(xlabel="true score", ylabel=f"predicted score ({name})", title="Predicted against true")


def reliability(ax: Axes, predicted: np.ndarray, target: np.ndarray, name: str) -> None:
    """Mean true score by predicted score, on the diagonal if calibrated: a point for each predicted score
    where there are few, for each of ten bins of equal count otherwise."""
    distinct = np.unique(predicted)
    if len(distinct) <= FEW:
        bins = [np.flatnonzero(predicted == value) for value in distinct]
    else:
        bins = np.array_split(np.argsort(predicted, kind="stable"), 10)
    centers = [predicted[part].mean() for part in bins]
    means = [target[part].mean() for part in bins]
    errors = [1.96 * target[part].std() / np.sqrt(len(part)) for part in bins]
    ends = [min(centers + means), max(centers + means)]
    ax.plot(ends, ends, color="gray", linewidth=1, linestyle="--")
    ax.errorbar(centers, means, yerr=errors, marker="o", markersize=4, linewidth=1, capsize=2)
    ax.set(
        xlabel=f"predicted score ({name}), bin mean",
        ylabel="true score, bin mean and 95 %",
        title="Reliability",
    )


def error_by_true_score(
    ax: Axes, predictions: Mapping[str, np.ndarray], target: np.ndarray
) -> None:
    """RMSE of every read-out within bins of the true score."""
    distinct = np.unique(target)
    edges = np.quantile(target, np.linspace(0, 1, 9)) if len(distinct) > FEW else None
    if edges is None:
        groups = [(value, target == value) for value in distinct]
    else:
        edges = np.unique(edges)
        index = np.clip(np.digitize(target, edges[1:-1]), 0, len(edges) - 2)
        groups = [(target[index == i].mean(), index == i) for i in range(len(edges) - 1)]
    for name, predicted in predictions.items():
        errors = [np.sqrt(np.mean((predicted - target)[mask] ** 2)) for _, mask in groups]
        ax.plot([center for center, _ in groups], errors, marker="o", markersize=4, label=name)
    ax.set(xlabel="true score", ylabel="RMSE", title="Error by true score")
    ax.legend(frameon=False)


def _panels(axes: Sequence[Axes], columns: Mapping[str, np.ndarray], title: str) -> None:
    read_outs = {k: v for k, v in columns.items() if k not in ("target", "probabilities")}
    first = "mean" if "mean" in read_outs else next(iter(read_outs))
    predicted_against_true(axes[0], read_outs[first], columns["target"], first)
    reliability(axes[1], read_outs[first], columns["target"], first)
    error_by_true_score(axes[2], read_outs, columns["target"])
    axes[0].figure.suptitle(title)


def _save(path: Path, draw, panels: int = 1) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(4.6 * panels, 6.5), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, panels, squeeze=False)[0]
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    draw(axes)
    figure.savefig(path, dpi=120)
    return path
