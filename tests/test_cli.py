"""The command line: help, overrides, and for every mistake one clear message and exit code 2."""

import csv
import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from regjax import ScoreGrid, cli
from regjax.preemption import Interrupted
from regjax.recorder import TrainingStopped
from tests.small_experiment import experiment

ROOT = Path(__file__).resolve().parents[1]
CONFIG = str(ROOT / "tests" / "small_experiment.py")
COMMANDS = ("train", "sweep", "eval", "predict", "plan", "export", "plot", "grid", "launch")


def call(capsys, *arguments):
    """`(exit code, stdout, stderr)` of a command in this process."""
    try:
        code = cli.main([str(argument) for argument in arguments])
    except SystemExit as error:
        code = error.code or 0
    found = capsys.readouterr()
    return code, found.out, found.err


def refused(capsys, *arguments):
    """The message of a command that ends with exit code 2."""
    code, _, err = call(capsys, *arguments)
    assert code == 2 and "Traceback" not in err
    return err


# Help


def test_overview(capsys):
    code, out, _ = call(capsys, "--help")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines() if line.startswith("  ")][
        : len(COMMANDS)
    ] == [*COMMANDS]
    assert call(capsys) == (2, out, "")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command(capsys, command):
    code, out, err = call(capsys, command, "--help")
    assert (code, err) == (0, "")
    assert f"usage: regjax {command}" in out


def test_help_of_a_config_shows_its_fields_and_not_its_records(capsys):
    code, out, _ = call(capsys, "train", CONFIG, "--help")
    assert code == 0
    for option in ("--steps INT", "--workdir PATH", "--optimizer.learning-rate FLOAT"):
        assert option in out
    for option in (
        "--stages.0.objective.label-smoothing",
        "--stages.1.select",
        "--data.train PATH",
    ):
        assert option in out
    assert "Peak learning rate. (default: 0.01)" in out
    assert "96 records in memory" in out
    assert "kettle" not in out and len(out) < 60_000
    options = [line.strip("│ ") for line in out.splitlines() if line.strip("│ ").startswith("--")]
    assert len(options) > 60


def test_module_and_version():
    found = subprocess.run(
        [sys.executable, "-m", "regjax", "--version"], cwd=ROOT, capture_output=True, text=True
    )
    assert found.returncode == 0 and found.stdout.strip().count(".") == 2


def test_a_reader_of_the_output_that_goes_away_is_no_traceback(trained):
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "regjax", "plot", "--help"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.close()
    assert b"Traceback" not in process.stderr.read()
    process.stderr.close()
    process.wait()


# Running


def test_overrides_reach_the_resolved_config(capsys, tmp_path):
    code, out, err = call(
        capsys, "train", CONFIG, "--workdir", tmp_path / "run", "--steps", "3",
        "--optimizer.learning-rate", "1e-5", "--stages.0.objective.label-smoothing", "0.1",
        "--stages.1.steps", "2", "--stages.1.decisions", "median", "--data.no-packing",
        "--template.response", " = {score}", "--data.buckets", "48", "56",
    )  # fmt: skip
    assert code == 0, err
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    first, second = config["stages"]
    assert (config["steps"], first["steps"], second["steps"]) == (3, 3, 2)
    assert first["optimizer"]["learning_rate"] == second["optimizer"]["learning_rate"] == 1e-5
    assert first["objective"] == {"type": "Sft", "tokens": "response", "label_smoothing": 0.1}
    assert second["decisions"] == ["median"]
    assert config["data"]["buckets"] == [48, 56]
    assert config["data"]["train"] == "96 records in memory"
    assert config["template"]["response"] == " = {score}"
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert [results["stages"][name]["step"] for name in ("first", "second")] == [3, 2]
    pictures = [line for line in out.splitlines() if line.endswith(".png")]
    assert len(pictures) == 6 and all(Path(line).is_file() for line in pictures)
    assert "bayes_mean" in out and "median" in out


def test_evaluate_predict_plot_export_grid(capsys, tmp_path, trained):
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps(record) + "\n" for record in experiment.data.test))
    report = tmp_path / "report.json"
    code, out, _ = call(capsys, "eval", "--model", trained, "--input", source, "--output", report)
    assert code == 0 and "40 records, 0 skipped" in out
    at_training = json.loads((trained / "results.json").read_text())["stages"]["second"]["test"]
    found = json.loads(report.read_text())
    for name in ("mean/rmse", "median/mae", "crps", "grid_mass"):
        assert found[name] == pytest.approx(at_training[name], rel=1e-5)

    output = tmp_path / "out.jsonl"
    code, out, _ = call(
        capsys, "predict", "--model", trained, "--input", source, "--output", output
    )
    assert code == 0 and out.startswith("40 records scored")
    assert "exists already" in refused(
        capsys, "predict", "--model", trained, "--input", source, "--output", output
    )
    code, _, _ = call(capsys, "export", "--workdir", trained, "--output", tmp_path / "model")
    assert code == 0 and (tmp_path / "model" / "regjax.json").is_file()
    code, out, _ = call(
        capsys, "grid", "--tokenizer", tmp_path / "model", "--values", "1:5", "--prefix", "Stars: "
    )
    assert code == 0 and "5 values" in out


