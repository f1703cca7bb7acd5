"""Pictures of classifiers: what is on their axes."""

import math

import numpy as np
import pytest
from matplotlib.figure import Figure

from regjax.class_metrics import TradeOff
from regjax.class_plots import (
    class_bars,
    class_lines,
    plot_class_accuracies,
    plot_trade_off,
    trade_off,
)
from regjax.errors import InputError

CURVES = {
    "robust": [TradeOff("0", 0.8, 0.5), TradeOff("0.5", 0.78, 0.6), TradeOff("1", 0.7, 0.65)],
    "cross-entropy": [TradeOff("", 0.82, 0.2, 0.01, 0.03)],
    "post-shift": [TradeOff("", 0.75, 0.55), TradeOff("lost", 0.9, math.nan)],
}


def axes():
    return Figure().subplots()


def is_png(path):
    return path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_the_front_is_ringed_and_nothing_lies_beyond_it():
    ax = axes()
    trade_off(ax, CURVES, "balanced", "worst")
    (rings,) = (line for line in ax.lines if line.get_label() == "Pareto front")
    ringed = set(zip(*rings.get_data(), strict=True))
    assert ringed == {(0.8, 0.5), (0.78, 0.6), (0.7, 0.65), (0.82, 0.2)}
    names = [text.get_text() for text in ax.get_legend().get_texts()]
    assert set(names) == {"robust", "cross-entropy", "post-shift", "Pareto front"}
    assert "lost" not in [text.get_text() for text in ax.texts]
    low, high = ax.get_xlim()
    assert low < 0.7 and high > 0.82


def test_bars_have_the_accuracies_as_heights():
    ax = axes()
    class_bars(ax, {"a": [0.1, 0.2, math.nan], "b": [0.9, 1.0, 0.3]}, ["cat", "dog", "automobile"])
    heights = [[bar.get_height() for bar in bars] for bars in ax.containers]
    np.testing.assert_array_equal(heights, [[0.1, 0.2, math.nan], [0.9, 1.0, 0.3]])
    (said,) = ax.texts
    assert said.get_text() == "undefined" and said.get_position()[0] == pytest.approx(1.8)
    centres = [[bar.get_x() + bar.get_width() / 2 for bar in bars] for bars in ax.containers]
    np.testing.assert_allclose(np.mean(centres, axis=0), [0, 1, 2], atol=1e-12)
    assert [text.get_text() for text in ax.get_xticklabels()] == ["cat", "dog", "automobile"]


def test_lines_are_sorted_by_the_first_model():
    ax = axes()
    class_lines(ax, {"teacher": [0.5, 0.1, 0.9], "student": [0.2, 0.3, 0.4]})
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), [0.1, 0.5, 0.9])
    np.testing.assert_array_equal(ax.lines[1].get_ydata(), [0.3, 0.2, 0.4])


def test_files_are_written(tmp_path):
    assert is_png(plot_trade_off(tmp_path / "trade_off.png", CURVES))
    few, many = np.linspace(0, 1, 5), np.linspace(0, 1, 100)
    assert is_png(plot_class_accuracies(tmp_path / "few.png", {"a": few, "b": few**2}, "vwxyz"))
    assert is_png(plot_class_accuracies(tmp_path / "many.png", {"a": many, "b": many**2}))


def test_what_cannot_be_drawn_is_refused(tmp_path):
    with pytest.raises(InputError, match="none of the 1 points is defined"):
        plot_trade_off(tmp_path / "x.png", {"a": [TradeOff("", math.nan, 0.5)]})
    for accuracies, names in (({}, ()), ({"a": [0.1], "b": [0.1, 0.2]}, ()), ({"a": [0.1]}, "xy")):
        with pytest.raises(InputError, match="one number of classes"):
            plot_class_accuracies(tmp_path / "x.png", accuracies, names)
