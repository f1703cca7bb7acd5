"""Pictures of a run, saved as PNG."""

from __future__ import annotations

import fnmatch
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from regjax.errors import InputError
from regjax.log import read_log

if TYPE_CHECKING:
    from matplotlib.axes import Axes


FEW = 12
"""Up to so many distinct scores are drawn one by one; more are binned."""

COSINES = "cosine_*"
MOST_PANELS = 8
"""Figures of a text comparison beyond these are left out."""

_OUTSIDE: dict[str, Any] = {
    "frameon": False, "loc": "upper left", "bbox_to_anchor": (1, 1), "fontsize": "small",
    "handlelength": 3,
}  # fmt: skip
_TITLES = {"rmse": "RMSE", "cosine": "Cosine of the gradients of true and of shuffled labels"}
_STYLES = ("-", "--", ":", "-.")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")

Points = list[tuple[int, float]]


def plot_workdir(workdir: str | Path) -> list[Path]:
    """Draws what a run left behind into `workdir/plots`: learning curve, comparison, for every stage
    with predictions predicted against true, reliability and error by true score; and of its probes
    format ratio, gradient alignment and comparison, where there are any. Returns the files.

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
        written.append(save(path, lambda ax: learning_curve(ax, log), 2))
    if formatted := len({stage for stage, _, _ in curves(log, "format_ratio")}):
        path, wide = folder / "format_ratio.png", 3.6 * formatted + 2
        written.append(save(path, lambda ax: format_curves(ax, log), formatted, wide, rows=2))
    if aligned := len({stage for stage, _, _ in curves(log, COSINES)}):
        path, wide = folder / "gradient_alignment.png", 3.6 * aligned + 2
        written.append(save(path, lambda ax: alignment_curves(ax, log), aligned, wide))
    found = json.loads(results.read_text()) if results.is_file() else {}
    if table := [row for row in found.get("table", ()) if "rmse" in row]:
        path, wide = folder / "comparison.png", max(6.5, 1.3 * len(table))
        written.append(save(path, lambda ax: comparison(ax[0], table), width=wide))
    if panels := text_figures(text_table := found.get("text_table", ())):
        path, groups = folder / "text_comparison.png", max(map(len, panels.values()))
        wide = min(max(6.5, 2 + groups * max(1.0, 0.45 * len(text_table))), 18)
        draw = lambda ax: text_comparison(ax, text_table)  # noqa: E731
        written.append(save(path, draw, width=wide, rows=len(panels)))
    if any("classes" in stage for stage in found.get("stages", {}).values()):
        from regjax.class_plots import plot_stages

        written += plot_stages(folder, found["stages"])
    for path in sorted(workdir.glob("*/predictions_*.jsonl")):
        predictions = read_predictions(path)
        title = f"{path.parent.name}, {path.stem.removeprefix('predictions_')}"
        name = f"{path.parent.name}_{path.stem.removeprefix('predictions_')}.png"
        written.append(save(folder / name, lambda ax, p=predictions, t=title: _panels(ax, p, t), 3))
    return written


def read_predictions(path: Path) -> dict[str, np.ndarray]:
    """Columns of a predictions file: `target`, one per read-out, `values` `[K]`, `probabilities` `[N, K]`."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    skip = ("id", "distribution", "grid_mass")
    columns = {key: np.array([line[key] for line in lines]) for key in lines[0] if key not in skip}
    columns["probabilities"] = np.array([list(line["distribution"].values()) for line in lines])
    return columns


def curves(log: Sequence[Mapping[str, Any]], figure: str) -> dict[tuple[str, str, str], Points]:
    """`(step, value)` by (stage, probe or read-out, figure) of `validation/NAME/FIGURE` in the log, for
    the figures that match the shell pattern `figure`."""
    found: dict[tuple[str, str, str], Points] = {}
    for line in log:
        for key, value in line.items():
            split, _, rest = key.partition("/")
            name, _, measured = rest.rpartition("/")
            if split == "validation" and name and fnmatch.fnmatchcase(measured, figure):
                points = found.setdefault((line["stage"], name, measured), [])
                points.append((line["step"], math.nan if value is None else value))
    return found