def test_a_run_that_had_to_stop_exits_1(capsys, tmp_path, monkeypatch):
    import importlib

    def stop(*args, **kwargs):
        raise TrainingStopped("not finite")

    monkeypatch.setattr(importlib.import_module("regjax.train"), "train", stop)
    code, _, err = call(capsys, "train", CONFIG, "--workdir", tmp_path)
    assert (code, err) == (1, "regjax: not finite\n")

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(importlib.import_module("regjax.train"), "train", interrupt)
    code, _, err = call(capsys, "train", CONFIG, "--workdir", tmp_path)
    assert code == 130 and "goes on from the last checkpoint" in err

    def disk_full(*args, **kwargs):
        raise OSError(28, "No space left on device", "runs/a")

    monkeypatch.setattr(importlib.import_module("regjax.train"), "train", disk_full)
    code, _, err = call(capsys, "train", CONFIG, "--workdir", tmp_path)
    assert (code, err) == (1, "regjax: runs/a: No space left on device\n")


# Mistakes


def test_mistaken_commands(capsys, tmp_path):
    assert "no command 'trian'; the commands are train, sweep, eval" in refused(capsys, "trian")
    assert "first argument of train is the config file" in refused(capsys, "train")
    assert "no config file" in refused(capsys, "train", tmp_path / "none.py", "--workdir", tmp_path)
    assert "--workdir" in refused(capsys, "train", CONFIG)
    assert "--foo" in refused(capsys, "train", CONFIG, "--workdir", tmp_path, "--foo", "3")
    assert "invalid literal" in refused(
        capsys, "train", CONFIG, "--workdir", tmp_path, "--steps", "x"
    )


CONFIGS = {
    "experiment = 3": "does not set `experiment = regjax.Experiment",
    "x = 1": "does not set `experiment = regjax.Experiment",
    "import nothing_of_that_name": "ModuleNotFoundError: No module named 'nothing_of_that_name'",
    "x = (": "SyntaxError",
    "\n\nx = 1 / 0": "config.py:3: ZeroDivisionError",
    "import sys; sys.exit(0)": "ends the process",
    "import regjax; regjax.ScoreGrid.integers(5, 1)": "config.py: ",
}


@pytest.mark.parametrize("text", CONFIGS)
def test_broken_configs(capsys, tmp_path, text):
    (tmp_path / "config.py").write_text(text)
    err = refused(capsys, "train", tmp_path / "config.py", "--workdir", tmp_path / "run")
    assert CONFIGS[text] in err and "config.py" in err
    assert not (tmp_path / "run").exists()


OVERRIDES = {
    ("--batch-size", "0"): "batch_size is 0",
    ("--accumulation", "3"): "accumulation 3 does not divide batch_size 8",
    ("--seed", "-1"): "seed is -1",
    ("--steps", "0"): "steps is 0",
    ("--vocabulary-size", "10"): "vocabulary_size is 10",
    ("--stages.0.name", "a/b"): "stage name 'a/b'",
    ("--stages.1.start", "third"): "starts from 'third'",
    ("--stages.0.decisions", "best"): "unknown read-out 'best'",
    ("--stages.1.select", "rmse"): "select 'rmse'",
    ("--stages.1.trainable", "("): "not a regular expression",
    ("--optimizer.learning-rate", "nan"): "learning_rate is nan",
    ("--mesh.fsdp", "4096"): "mesh of data -1, fsdp 4096, tensor 1",
    ("--parallelism", "xmap"): "xmap",
    ("--data.train", "none.jsonl"): "none.jsonl: no such file",
    ("--data.train", "none.txt"): "unknown kind of file",
    ("--data.score-field", "stars"): "'stars'",
    ("--data.max-length", "1"): "max_length is 1",
    ("--template.prompt", "{body}"): "'body'",
    ("--model", "/no/such/folder"): "/no/such/folder",
    ("--tokenizer", "/no/such/folder"): "/no/such/folder",
    ("--loggers", "wandb"): "regjax[wandb]",
    ("--reference-field", "text"): "reference_field",
}


