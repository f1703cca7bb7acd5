"""Plots of image runs and sweeps: which files there are, and that they show what was measured."""

import matplotlib.image
import matplotlib.pyplot as plt
import numpy as np
import pytest

from regjax import InputError, class_plots, sweep_plots
from regjax.cli import main
from regjax.files import write_json
from tests.classification.small import CLASSES


def test_a_run_has_curves_classes_and_a_trade_off(tmp_path, capsys):
    config = tmp_path / "config.py"
    config.write_text(
        "from regjax.classification import ImageStage\n"
        "from regjax.objectives.classification import CrossEntropy\n"
        "from tests.classification.small import experiment as made\n"
        "experiment = made(ImageStage('a', CrossEntropy()), ImageStage('b', CrossEntropy(rate=0.2)),\n"
        "                  data={'held_out': 0.25}, eval_every=1)\n"
    )
    assert main(["train", str(config), "--workdir", str(tmp_path / "run")]) == 0
    shown = capsys.readouterr().out
    for name in ("learning_curve", "class_accuracies", "trade_off"):
        path = tmp_path / "run" / "plots" / f"{name}.png"
        assert str(path) in shown
        assert np.ptp(matplotlib.image.imread(path)[..., :3]) > 0.5


@pytest.fixture
def shown(monkeypatch):
    """The axes of what is drawn, in place of files."""
    found = []

    def keep(path, draw, *panels, **options):
        _, axes = plt.subplots()
        draw([axes])
        found.append(axes)
        return path

    monkeypatch.setattr(class_plots, "save", keep)
    yield found
    plt.close("all")


def test_a_stage_is_drawn_as_the_mean_of_its_runs(tmp_path, shown):
    runs = [
        {"accuracies": [0.2, 0.4, 0.9], "balanced": 0.5, "worst": 0.2},
        {"accuracies": [0.4, 0.6, 0.7], "balanced": 0.6, "worst": 0.4},
    ]
    stages = {name: {"runs": runs, "classes": ["a", "b", "c"]} for name in ("one", "two")}
    stages["ranks"] = {"runs": [{"auc_mean": 0.5}], "classes": ["a", "b", "c"]}
    class_plots.plot_stages(tmp_path, stages)
    bars, points = shown
    heights = [bar.get_height() for bar in bars.patches]
    np.testing.assert_allclose(heights, [0.3, 0.5, 0.8] * 2)
    assert len(heights) == 2 * CLASSES
    places = [tuple(line.get_xydata()[0]) for line in points.lines if len(line.get_xydata()) == 1]
    assert (0.55, pytest.approx(0.3)) in [(pytest.approx(x), y) for x, y in places]


def test_lines_run_along_the_first_axis_of_numbers():
    table = [
        {"rate": rate, "kind": kind, "stage": "s", "accuracy": rate / 2, "accuracy_se": 0.01}
        for kind in ("x", "y")
        for rate in (0.4, 0.2)
    ]
    _, axes = plt.subplots()
    sweep_plots.along_grid(axes, table, "accuracy", "rate", ["rate", "kind"])
    assert [text.get_text() for text in axes.get_legend().texts] == ["s, kind x", "s, kind y"]
    for container in axes.containers:
        np.testing.assert_allclose(container.lines[0].get_xydata(), [[0.2, 0.1], [0.4, 0.2]])
    plt.close("all")


def test_a_workdir_without_a_sweep_is_refused(tmp_path):
    with pytest.raises(InputError, match="holds no finished sweep"):
        sweep_plots.plot_sweep(tmp_path)
    write_json(
        tmp_path / "results.json", {"points": [{"seed": 0}], "table": [{"stage": "s"}], "rows": []}
    )
    assert sweep_plots.plot_sweep(tmp_path) == []