def learning_curve(axes: Sequence[Axes], log: Sequence[Mapping[str, Any]]) -> None:
    """Training loss by step on the left, validation error by step on the right, a line a stage.

    A run without scores has accuracy or else exact match on the right.
    """
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    stages = _unique(line["stage"] for line in log)
    for index, stage in enumerate(stages):
        lines = [line for line in log if line["stage"] == stage]
        loss = [(line["step"], line["loss"]) for line in lines if "loss" in line]
        if loss:
            axes[0].plot(*zip(*loss, strict=True), color=_color(index), label=stage)
    losses = [line["loss"] for line in log if "loss" in line]
    if losses and 0 < 5 * min(losses) < max(losses):
        axes[0].set_yscale("log")
        axes[0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        axes[0].yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes[0].yaxis.set_minor_formatter(NullFormatter())
    axes[0].set(ylabel="loss (of each stage's objective)", title="Training")
    if losses:
        axes[0].legend(**_OUTSIDE)
    known = [name for name in ("rmse", "accuracy", "exact_match") if curves(log, name)]
    figure = (*known, "rmse")[0]
    found = {(stage, name): points for (stage, name, _), points in curves(log, figure).items()}
    names = _unique(name for _, name in found)
    _lines(axes[1], found, stages, names)
    if found:
        _legend(axes[1], stages, names)
    axes[1].set(ylabel=_title(figure), title="Validation")
    for ax in axes:
        _by_step(ax)


def format_curves(axes: Sequence[Axes], log: Sequence[Mapping[str, Any]]) -> None:
    """Format ratio of the validation answers by step and, in a second row, exact match: a panel a stage
    that has format ratios, a line a probe."""
    ratios, matches = (curves(log, figure) for figure in ("format_ratio", "exact_match"))
    stages = _unique(key[0] for key in ratios)
    probes = _unique(key[1] for key in (*ratios, *matches) if key[0] in stages)
    panels = [(stage, found) for found in (ratios, matches) for stage in stages]
    for ax, (stage, found) in zip(axes, panels, strict=True):
        lines = {(key[1], ""): points for key, points in found.items() if key[0] == stage}
        _lines(ax, lines, probes, [""])
        ax.set_ylim(-0.05, 1.05)
        _by_step(ax)
    for ax, stage in zip(axes, stages, strict=False):
        ax.set_title(stage)
    axes[0].set_ylabel("format ratio")
    axes[len(stages)].set_ylabel("exact match")
    _legend(axes[len(stages) - 1], probes, [""])


def alignment_curves(axes: Sequence[Axes], log: Sequence[Mapping[str, Any]]) -> None:
    """Cosine of the gradients of true and of shuffled labels by step: a panel a stage that has them, a
    line a group of parameters (and probe)."""
    found = {
        (stage, figure.removeprefix("cosine_"), probe): points
        for (stage, probe, figure), points in curves(log, COSINES).items()
    }
    groups, probes = _unique(key[1] for key in found), _unique(key[2] for key in found)
    lowest = min(
        (value for points in found.values() for _, value in points if value < 0), default=0
    )
    for ax, stage in zip(axes, _unique(key[0] for key in found), strict=True):
        lines = {key[1:]: points for key, points in found.items() if key[0] == stage}
        ax.axhline(0, color="gray", linewidth=0.8, zorder=0)
        _lines(ax, lines, groups, probes)
        ax.set(title=stage, ylim=(lowest - 0.05, 1.05))
        _by_step(ax)
    _legend(axes[-1], groups, probes)
    axes[0].set_ylabel("cosine of the gradients of\ntrue and of shuffled labels")


def comparison(ax: Axes, table: Sequence[Mapping[str, Any]]) -> None:
    """RMSE of every stage and read-out as bars, a known bound as a line."""
    bars = [row for row in table if row["stage"] != "reference"]
    known = [row for row in table if row["stage"] == "reference" and row.get("rmse") is not None]
    stages = _unique(row["stage"] for row in bars)
    errors = [row.get("rmse") for row in bars]
    colors = [_color(stages.index(row["stage"])) for row in bars]
    drawn = ax.bar(range(len(bars)), [_height(e) for e in errors], color=colors, width=0.6)
    ax.bar_label(drawn, ["undefined" if e is None else f"{e:.3f}" for e in errors], padding=2)
    ax.set_xticks(
        range(len(bars)), [f"{row['stage']}\n{row['read-out'].replace('_', ' ')}" for row in bars]
    )
    for row in known:
        ax.axhline(row["rmse"], color="black", linestyle="--", linewidth=1)
        ax.annotate(
            f"{row['read-out']}\n{row['rmse']:.3f}", (1, row["rmse"]), (4, 0),
            ("axes fraction", "data"), "offset points", va="center",
        )  # fmt: skip
    heights = [*(row["rmse"] for row in known), *map(_height, errors)]
    if not heights:
        _say(ax, "no RMSE in the results")
    split = table[0]["split"] if table else "no split"
    ax.set(ylabel=f"RMSE on {split}", title="Read-outs side by side (lower is better)")
    ax.set_ylim(0, 1.12 * max(heights, default=1.0) or 1.0)


def text_figures(table: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, str]]:
    """The panels of a text comparison: `{figure: {probe: key}}` of the keys `PROBE/FIGURE` in its rows.

    The cosines of all groups are one figure. At most `MOST_PANELS` figures.
    """
    found: dict[str, dict[str, str]] = {}
    for key in _unique(key for row in table for key in row if "/" in key):
        probe, _, figure = key.rpartition("/")
        if figure == "undefined":  # why a figure has no number
            continue
        if fnmatch.fnmatchcase(figure, COSINES):
            figure, _, group = figure.partition("_")
            probe = f"{probe}\n{group}"
        found.setdefault(figure, {})[probe] = key
    return dict(islice(found.items(), MOST_PANELS))