@pytest.mark.parametrize("override", OVERRIDES, ids=lambda pair: " ".join(pair))
def test_mistaken_fields(capsys, tmp_path, override, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    err = refused(capsys, "train", CONFIG, "--workdir", tmp_path / "run", *override)
    assert OVERRIDES[override] in err.replace("│\n│ ", "")
    assert not list(tmp_path.glob("run/*/*"))


def test_places_that_cannot_be_written(capsys, tmp_path, trained):
    file = tmp_path / "file"
    file.write_text("")
    assert "is a file" in refused(capsys, "train", CONFIG, "--workdir", file)
    assert str(file) in refused(capsys, "train", CONFIG, "--workdir", file / "below")
    source = tmp_path / "in.jsonl"
    source.write_text('{"text": "a", "score": 1}\n')
    nowhere = tmp_path / "none" / "report.json"
    assert "is no folder" in refused(
        capsys, "eval", "--model", trained, "--input", source, "--output", nowhere
    )
    if os.geteuid():
        tmp_path.chmod(0o500)
        assert "Permission denied" in refused(capsys, "train", CONFIG, "--workdir", tmp_path / "x")


def test_mistaken_models_and_records(capsys, tmp_path, trained):
    source = tmp_path / "in.csv"
    with source.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["text", "score"], ["a", 1], ["b", 9]])
    err = refused(capsys, "eval", "--model", trained, "--input", source)
    assert "in.csv:3: score = '9': is off the grid's range 1 to 5" in err
    assert "no model of ours" in refused(capsys, "eval", "--model", tmp_path, "--input", source)
    assert "no log.jsonl" in refused(capsys, "plot", tmp_path)
    assert "no model of ours" in refused(
        capsys, "export", "--workdir", tmp_path, "--output", tmp_path / "x"
    )
    assert "reads .jsonl" in refused(
        capsys, "predict", "--model", trained, "--input", source, "--output", tmp_path / "x.jsonl"
    )
    (tmp_path / "config.json").write_text('{"stages": [')
    assert "config.json" in refused(capsys, "eval", "--model", tmp_path, "--input", source)


# Whatever is given

FIELDS = (
    "--steps", "--batch-size", "--accumulation", "--seed", "--log-every", "--eval-every",
    "--checkpoint-every", "--max-bad-steps", "--eval-batch-size", "--name", "--reference-field",
    "--stages.0.name", "--stages.0.start", "--stages.0.select", "--stages.0.trainable",
    "--stages.0.decisions", "--stages.0.steps", "--stages.0.objective.label-smoothing",
    "--data.max-length", "--data.buckets", "--data.id-field", "--data.weight-field",
    "--data.score-field", "--data.train", "--template.prompt", "--template.response",
    "--optimizer.name", "--optimizer.learning-rate", "--optimizer.warmup", "--optimizer.clip-norm",
    "--optimizer.b1", "--optimizer.weight-decay", "--optimizer.schedule", "--architecture.layers",
    "--architecture.head-dim", "--architecture.attention-pattern", "--execution.dtype",
)  # fmt: skip
VALUES = st.one_of(
    st.sampled_from(
        ["", "0", "-1", "2", "3", "1.5", "nan", "inf", "-inf", "1e400", "text", "score"]
    ),
    st.sampled_from(
        ["{text}", "{score}", "{text} {score}", "{", "first", "mean", "previous", "^layers"]
    ),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=6),
)
SMALL = [
    "--steps", "2", "--architecture.width", "8", "--architecture.heads", "1", "--eval-every", "0",
    "--architecture.key-value-heads", "1", "--architecture.mlp-width", "8",
]  # fmt: skip


