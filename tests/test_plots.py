"""Pictures: one of each kind for every run, whatever its figures are, and what is drawn in them."""

import json
import math

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from regjax import InputError, plots
from regjax.log import Log
from regjax.plots import plot_workdir, read_predictions

PNG = b"\x89PNG\r\n\x1a\n"


def write_predictions(folder, read_outs, target, values=(1, 2, 3, 4, 5)):
    folder.mkdir(parents=True, exist_ok=True)
    share = {str(value): 1 / len(values) for value in values}
    with (folder / "predictions_test.jsonl").open("w") as file:
        for row, score in enumerate(target):
            named = {name: float(column[row]) for name, column in read_outs.items()}
            line = {"id": str(row), "target": float(score), **named, "distribution": share}
            file.write(json.dumps({**line, "grid_mass": 1.0}) + "\n")


def write_run(workdir, losses=(3.0, 2.0), table=()):
    workdir.mkdir(exist_ok=True)
    for step, loss in enumerate(losses, 1):
        Log(workdir).write("only", step, {"loss": loss})
    (workdir / "results.json").write_text(json.dumps({"table": list(table)}))


def check(written, names):
    assert [path.name for path in written] == names
    for path in written:
        content = path.read_bytes()
        assert content.startswith(PNG)
        assert int.from_bytes(content[16:20]) > 500 and int.from_bytes(content[20:24]) > 400


def test_a_trained_run(trained, tmp_path):
    import shutil

    shutil.copytree(trained, tmp_path / "run")
    panels = [f"{s}_{p}.png" for s in ("first", "second") for p in ("test", "validation")]
    check(plot_workdir(tmp_path / "run"), ["learning_curve.png", "comparison.png", *panels])


DRAW = np.random.default_rng(0)
TARGET = DRAW.integers(1, 6, 60).astype(float)
CASES = {
    "usual": ({"mean": TARGET + DRAW.normal(size=60), "mode": TARGET}, TARGET),
    "constant": ({"mean": np.full(60, 2.5)}, TARGET),
    "nearly constant": ({"mean": 2.5 + 1e-6 * DRAW.normal(size=60)}, TARGET),
    "not numbers": ({"mean": np.full(60, np.nan)}, TARGET),
    "some not numbers": ({"mean": np.where(TARGET > 3, np.nan, TARGET), "mode": TARGET}, TARGET),
    "one record": ({"mode": np.array([3.0])}, np.array([2.0])),
    "one true score": ({"mean": DRAW.normal(size=60)}, np.full(60, 4.0)),
    "real scores": ({"median": DRAW.normal(size=400)}, DRAW.normal(size=400)),
}


@pytest.mark.parametrize("name", CASES)
def test_predictions_of_any_kind(tmp_path, name):
    read_outs, target = CASES[name]
    write_run(tmp_path)
    write_predictions(tmp_path / "only", read_outs, target)
    check(plot_workdir(tmp_path), ["learning_curve.png", "only_test.png"])
    columns = read_predictions(tmp_path / "only" / "predictions_test.jsonl")
    np.testing.assert_array_equal(columns["target"], target)
    np.testing.assert_array_equal(columns[next(iter(read_outs))], next(iter(read_outs.values())))
    assert columns["probabilities"].shape == (len(target), 5)


@pytest.mark.parametrize("losses", [(1.0,), (-2.0, 0.0, 3.0), (float("nan"), 2.0), ()])
@pytest.mark.parametrize("rmse", [None, 0.0, 1.5])
def test_logs_and_tables_of_any_kind(tmp_path, losses, rmse):
    row = {"stage": "only", "read-out": "mean", "split": "test", "rmse": rmse}
    write_run(tmp_path, losses, [row, {**row, "stage": "reference", "read-out": "bound"}])
    Log(tmp_path).write("only", 4, {"validation/mean/rmse": float("nan")})
    check(plot_workdir(tmp_path), ["learning_curve.png", "comparison.png"])


def panels(count):
    return list(Figure().subplots(1, count, squeeze=False)[0])


