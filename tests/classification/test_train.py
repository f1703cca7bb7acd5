"""Training image experiments: runs side by side, devices, resuming, teachers, and what bad input gets."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import regjax
from regjax import InputError
from regjax.classification import ImageStage, load_classifier, program, train_runs
from regjax.classification.batches import epoch_order
from regjax.data.images import Augmentation, ImageData, LabelNoise
from regjax.log import read_log
from regjax.models import vision
from regjax.objectives.classification import (
    CrossEntropy,
    Distillation,
    GroupDro,
    NoiseMatrixCorrection,
    Robust,
)
from tests.classification import worst_class
from tests.classification.small import OPTIMIZER, experiment, images


def params_of(workdir, stage="only", run=0):
    params, statistics, _ = load_classifier(workdir, stage, run)
    return {**params, **{f"statistics/{k}": v for k, v in statistics.items()}}


def assert_close(found, expected, rtol=1e-5, atol=1e-6):
    assert found.keys() == expected.keys()
    for path, leaf in expected.items():
        np.testing.assert_allclose(found[path], leaf, rtol=rtol, atol=atol, err_msg=path)


def runs_of(base, seeds, rates=None):
    made = []
    for number, seed in enumerate(seeds):
        one = dataclasses.replace(base, seed=seed)
        if rates:
            stages = (
                dataclasses.replace(one.stages[0], objective=CrossEntropy(rate=rates[number])),
            )
            one = dataclasses.replace(one, stages=stages)
        made.append(one)
    return made


NOISY = {
    "noise": LabelNoise("symmetric", 0.3),
    "held_out": 0.25,
    "augmentation": Augmentation(1, True),
}


@pytest.fixture(scope="module")
def side_by_side(tmp_path_factory):
    """Three runs of other seeds, noise and smoothing rates, under vmap."""
    base = experiment(data=NOISY, runs="vmap")
    workdir = tmp_path_factory.mktemp("side_by_side")
    return workdir, train_runs(runs_of(base, [0, 1, 2], [0.0, 0.1, 0.4]), workdir, quiet=True)


def test_runs_side_by_side_are_those_on_their_own(side_by_side, tmp_path):
    workdir, results = side_by_side
    base = experiment(data=NOISY)
    for number, one in enumerate(runs_of(base, [0, 1, 2], [0.0, 0.1, 0.4])):
        alone = regjax.train(one, tmp_path / str(number), quiet=True)
        assert_close(params_of(workdir, run=number), params_of(tmp_path / str(number)))
        found, expected = (
            results["stages"]["only"]["runs"][number],
            alone["stages"]["only"]["runs"][0],
        )
        assert found["accuracies"] == expected["accuracies"]
        assert found["ece"] == pytest.approx(expected["ece"], abs=1e-5)
    first, last = params_of(workdir, run=0), params_of(workdir, run=2)
    assert max(np.abs(first[path] - last[path]).max() for path in first) > 0.01


def test_runs_in_turns_are_those_under_vmap(side_by_side, tmp_path):
    base = experiment(data=NOISY, runs="map")
    train_runs(runs_of(base, [0, 1, 2], [0.0, 0.1, 0.4]), tmp_path, quiet=True)
    for run in range(3):
        assert_close(params_of(tmp_path, run=run), params_of(side_by_side[0], run=run))


def test_each_run_has_labels_of_its_own_and_the_report_says_how_they_were_fitted(side_by_side):
    runs = side_by_side[1]["stages"]["only"]["runs"]
    for run in runs:
        assert run.keys() >= {"train_clean", "train_flipped", "memorised", "accuracies", "ece"}
        assert run["accuracy"] == pytest.approx(np.mean(run["accuracies"]))  # classes of equal size
    assert len({run["train_clean"] for run in runs}) > 1


def test_the_step_is_the_formula(tmp_path):
    """One step of plain SGD on a linear model, by hand in NumPy float64."""
    plain = dataclasses.replace(
        OPTIMIZER, b1=0.0, nesterov=False, weight_decay=0.0, schedule="constant"
    )
    one = experiment(model=vision.Mlp(()), batch_size=96, epochs=1, optimizer=plain)
    regjax.train(one, tmp_path, quiet=True)
    params, _, about = load_classifier(tmp_path, "only")
    classifier = vision.build(vision.Mlp(()), (6, 6, 1), 3)
    seed = np.random.SeedSequence([0, 0]).generate_state(1)[0]
    start, _ = classifier.init(jax.random.key(seed))
    data = images(96)
    inputs = (data.images.reshape(96, -1) / 255.0 - about["mean"][0]) / about["std"][0]
    kernel, bias = (np.asarray(start[f"head/{name}"], np.float64) for name in ("kernel", "bias"))
    logits = inputs @ kernel + bias
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    error = (shares - np.eye(3)[data.labels]) / 96
    np.testing.assert_allclose(params["head/kernel"], kernel - 0.1 * inputs.T @ error, atol=1e-6)
    np.testing.assert_allclose(params["head/bias"], bias - 0.1 * error.sum(0), atol=1e-6)


CONFIG = Path(__file__).with_name("worst_class.py")
ROOT = Path(__file__).resolve().parents[2]


def on_eight_devices(workdir, *arguments):
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "regjax",
            "train",
            str(CONFIG),
            "--workdir",
            str(workdir),
            *arguments,
        ],
        env={**os.environ, "JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )


@pytest.mark.skipif(jax.device_count() != 1, reason="compares with a single device")
def test_eight_devices_give_the_run_of_one(tmp_path):
    """Batch normalisation, augmentation, multipliers and metrics, from the command line."""
    one = regjax.train(worst_class.experiment, tmp_path / "1", quiet=True)
    done = on_eight_devices(tmp_path / "8")
    assert done.returncode == 0, done.stderr
    assert_close(params_of(tmp_path / "8"), params_of(tmp_path / "1"), 1e-4, 1e-4)
    eight = json.loads((tmp_path / "8" / "results.json").read_text())
    for row, other in zip(one["table"], eight["table"], strict=True):
        assert row.keys() == other.keys()
        assert row["accuracy"] == other["accuracy"]
        assert row["ece"] == pytest.approx(other["ece"], abs=1e-4)
    assert "accuracy" in done.stdout and "only" in done.stdout


def test_programs_for_several_devices_are_read_back(tmp_path, monkeypatch):
    """In the compiler's usual order their sums would then wait for each other for ever."""
    cache = tmp_path / "cache"
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(cache))
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "8")
    script = (
        "import sys, regjax\nfrom tests.classification.small import experiment\n"
        "regjax.train(experiment(epochs=1), sys.argv[1], quiet=True)\n"
    )
    for name in ("first", "second"):
        subprocess.run(
            [sys.executable, "-c", script, str(tmp_path / name)], check=True, timeout=300, cwd=ROOT
        )
    assert [path.name for path in cache.rglob("*") if "chunk" in path.name]
    assert_close(params_of(tmp_path / "second"), params_of(tmp_path / "first"), 0, 0)