@settings(
    deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(overrides=st.lists(st.tuples(st.sampled_from(FIELDS), VALUES), min_size=1, max_size=3))
def test_any_override_runs_or_is_refused(capsys, tmp_path_factory, overrides):
    workdir = tmp_path_factory.mktemp("fuzz") / "run"
    given_fields = [part for pair in overrides for part in pair]
    # Records that are quickly read and a model that is quickly made, whatever else is given.
    code, _, err = call(capsys, "train", QUICK_CONFIG, "--workdir", workdir, *SMALL, *given_fields)
    assert code in (0, 1, 2) and "Traceback" not in err
    if code == 0:
        assert json.loads((workdir / "results.json").read_text())["stages"]
    else:
        assert not (workdir / "results.json").exists()
        assert err.strip()


@pytest.fixture(scope="module", autouse=True)
def quick_config(tmp_path_factory):
    global QUICK_CONFIG
    path = tmp_path_factory.mktemp("quick") / "config.py"
    path.write_text(
        "import dataclasses\n"
        "from tests.small_experiment import experiment as small\n"
        "data = dataclasses.replace(small.data, train=small.data.train[:16], validation='', test='')\n"
        "experiment = dataclasses.replace(small, data=data, reference_field='',\n"
        "                                 stages=small.stages[:1])\n"
    )
    QUICK_CONFIG = str(path)


TEXTS = st.text(max_size=6) | st.sampled_from(["", "a", "Stars: 3"])
SCORES = st.sampled_from(
    [1, 5, 0, 3.5, "4", None, True, float("nan"), float("inf"), 1e999, "x", []]
)


@settings(
    deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    records=st.lists(
        st.fixed_dictionaries({}, optional={"text": TEXTS, "score": SCORES}), max_size=4
    ),
    policy=st.sampled_from(["stop", "skip"]),
)
def test_any_records_are_evaluated_or_refused(capsys, tmp_path_factory, trained, records, policy):
    folder = tmp_path_factory.mktemp("records")
    source, report = folder / "in.jsonl", folder / "report.json"
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    code, _, err = call(
        capsys, "eval", "--model", trained, "--input", source, "--output", report,
        "--on-bad-record", policy,
    )  # fmt: skip
    assert "Traceback" not in err
    if code == 0:
        found = json.loads(report.read_text())
        assert found["count"] + found["skipped"] == len(records)
    else:
        assert code == 2 and "in.jsonl" in err and not report.exists()


NUMBERS = st.from_regex(r"-?[0-9]{1,3}(\.[0-9])?", fullmatch=True)
GRIDS = st.one_of(
    st.text(max_size=12),
    st.lists(NUMBERS, min_size=1, max_size=4).map(",".join),
    st.lists(NUMBERS, min_size=2, max_size=3).map(":".join),
)


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(values=GRIDS, prefix=st.text(max_size=8), text=st.sampled_from(["{}", " {}", "{", "a", ""]))
def test_any_grid_is_shown_or_refused(capsys, trained, values, prefix, text):
    options = {"values": values, "prefix": prefix, "text": text}
    arguments = [f"--{name}={value}" for name, value in options.items()]
    folder = trained / "second" / "model"
    code, out, err = call(capsys, "grid", "--tokenizer", folder, *arguments)
    assert "Traceback" not in err
    if code == 0:
        assert f"{len(ScoreGrid.parse(values, text=text))} values after" in out
    else:
        assert code == 2 and len(err.strip()) > 20 and out == ""


def test_a_full_disk_says_what_to_do_where_no_file_is_named(capsys, monkeypatch):
    """As Python's `write` raises it; of anything else without a file the traceback is wanted."""
    raised = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setitem(cli.COMMANDS, "plot", Mock(side_effect=raised))
    assert call(capsys, "plot", "x") == (
        1, "", "regjax: No space left on device: make room, then give the same command again\n",
    )  # fmt: skip
    monkeypatch.setitem(cli.COMMANDS, "plot", Mock(side_effect=OSError(errno.EIO, "other")))
    with pytest.raises(OSError, match="other"):
        call(capsys, "plot", "x")


# A process of a job


def test_a_process_of_a_job_leaves_with_a_status_that_says_whether_to_start_again(
    capsys, monkeypatch, tmp_path
):
    """Not by an ordinary end, at which it would wait for the others."""
    final = tmp_path / "status"

    class Left(BaseException):
        """In place of the end of the process."""

    def leave(status):
        raise Left(status)

    monkeypatch.setattr("os._exit", leave)
    monkeypatch.setenv("JAX_NUM_PROCESSES", "1")
    monkeypatch.setenv("REGJAX_FINAL_STATUS", str(final))

    def left_with(error):
        def command(_):
            raise error

        monkeypatch.setitem(cli.COMMANDS, "plot", command)
        with pytest.raises(Left) as found:
            cli.main(["plot"])
        return found.value.args[0]

    assert left_with(ZeroDivisionError()) == 70 and not final.exists()
    assert "ZeroDivisionError" in capsys.readouterr().err
    assert left_with(KeyboardInterrupt()) == 130 and not final.exists()
    assert left_with(SystemExit(2)) == 2 and final.read_text() == "2\n"
    assert left_with(TrainingStopped("not finite")) == 1 and final.read_text() == "1\n"
    # All have agreed to stop, and may wait for each other.
    monkeypatch.setitem(cli.COMMANDS, "plot", lambda _: stop())

    def stop():
        raise Interrupted("stopped at step 3", 15)

    assert cli.main(["plot"]) == 143
    assert "stopped at step 3" in capsys.readouterr().err