def text_comparison(axes: Sequence[Axes], table: Sequence[Mapping[str, Any]]) -> None:
    """Every figure of the probes in a panel of its own: a group of bars a probe, a bar a stage."""
    width = 0.8 / max(len(table), 1)
    for ax, (figure, keys) in zip(axes, text_figures(table).items(), strict=True):
        ends = [0.0, 1.0]
        for index, row in enumerate(table):
            values = [row.get(key) for key in keys.values()]
            heights = [_height(value) for value in values]
            places = np.arange(len(keys)) + (index - (len(table) - 1) / 2) * width
            drawn = ax.bar(places, heights, 0.9 * width, color=_color(index), label=row["stage"])
            labels = ["none" if value is None else f"{value:.2f}" for value in values]
            ax.bar_label(drawn, labels, padding=2, fontsize="x-small")
            ends += heights
        low, high = min(ends), max(ends)
        ax.axhline(0, color="black", linewidth=0.8)
        ax.set_xticks(range(len(keys)), list(keys))
        ax.set_xlim(-0.6, len(keys) - 0.4)
        ax.set_ylim(low - 0.12 * (high - low) * (low < 0), high + 0.12 * (high - low))
        ax.set_title(_title(figure))
    if table:
        axes[0].legend(**_OUTSIDE)


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


def _color(index: int) -> str:
    return f"C{index % 10}"


def _height(value: float | None) -> float:
    return value if value is not None and math.isfinite(value) else 0.0


def _title(figure: str) -> str:
    return _TITLES.get(figure, figure.replace("_", " ").capitalize())


def _unique(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


def _style(index: int) -> dict[str, Any]:
    return {"linestyle": _STYLES[index % len(_STYLES)], "marker": _MARKERS[index % len(_MARKERS)]}


def _lines(
    ax: Axes,
    found: Mapping[tuple[str, str], Points],
    firsts: Sequence[str],
    seconds: Sequence[str],
) -> None:
    """A line a pair of names, the first of which decides on its color and the second on its style."""
    for (first, second), points in found.items():
        place = firsts.index(first)
        # Marks of earlier lines are larger, so that they are seen below those of later ones.
        size = 4 + 4 * (len(firsts) - 1 - place) / len(firsts)
        label = ", ".join(filter(None, (first, second)))
        style = {**_style(seconds.index(second)), "color": _color(place), "markersize": size}
        ax.plot(*zip(*points, strict=True), label=label, **style)


def _legend(ax: Axes, firsts: Sequence[str], seconds: Sequence[str]) -> None:
    """The colors of the first names, and the styles of the second where they have one."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=_color(i), label=name) for i, name in enumerate(firsts)]
    for index, name in enumerate(filter(None, seconds)):
        handles.append(Line2D([], [], color="gray", label=name, markersize=4, **_style(index)))
    ax.legend(handles=handles, **_OUTSIDE)


def _by_step(ax: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    ax.set_xlabel("step")
    ax.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    if not ax.get_legend_handles_labels()[1]:
        _say(ax, "no figures in the log")


def _say(ax: Axes, text: str) -> None:
    ax.text(0.5, 0.5, text, ha="center", va="center", transform=ax.transAxes, color="gray")


def save(path: Path, draw: Callable, columns: int = 1, width: float = 0.0, rows: int = 1) -> Path:
    """Writes what `draw` draws on the axes of `rows` times `columns` panels as PNG; returns `path`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    size = (width or 4.8 * columns, 4.2 if rows == 1 else 2.8 * rows)
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    draw(axes)
    figure.savefig(path, dpi=120)
    return path