DEALT_OUT = """
import sys
import jax
from tests.classification.test_train import NOISY, experiment, runs_of, train_runs
from regjax.models.vision import Mlp, SmallCnn

assert jax.device_count() == 3
model = SmallCnn((4,), ()) if sys.argv[2] == "map" else Mlp((16,))
base = experiment(data=NOISY, runs=sys.argv[2], model=model, batch_size=32)
train_runs(runs_of(base, range(4), [0.0, 0.1, 0.4, 0.2]), sys.argv[1], quiet=True)
"""


@pytest.mark.skipif(jax.device_count() != 1, reason="compares with a single device")
@pytest.mark.parametrize("by", ["map", "vmap"])
def test_runs_dealt_out_over_devices_are_those_of_one(tmp_path, by):
    """Four runs on three devices, which do not divide; nor do rows of a batch, which are whole on each."""
    subprocess.run(
        [sys.executable, "-c", DEALT_OUT, str(tmp_path / "3"), by], check=True, cwd=ROOT,
        env={**os.environ, "JAX_NUM_CPU_DEVICES": "3"},
    )  # fmt: skip
    model = vision.SmallCnn((4,), ()) if by == "map" else vision.Mlp((16,))
    base = experiment(data=NOISY, runs=by, model=model)
    train_runs(runs_of(base, range(4), [0.0, 0.1, 0.4, 0.2]), tmp_path / "1", quiet=True)
    for run in range(4):
        assert_close(params_of(tmp_path / "3", run=run), params_of(tmp_path / "1", run=run))
    one, three = (json.loads((tmp_path / n / "results.json").read_text()) for n in "13")
    for row, other in zip(
        *(found["stages"]["only"]["runs"] for found in (one, three)), strict=True
    ):
        assert row["accuracies"] == other["accuracies"]
        assert row["memorised"] == other["memorised"]


