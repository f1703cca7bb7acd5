"""Pictures of a run, saved as PNG."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
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
    results = workdir / "results.json"
    if not log and not results.is_file():
        raise InputError(
            f"{workdir} holds no log.jsonl with entries: is it the --workdir of a run?"
        )
    folder = workdir / "plots"
    folder.mkdir(exist_ok=True)
    written = []
    if log:
        path = folder / "learning_curve.png"
        written.append(_save(path, lambda ax: learning_curve(ax, log), 2))
    if results.is_file():
        table = json.loads(results.read_text())["table"]
        if table:
            path = folder / "comparison.png"
            wide = max(6.5, 1.3 * len(table))
            written.append(_save(path, lambda ax: comparison(ax[0], table), width=wide))
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
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

    for color, stage in zip(_colors(), dict.fromkeys(line["stage"] for line in log), strict=False):
        lines = [line for line in log if line["stage"] == stage]
        loss = [(line["step"], line["loss"]) for line in lines if "loss" in line]
        if loss:
            axes[0].plot(*zip(*loss, strict=True), color=color, label=stage)
        names = dict.fromkeys(name for line in lines for name in line if name.endswith("/rmse"))
        for style, name in zip(itertools.cycle(("-", "--", ":", "-.")), names, strict=False):
            points = [(line["step"], line[name]) for line in lines if name in line]
            label = f"{stage}, {name.split('/')[1]}"
            axes[1].plot(
                *zip(*points, strict=True),
                style,
                color=color,
                marker="o",
                markersize=4,
                label=label,
            )
    losses = [line["loss"] for line in log if "loss" in line]
    if losses and 0 < 5 * min(losses) < max(losses):
        axes[0].set_yscale("log")
        axes[0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        axes[0].yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes[0].yaxis.set_minor_formatter(NullFormatter())
    axes[0].set(xlabel="step", ylabel="loss (of each stage's objective)", title="Training")
    axes[1].set(xlabel="step", ylabel="RMSE", title="Validation")
    for ax in axes:
        ax.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        if ax.get_legend_handles_labels()[1]:
            ax.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1), fontsize="small")
        else:
            _say(ax, "no figures in the log")


def comparison(ax: Axes, table: Sequence[Mapping[str, Any]]) -> None:
    """RMSE of every stage and read-out as bars, a known bound as a line."""
    bars = [row for row in table if row["stage"] != "reference"]
    stages = list(dict.fromkeys(row["stage"] for row in bars))
    errors = [np.nan if row["rmse"] is None else row["rmse"] for row in bars]
    colors = [f"C{stages.index(row['stage']) % 10}" for row in bars]
    drawn = ax.bar(range(len(bars)), errors, color=colors, width=0.6)
    ax.bar_label(drawn, fmt="%.3f", padding=2)
    ax.set_xticks(
        range(len(bars)), [f"{row['stage']}\n{row['read-out'].replace('_', ' ')}" for row in bars]
    )
    known = [row for row in table if row["stage"] == "reference" and row["rmse"] is not None]
    for row in known:
        ax.axhline(row["rmse"], color="black", linestyle="--", linewidth=1)
        ax.annotate(
            f"{row['read-out']}\n{row['rmse']:.3f}", (1, row["rmse"]), (4, 0),
            ("axes fraction", "data"), "offset points", va="center",
        )  # fmt: skip
    split = table[0]["split"]
    ax.set(ylabel=f"RMSE on {split}", title="Read-outs side by side (lower is better)")
    heights = [*(row["rmse"] for row in known), *(error for error in errors if np.isfinite(error))]
    ax.set_ylim(0, 1.12 * max(heights, default=1.0) or 1.0)


def predicted_against_true(ax: Axes, predicted: np.ndarray, target: np.ndarray, name: str) -> None:
    """Each example as a point, jittered sideways where few true scores are distinct, and the diagonal."""
    low, high = _range(target)
    jitter = np.zeros(len(target))
    if len(np.unique(target)) <= FEW:
        jitter = np.random.default_rng(0).uniform(-1, 1, len(target)) * (high - low) / 30
    ax.plot([low, high], [low, high], color="gray", linewidth=1, linestyle="--")
    alpha = float(np.clip(300 / max(len(target), 1), 0.15, 0.7))
    ax.scatter(target + jitter, predicted, s=12, alpha=alpha, linewidth=0)
    ax.set(xlabel="true score", ylabel=f"predicted score ({name})", title="Predicted against true")


def reliability(ax: Axes, predicted: np.ndarray, target: np.ndarray, name: str) -> None:
    """Mean true score by predicted score, on the diagonal if calibrated: a point for each predicted score
    where there are few, for up to ten bins of equal count, at least twenty examples each, otherwise."""
    low, high = _range(target)
    ax.plot([low, high], [low, high], color="gray", linewidth=1, linestyle="--")
    ax.set(
        xlabel=f"predicted score ({name})", ylabel="true score, mean and 95 %", title="Reliability"
    )
    distinct = np.unique(predicted)
    if len(distinct) <= FEW:
        bins = [np.flatnonzero(predicted == value) for value in distinct]
    elif np.ptp(predicted) < 0.01 * (high - low):
        bins = [np.arange(len(predicted))]
    else:
        count = int(np.clip(len(predicted) // 20, 2, 10))
        bins = np.array_split(np.argsort(predicted, kind="stable"), count)
    centers = [predicted[part].mean() for part in bins]
    means = [target[part].mean() for part in bins]
    errors = [1.96 * target[part].std() / np.sqrt(len(part)) for part in bins]
    ax.errorbar(centers, means, yerr=errors, marker="o", markersize=4, linewidth=1, capsize=2)


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
        ax.plot(
            [center for center, _ in groups], errors, marker="o", markersize=4,
            label=name.replace("_", " "),
        )  # fmt: skip
    ax.set(xlabel="true score", ylabel="RMSE", title="Error by true score")
    ax.set_ylim(bottom=0)
    if len(distinct) <= FEW:
        ax.set_xticks(distinct)
    ax.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1), fontsize="small")


def _panels(axes: Sequence[Axes], columns: Mapping[str, np.ndarray], title: str) -> None:
    read_outs = {k: v for k, v in columns.items() if k not in ("target", "probabilities")}
    first = "mean" if "mean" in read_outs else next(iter(read_outs))
    finite = np.isfinite(read_outs[first])
    predicted, target = read_outs[first][finite], columns["target"][finite]
    if len(predicted):
        predicted_against_true(axes[0], predicted, target, first)
        reliability(axes[1], predicted, target, first)
    else:
        for ax in axes[:2]:
            _say(ax, f"no prediction ({first}) is a number")
    error_by_true_score(axes[2], read_outs, columns["target"])
    axes[0].figure.suptitle(title, fontweight="bold", x=0.01, ha="left")


def _range(target: np.ndarray) -> tuple[float, float]:
    low, high = float(target.min()), float(target.max())
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _colors() -> Iterator[str]:
    return (f"C{index % 10}" for index in itertools.count())


def _say(ax: Axes, text: str) -> None:
    ax.text(0.5, 0.5, text, ha="center", va="center", transform=ax.transAxes, color="gray")


def _save(path: Path, draw: Callable, panels: int = 1, width: float = 0.0) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width or 4.8 * panels, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, panels, squeeze=False)[0]
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    draw(axes)
    figure.savefig(path, dpi=120)
    return path