def drawn(ax):
    """`{label: (steps, values)}` of the lines that have a label."""
    return {
        line.get_label(): (list(line.get_xdata()), list(line.get_ydata()))
        for line in ax.lines
        if not line.get_label().startswith("_")
    }


def bars(ax):
    """`{stage: (heights, labels)}` of a grouped bar chart, and its tick labels."""
    texts = iter(text.get_text() for text in ax.texts)
    found = {
        group.get_label(): (
            [bar.get_height() for bar in group],
            [next(texts) for _ in group],
        )
        for group in ax.containers
    }
    return found, [tick.get_text() for tick in ax.get_xticklabels()]


def entries(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def line(stage, step, **figures):
    return {"stage": stage, "step": step} | {
        f"validation/{name.replace('__', '/')}": value for name, value in figures.items()
    }


def test_curves_are_the_validation_figures_of_one_name():
    log = [
        line("s", 1, rte__accuracy=0.5, mean__accuracy_within=0.1, crps=0.3),
        {"stage": "s", "step": 1, "loss": 2.0, "test/rte/accuracy": 0.9, "accuracy": 0.7},
        line("s", 2, rte__accuracy=None, cb__accuracy=0.25),
        line("t", 2, rte__accuracy=0.75, rte__cosine_mlp=-0.5),
    ]
    found = plots.curves(log, "accuracy")
    assert list(found) == [(s, p, "accuracy") for s, p in (("s", "rte"), ("s", "cb"), ("t", "rte"))]
    assert found["s", "cb", "accuracy"] == [(2, 0.25)]
    assert found["t", "rte", "accuracy"] == [(2, 0.75)]
    (first, second) = found["s", "rte", "accuracy"]
    assert first == (1, 0.5) and second[0] == 2 and math.isnan(second[1])
    assert plots.curves(log, plots.COSINES) == {("t", "rte", "cosine_mlp"): [(2, -0.5)]}
    assert plots.curves([], "rmse") == {}


def test_a_learning_curve_shows_the_error_first():
    log = [
        {"stage": "a", "step": 10, "loss": 3.0},
        line("a", 10, mean__rmse=1.5, mode__rmse=2.0, rte__accuracy=0.5),
        {"stage": "b", "step": 5, "loss": 1.0},
        line("b", 5, mean__rmse=1.25),
    ]
    loss, error = axes = panels(2)
    plots.learning_curve(axes, log)
    assert drawn(loss) == {"a": ([10], [3.0]), "b": ([5], [1.0])}
    assert drawn(error) == {
        "a, mean": ([10], [1.5]), "a, mode": ([10], [2.0]), "b, mean": ([5], [1.25]),
    }  # fmt: skip
    assert error.get_ylabel() == "RMSE" and entries(error) == ["a", "b", "mean", "mode"]
    # A stage has one color in both panels, a read-out one style.
    colors = {to_hex(other.get_color()) for other in (loss.lines[1], error.lines[2])}
    assert len(colors) == 1 and colors != {to_hex(loss.lines[0].get_color())}
    styles = [other.get_linestyle() for other in error.lines]
    assert styles == ["-", "--", "-"]


@pytest.mark.parametrize(
    ("figures", "label", "value"),
    [
        ({"rte__exact_match": 0.25, "rte__accuracy": 0.5}, "Accuracy", 0.5),
        ({"rte__exact_match": 0.25, "rte__format_ratio": 1.0}, "Exact match", 0.25),
    ],
)
def test_a_learning_curve_without_scores_shows_accuracy_or_exact_match(figures, label, value):
    axes = panels(2)
    plots.learning_curve(axes, [line("a", 4, **figures)])
    assert drawn(axes[1]) == {"a, rte": ([4], [value])}
    assert axes[1].get_ylabel() == label
    assert [text.get_text() for text in axes[0].texts] == ["no figures in the log"]


def test_a_learning_curve_says_that_there_are_no_validation_figures():
    axes = panels(2)
    plots.learning_curve(axes, [{"stage": "a", "step": 1, "loss": 2.0}])
    assert [[text.get_text() for text in ax.texts] for ax in axes] == [
        [], ["no figures in the log"],
    ]  # fmt: skip
    assert drawn(axes[0]) == {"a": ([1], [2.0])}


def test_format_curves_are_format_ratio_and_exact_match_by_stage():
    log = [
        line("pretrain", 1, rte__exact_match=0.9),
        line("prompt", 10, cb__format_ratio=0.0, cb__exact_match=0.5, qa__exact_match=0.1),
        line("model", 2, cb__format_ratio=0.25),
        line("prompt", 20, cb__format_ratio=0.75, cb__exact_match=math.nan),
    ]
    axes = panels(4)
    plots.format_curves(axes, log)
    assert [ax.get_title() for ax in axes] == ["prompt", "model", "", ""]
    assert [ax.get_ylabel() for ax in axes] == ["format ratio", "", "exact match", ""]
    assert drawn(axes[0]) == {"cb": ([10, 20], [0.0, 0.75])}
    assert drawn(axes[1]) == {"cb": ([2], [0.25])}
    assert drawn(axes[3]) == {}
    found = drawn(axes[2])
    assert found["qa"] == ([10], [0.1]) and found["cb"][0] == [10, 20]
    np.testing.assert_array_equal(found["cb"][1], [0.5, np.nan])
    assert entries(axes[1]) == ["cb", "qa"]
    assert all(ax.get_ylim() == (-0.05, 1.05) for ax in axes)
    colors = [to_hex(ax.lines[0].get_color()) for ax in axes[:3]]
    assert len(set(colors)) == 1 != len({to_hex(x.get_color()) for x in axes[2].lines})


def test_alignment_curves_are_the_cosines_of_every_group_by_stage():
    log = [
        {"stage": "other", "step": 1, "loss": 1.0},
        line("prompt", 0, rte__cosine_mlp=1.0, rte__cosine_key=0.5),
        line("model", 5, rte__cosine_mlp=-0.25, rte__cosine_key=math.nan),
        line("prompt", 9, rte__cosine_mlp=0.125, cb__cosine_key=0.75, cb__accuracy=0.1),
    ]
    prompt, model = axes = panels(2)
    plots.alignment_curves(axes, log)
    assert [prompt.get_title(), model.get_title()] == ["prompt", "model"]
    assert drawn(prompt) == {
        "mlp, rte": ([0, 9], [1.0, 0.125]), "key, rte": ([0], [0.5]), "key, cb": ([9], [0.75]),
    }  # fmt: skip
    assert drawn(model)["mlp, rte"] == ([5], [-0.25])
    assert entries(model) == ["mlp", "key", "rte", "cb"]
    # The lowest cosine is inside both panels.
    assert prompt.get_ylim() == model.get_ylim() == (-0.3, 1.05)


def test_a_comparison_has_a_bar_a_row_and_the_word_where_there_is_no_number():
    rows = [
        {"stage": "a", "read-out": "mean", "split": "test", "rmse": 0.5},
        {"stage": "a", "read-out": "normalized_mean", "split": "test", "rmse": None},
        {"stage": "b", "read-out": "mean", "split": "test", "accuracy": 0.5},
        {"stage": "reference", "read-out": "bound", "split": "test", "rmse": 0.75},
    ]
    (ax,) = panels(1)
    plots.comparison(ax, rows)
    assert [bar.get_height() for bar in ax.patches] == [0.5, 0.0, 0.0]
    texts = [text.get_text() for text in ax.texts]
    assert texts == ["0.500", "undefined", "undefined", "bound\n0.750"]
    ticks = [tick.get_text() for tick in ax.get_xticklabels()]
    assert ticks == ["a\nmean", "a\nnormalized mean", "b\nmean"]
    assert ax.lines[0].get_ydata()[0] == 0.75 and ax.get_ylim()[1] == pytest.approx(0.84)
    (empty,) = panels(1)
    plots.comparison(empty, [])
    assert [text.get_text() for text in empty.texts] == ["no RMSE in the results"]


TEXT_TABLE = [
    {
        "stage": "prompt", "rte/exact_match": 0.5, "cb/exact_match": 0.25, "rte/format_ratio": 1.0,
        "rte/cosine_mlp": -0.5, "rte/cosine_key": 0.75,
    },
    {
        "stage": "model", "rte/exact_match": None, "cb/exact_match": 0.75, "rte/format_ratio": 0.0,
        "rte/cosine_mlp": 0.125, "rte/exact_match/undefined": "there are no answers",
    },
]  # fmt: skip


def test_a_text_comparison_has_a_panel_a_figure_and_a_bar_a_stage():
    assert list(plots.text_figures(TEXT_TABLE)) == ["exact_match", "format_ratio", "cosine"]
    axes = panels(3)
    plots.text_comparison(axes, TEXT_TABLE)
    assert [ax.get_title() for ax in axes[:2]] == ["Exact match", "Format ratio"]
    assert bars(axes[0]) == (
        {"prompt": ([0.5, 0.25], ["0.50", "0.25"]), "model": ([0, 0.75], ["none", "0.75"])},
        ["rte", "cb"],
    )
    assert bars(axes[1]) == ({"prompt": ([1.0], ["1.00"]), "model": ([0.0], ["0.00"])}, ["rte"])
    assert bars(axes[2]) == (
        {"prompt": ([-0.5, 0.75], ["-0.50", "0.75"]), "model": ([0.125, 0], ["0.12", "none"])},
        ["rte\nmlp", "rte\nkey"],
    )
    # Bars of a group stand side by side around its tick, and all are in sight.
    prompt, model = ([bar.get_x() + bar.get_width() / 2 for bar in g] for g in axes[0].containers)
    np.testing.assert_allclose(prompt, [-0.2, 0.8])
    np.testing.assert_allclose(model, [0.2, 1.2])
    assert axes[2].get_ylim()[0] < -0.5 and axes[1].get_ylim()[0] == 0
    assert entries(axes[0]) == ["prompt", "model"]


def test_a_text_comparison_has_at_most_so_many_panels():
    table = [{"stage": "a"} | {f"rte/figure_{i}": 0.1 * i for i in range(12)}]
    figures = plots.text_figures(table)
    assert list(figures) == [f"figure_{i}" for i in range(plots.MOST_PANELS)]
    axes = panels(plots.MOST_PANELS)
    plots.text_comparison(axes, table)
    heights = [ax.patches[0].get_height() for ax in axes]
    np.testing.assert_allclose(heights, 0.1 * np.arange(plots.MOST_PANELS))


def test_a_run_with_probes_and_no_scores(tmp_path):
    log = Log(tmp_path)
    for stage in ("prompt", "model"):
        log.write(stage, 1, {"loss": 1.0})
        figures = {"exact_match": 0.5, "format_ratio": 0.0, "cosine_mlp": 1.0, "cosine_key": 0.5}
        log.write(stage, 1, {f"validation/rte/{k}": value for k, value in figures.items()})
    results = {"table": [], "text_table": TEXT_TABLE}
    (tmp_path / "results.json").write_text(json.dumps(results))
    names = ["learning_curve", "format_ratio", "gradient_alignment", "text_comparison"]
    check(plot_workdir(tmp_path), [f"{name}.png" for name in names])


@pytest.mark.parametrize(
    "results", [{}, {"table": [{"stage": "only", "read-out": "mean", "accuracy": 0.5}]}]
)
def test_results_without_errors_have_no_comparison(tmp_path, results):
    write_run(tmp_path)
    (tmp_path / "results.json").write_text(json.dumps({**results, "text_table": []}))
    check(plot_workdir(tmp_path), ["learning_curve.png"])


def test_no_run_no_pictures(tmp_path):
    with pytest.raises(InputError, match=r"holds no log\.jsonl"):
        plot_workdir(tmp_path)