@pytest.mark.parametrize("block", [1, 5])
def test_steps_are_the_same_in_blocks_of_any_size(tmp_path, monkeypatch, block):
    """Blocks that divide the steps, and such that the last one is not full; multipliers fall in both."""
    stages = worst_class.experiment.stages
    base = dataclasses.replace(worst_class.experiment, stages=stages, epochs=3)
    regjax.train(base, tmp_path / "whole", quiet=True)
    monkeypatch.setattr(program, "BLOCK", block)
    regjax.train(base, tmp_path / "blocks", quiet=True)
    for stage in stages:
        found, expected = (params_of(tmp_path / n, stage.name) for n in ("blocks", "whole"))
        assert_close(found, expected, 1e-5, 1e-5)
    lines = [
        [line for line in read_log(tmp_path / n / "log.jsonl") if "loss" in line]
        for n in ("whole", "blocks")
    ]
    for line, other in zip(*lines, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert line["step"] == other["step"]


def test_rows_that_do_not_divide_among_the_devices_are_refused(tmp_path):
    done = on_eight_devices(tmp_path / "run", "--batch-size=30")
    assert done.returncode == 2
    assert "batch_size 30 does not divide among 8 devices" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_teacher_on_the_fly_is_the_cached_one_where_nothing_is_augmented(tmp_path):
    found = {}
    for kind in ("cached", "on_the_fly"):
        stages = (
            ImageStage("teacher", CrossEntropy(), epochs=2),
            ImageStage(
                "student", Distillation(alpha=1.0, temperature=2.0), teachers=("teacher",),
                teacher=kind, epochs=2,
            ),
        )  # fmt: skip
        regjax.train(experiment(*stages), tmp_path / kind, quiet=True)
        found[kind] = params_of(tmp_path / kind, "student")
    assert_close(found["cached"], found["on_the_fly"])


def test_a_stage_goes_on_from_an_earlier_one(tmp_path):
    """With a rate of nothing to speak of, it ends where it began."""
    still = dataclasses.replace(OPTIMIZER, learning_rate=1e-12)
    stages = (
        ImageStage("first", CrossEntropy()),
        ImageStage("second", CrossEntropy(rate=0.1), start="first", optimizer=still, epochs=1),
    )
    regjax.train(experiment(*stages), tmp_path, quiet=True)
    assert_close(params_of(tmp_path, "second"), params_of(tmp_path, "first"))


class Stop(Exception):
    pass


def test_a_killed_run_ends_with_the_same_bits(tmp_path, monkeypatch):
    """Killed in the second stage, whose multipliers go on as well."""
    stages = (
        ImageStage("teacher", CrossEntropy(), epochs=22),
        ImageStage(
            "student", Robust(adjust_every=5), teachers=("teacher",), epochs=88, average=True
        ),
    )
    one = experiment(*stages, data={"held_out": 0.25}, checkpoint_every=22)
    assert regjax.train(one, tmp_path / "whole", quiet=True)

    from regjax import loop

    class Killed(loop.Recorder):
        def add(self, step, metrics, chunk):
            super().add(step, metrics, chunk)
            if self._stage == "student" and step > 100:
                raise Stop

    monkeypatch.setattr(loop, "Recorder", Killed)
    with pytest.raises(Stop):
        regjax.train(one, tmp_path / "killed", quiet=True)
    monkeypatch.undo()
    found = regjax.train(one, tmp_path / "killed", quiet=True)
    for path, leaf in params_of(tmp_path / "whole", "student").items():
        np.testing.assert_array_equal(params_of(tmp_path / "killed", "student")[path], leaf)
    assert found == json.loads((tmp_path / "whole" / "results.json").read_text())
    killed, whole = (
        [line["step"] for line in read_log(tmp_path / name / "log.jsonl")]
        for name in ("killed", "whole")
    )
    assert killed == whole


@dataclasses.dataclass(frozen=True)
class Breaks:
    """Cross-entropy whose loss is infinite from some step on, in runs whose `limit` is below it."""

    limit: float = 1e9

    def given(self, facts):
        return {}

    def initial(self, given):
        return jnp.zeros(())

    adjust_every = 1

    def adjust(self, extras, outputs, batch, given):
        return extras + 1

    def __call__(self, outputs, batch, given, extras):
        sums = CrossEntropy()(outputs, batch, {})
        total, weight = sums["loss"]
        return {"loss": (jnp.where(extras >= self.limit, jnp.inf, total), weight)}


jax.tree_util.register_dataclass(Breaks, data_fields=["limit"], meta_fields=[])


def test_a_run_that_is_not_finite_is_given_up_and_the_others_go_on(tmp_path):
    base = experiment(data={"held_out": 0.25}, epochs=32)
    runs = [
        dataclasses.replace(base, seed=n, stages=(ImageStage("only", Breaks(limit)),))
        for n, limit in enumerate([1e9, 3.0])
    ]
    found = train_runs(runs, tmp_path / "both", quiet=True)
    assert found["stages"]["only"]["given_up"] == [1]
    train_runs(runs[:1], tmp_path / "alone", quiet=True)
    assert_close(params_of(tmp_path / "both"), params_of(tmp_path / "alone"))
    with pytest.raises(regjax.recorder.TrainingStopped, match="in 5 steps in a row, up to step 8"):
        train_runs(runs[1:], tmp_path / "lost", quiet=True)
    lines = [line for line in read_log(tmp_path / "both" / "log.jsonl") if "not_finite" in line]
    assert [line["step"] for line in lines] == [4, 5, 6, 7, 8]
    assert all(line["runs"] == [1] for line in lines)
    held_in = {f"image {n}" for n in range(96)}
    assert all(len(line["record_ids"]) == 32 and held_in > {*line["record_ids"]} for line in lines)


def test_every_image_is_seen_once_an_epoch():
    for epoch in range(3):
        assert sorted(epoch_order(7, epoch, 50)) == list(range(50))
    assert (epoch_order(7, 0, 50) != epoch_order(7, 1, 50)).any()
    assert (epoch_order(7, 0, 50) != epoch_order(8, 0, 50)).any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 97}, "96 training images, fewer than batch_size 97"),
        ({"stages": (ImageStage("only", Robust()),)}, "stage 'only': .*held_out"),
        (
            {
                "stages": (
                    ImageStage("one", CrossEntropy()),
                    ImageStage("two", Distillation(), teachers=("one",)),
                ),
                "data": ImageData(images(96), images(60), augmentation=Augmentation(mixup=0.2)),
            },
            "stage 'two': cached teachers have not seen the images that mixup makes",
        ),
        ({"stages": (ImageStage("only", GroupDro()),)}, "stage 'only': GroupDro .*held_out"),
        ({"stages": (ImageStage("only", Distillation()),)}, "stage 'only': Distillation needs a teacher"),
        (
            {"stages": (ImageStage("only", CrossEntropy(), model=vision.VisionTransformer(patch=4)),)},
            "stage 'only': .*patch",
        ),
    ],
)  # fmt: skip
def test_what_would_fail_later_is_refused_before_training(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        regjax.train(dataclasses.replace(experiment(), **changes), tmp_path / "new", quiet=True)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ((), "the experiment has no stages"),
        ((ImageStage("a", CrossEntropy()), ImageStage("a", CrossEntropy())), "two stages are named 'a'"),
        ((ImageStage("a b", CrossEntropy()),), "letters, digits"),
        ((ImageStage("a", CrossEntropy(), teachers=("b",)),), "needs stage 'b', which is not before it"),
        ((ImageStage("a", CrossEntropy(), start="b"),), "needs stage 'b'"),
        ((ImageStage("a", CrossEntropy(), teachers="b"),), "teachers is the string 'b'"),
        ((ImageStage("a", CrossEntropy(), epochs=0),), "epochs is 0"),
        ((ImageStage("a", None),), "its objective is not callable"),
        ((ImageStage("a", CrossEntropy(), average=True),), "average needs an objective with multipliers"),
    ],
)  # fmt: skip
def test_stages_that_cannot_be_are_refused(stages, message):
    from regjax.classification import ImageExperiment

    with pytest.raises(InputError, match=message):
        ImageExperiment(stages, ImageData(images(96), images(60)))


