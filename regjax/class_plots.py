"""Pictures of classifiers by class, saved as PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from regjax.class_metrics import TradeOff, pareto_front
from regjax.errors import InputError
from regjax.plots import save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FEW = 20
"""Up to so many classes have bars; more are drawn as lines over the sorted classes."""

_COLORS = 10
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_LEGEND: dict[str, Any] = {
    "frameon": False, "loc": "upper left", "bbox_to_anchor": (1, 1), "fontsize": "small",
}  # fmt: skip


def plot_trade_off(
    path: str | Path,
    curves: Mapping[str, Sequence[TradeOff]],
    *,
    overall: str = "balanced accuracy",
    worst: str = "worst-class accuracy",
) -> Path:
    """Average against worst-class accuracy of models or shifts, their Pareto front marked.

    Args:
      path: of the PNG.
      curves: name -> points. The points of one name share a colour, and are joined in their order
        where they are several. A point that is not defined is left out.
      overall, worst: what the axes say.

    Raises:
      InputError: no point is defined.
    """
    points = [point for curve in curves.values() for point in curve]
    if not any(pareto_front(points)):
        raise InputError(f"plot_trade_off: none of the {len(points)} points is defined")
    return save(Path(path), lambda axes: trade_off(axes[0], curves, overall, worst), width=7.5)


def plot_class_accuracies(
    path: str | Path,
    accuracies: Mapping[str, Sequence[float]],
    class_names: Sequence[str] = (),
) -> Path:
    """Accuracy of every class, side by side for several models.

    Up to `FEW` classes have a group of bars each, in their own order; more are lines over the classes,
    sorted by the first model. A class without an accuracy is said to be undefined, or a gap.

    Args:
      path: of the PNG.
      accuracies: name of the model -> its `C` accuracies.
      class_names: `C` names; without them the classes are numbered.

    Raises:
      InputError: no models, or models and names of different classes.
    """
    counts = {len(values) for values in accuracies.values()}
    if class_names:
        counts.add(len(class_names))
    if not accuracies or len(counts) != 1:
        raise InputError(
            f"plot_class_accuracies: {len(accuracies)} models of {sorted(counts)} classes (names "
            "included), expected at least one model and one number of classes"
        )
    (classes,) = counts
    names = list(class_names) or [str(k) for k in range(classes)]
    if classes > FEW:
        return save(Path(path), lambda axes: class_lines(axes[0], accuracies), width=9)
    width = min(max(6.5, 2 + 0.22 * classes * (1 + len(accuracies))), 18)
    return save(Path(path), lambda axes: class_bars(axes[0], accuracies, names), width=width)


def plot_stages(folder: Path, stages: Mapping[str, Any]) -> list[Path]:
    """Accuracy by class and, of several stages, average against worst-class accuracy, of what an image
    experiment's `results.json` says of its stages: means of the runs."""
    runs = {
        name: stage["runs"]
        for name, stage in stages.items()
        if all("accuracies" in run for run in stage["runs"])
    }
    if not runs:
        return []

    def mean(name: str, figure: str) -> Any:
        return np.mean(np.array([run[figure] for run in runs[name]], np.float64), 0)

    classes = next(iter(stages.values()))["classes"]
    written = [
        plot_class_accuracies(
            folder / "class_accuracies.png",
            {name: mean(name, "accuracies").tolist() for name in runs},
            classes,
        )
    ]
    points = [
        TradeOff(name, float(mean(name, "balanced")), float(mean(name, "worst"))) for name in runs
    ]
    if len(points) > 1 and any(pareto_front(points)):
        curves = {point.name: [point] for point in points}
        written.append(plot_trade_off(folder / "trade_off.png", curves))
    return written