def test_resuming_another_experiment_is_refused(tmp_path):
    regjax.train(experiment(), tmp_path, quiet=True)
    for changes, message in [
        ({"seed": 1}, "with another seed"),
        ({"data": ImageData(images(96, 5), images(60))}, "on other training data"),
        ({"batch_size": 16}, "in other batches"),
        ({"data": experiment(data={"augmentation": Augmentation(1)}).data}, "in other batches"),
        ({"stages": (ImageStage("only", CrossEntropy(rate=0.1)),)}, "of other runs"),
    ]:
        with pytest.raises(InputError, match=message):
            regjax.train(dataclasses.replace(experiment(), **changes), tmp_path, quiet=True)


def test_clean_labels_have_no_noise_to_correct(tmp_path):
    """The known matrix of a stage on the true labels is the identity, whatever the data's noise."""
    for name, objective in [("ce", CrossEntropy()), ("fc", NoiseMatrixCorrection("forward"))]:
        stage = ImageStage("only", objective, clean_labels=True)
        regjax.train(experiment(stage, data=NOISY), tmp_path / name, quiet=True)
    assert_close(params_of(tmp_path / "fc"), params_of(tmp_path / "ce"))


def test_the_same_command_again_changes_nothing(tmp_path):
    first = regjax.train(experiment(), tmp_path, quiet=True)
    assert regjax.train(experiment(), tmp_path, quiet=True) == first


def test_experiments_that_differ_in_more_are_not_trained_side_by_side(tmp_path):
    with pytest.raises(InputError, match="cannot be trained side by side"):
        train_runs([experiment(), experiment(epochs=3)], tmp_path)