def trade_off(ax: Axes, curves: Mapping[str, Sequence[TradeOff]], overall: str, worst: str) -> None:
    """See `plot_trade_off`."""
    points = [point for curve in curves.values() for point in curve]
    front = sorted(
        ((p.overall, p.worst) for p, on in zip(points, pareto_front(points), strict=True) if on),
        reverse=True,
    )
    for index, (name, curve) in enumerate(curves.items()):
        shown = [p for p in curve if np.isfinite(p.overall) and np.isfinite(p.worst)]
        if not shown:
            continue
        color = f"C{index % _COLORS}"
        # A point on its own has its name beside it.
        label = None if [p.name for p in shown] == [name] else name
        ax.errorbar(
            [p.overall for p in shown], [p.worst for p in shown],
            xerr=[p.overall_error for p in shown], yerr=[p.worst_error for p in shown],
            color=color, marker=_MARKERS[index % len(_MARKERS)], markersize=6, linewidth=1,
            elinewidth=0.8, alpha=0.9, label=label, zorder=3,
        )  # fmt: skip
        for point in shown:
            ax.annotate(
                point.name, (point.overall, point.worst), (6, 5), textcoords="offset points",
                fontsize="x-small", color=color, zorder=4,
            )  # fmt: skip
    # What the front dominates lies left of and below it, so it goes on straight to both axes.
    x, y = np.transpose(front)
    ax.plot(
        x, y, linestyle="none", marker="o", markersize=13, markerfacecolor="none",
        markeredgecolor="black", markeredgewidth=1.2, label="Pareto front", zorder=2,
    )  # fmt: skip
    ends = ax.get_xlim()[0], ax.get_ylim()[0]
    ax.step(
        [x[0], *x, ends[0]], [ends[1], *y, y[-1]], where="post", color="gray", linewidth=0.8,
        linestyle=":", zorder=1,
    )  # fmt: skip
    ax.set_xlim(left=ends[0])
    ax.set_ylim(bottom=ends[1])
    ax.margins(x=0.12)
    ax.set(
        xlabel=overall, ylabel=worst, title="Average against the worst class (better: up, right)"
    )
    ax.legend(loc="best", frameon=False, fontsize="small")


def class_bars(
    ax: Axes, accuracies: Mapping[str, Sequence[float]], class_names: Sequence[str]
) -> None:
    """See `plot_class_accuracies`."""
    width = 0.8 / len(accuracies)
    for index, (name, values) in enumerate(accuracies.items()):
        places = np.arange(len(values)) + (index - (len(accuracies) - 1) / 2) * width
        color = f"C{index % _COLORS}"
        ax.bar(places, values, 0.92 * width, color=color, label=name)
        for place in places[~np.isfinite(values)]:
            ax.text(
                place, 0.01, "undefined", color=color, rotation=90, ha="center", va="bottom",
                fontsize="x-small",
            )  # fmt: skip
    long = max(map(len, class_names)) > 4
    ax.set_xticks(
        range(len(class_names)), list(class_names), rotation=35 if long else 0,
        ha="right" if long else "center", rotation_mode="anchor",
    )  # fmt: skip
    ax.set_xlim(-0.6, len(class_names) - 0.4)
    _accuracy_axis(ax)


def class_lines(ax: Axes, accuracies: Mapping[str, Sequence[float]]) -> None:
    """See `plot_class_accuracies`."""
    first = next(iter(accuracies))
    order = np.argsort(accuracies[first], kind="stable")
    for index, (name, values) in enumerate(accuracies.items()):
        ax.plot(
            np.arange(len(order)), np.asarray(values, np.float64)[order], color=f"C{index % _COLORS}",
            marker=_MARKERS[index % len(_MARKERS)], markersize=3, linewidth=0.8, label=name,
            zorder=3 if index == 0 else 2,
        )  # fmt: skip
    ax.margins(x=0.01)
    ax.set_xlabel(f"classes, sorted by the accuracy of {first}")
    _accuracy_axis(ax)


def _accuracy_axis(ax: Axes) -> None:
    ax.set(ylabel="accuracy", ylim=(0, 1), title="Accuracy by class")
    ax.yaxis.grid(True, linewidth=0.5, alpha=0.4)
    ax.set_axisbelow(True)
    ax.legend(**_LEGEND)
