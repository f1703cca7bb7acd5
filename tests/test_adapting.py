"""Stages with adapters: what is trained, what is kept, and what the next stage begins with."""

import dataclasses
import json
import re
import shutil
import signal

import jax
import numpy as np
import optax
import pytest

import regjax
from regjax import checkpoint, cli, models, paths, sharding
from regjax.errors import InputError
from regjax.log import read_log
from regjax.models import Lora
from regjax.models.lora_files import load_lora
from regjax.objectives import Raft, Sft
from regjax.stages import Stage, check_stages, init_state, make_update, trainable_of
from tests import tiny
from tests.kills import arrays_of, assert_same_runs, finish, start, wait_for
from tests.small_lora import LORA, OTHER, experiment

RUN = """
import sys
from regjax.train import train
from tests.small_lora import experiment
train(experiment, sys.argv[1], quiet=True)
"""


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora") / "run"
    regjax.train(experiment, folder, quiet=True)
    return folder


def weights(folder):
    """`(config, parameters by path)` of a model folder."""
    module = models.load(folder)
    return module.config, paths.flatten(models.split(module)[1])


def adapters_of(workdir, stage):
    config, params = weights(workdir / "base" / "model")
    return load_lora(workdir / stage / "lora", config, paths.unflatten(params))


def last_state(workdir, stage):
    """The arrays of a stage's last checkpoint, by path."""
    mark = f"{stage} {experiment.steps} "
    return {
        name.removeprefix(mark): array
        for name, array in arrays_of(workdir).items()
        if name.startswith(mark)
    }


def trained(workdir, stage):
    """The parameters in a stage's last checkpoint, by path."""
    return {
        name.removeprefix("params/"): array
        for name, array in last_state(workdir, stage).items()
        if name.startswith("params/")
    }


def test_what_is_kept(workdir):
    kept = {
        stage.name: {path.name for path in (workdir / stage.name).iterdir() if path.is_dir()}
        - {"checkpoints"}
        for stage in experiment.stages
    }
    assert kept == {
        "base": {"model"},
        "raft": {"lora"},
        "more": {"lora"},
        "other": {"model"},
        "norm": {"model"},
        "both": {"lora", "soft_prompt"},
        "scratch": {"model"},
    }
    for stage in ("raft", "more", "both"):
        saved = json.loads((workdir / stage / "lora" / "regjax.json").read_text())
        assert (saved["base_model"], saved["lora"]) == ("../../base/model", ".")
    assert not (workdir / "both" / "soft_prompt" / "regjax.json").exists()


def test_adapters_alone_are_trained_and_in_checkpoints(workdir):
    config, base = weights(workdir / "base" / "model")
    _, lora, origin = adapters_of(workdir, "raft")
    assert lora == LORA
    # What the adapters were trained beside has the bits that the stage before ended with.
    assert origin.checksum == int(checkpoint.checksum(base))
    shapes = models.lora.adapter_shapes(LORA, paths.unflatten(base))
    assert len(shapes) == 14
    assert trained(workdir, "raft").keys() == shapes.keys()
    size = sum(leaf.size for leaf in shapes.values())
    state = last_state(workdir, "raft")
    # Adapters, adamw's two moments of each, and the numbers of steps.
    assert 3 * size < sum(array.size for array in state.values()) < 3 * size + 5
    prompt = 3 * config.width
    state = last_state(workdir, "both")
    assert (
        3 * (size + prompt) < sum(array.size for array in state.values()) < 3 * (size + prompt) + 5
    )
    for path, leaf in trained(workdir, "raft").items():
        assert leaf.shape[0] == config.layers
        assert np.abs(leaf).max() > 0, path


def test_a_stage_with_the_same_adapters_goes_on_with_them(workdir):
    before, _, _ = adapters_of(workdir, "raft")
    after, _, origin = adapters_of(workdir, "more")
    assert origin == adapters_of(workdir, "raft")[2]
    for path, leaf in trained(workdir, "raft").items():
        assert np.asarray(paths.flatten({"lora": before})[path]).tobytes() == leaf.tobytes()
    for path, leaf in paths.flatten(after).items():
        moved = np.abs(leaf - paths.flatten(before)[path]).max()
        # Adam moves an entry by some learning rate a step, and a new A would be somewhere else.
        assert 0 < moved < 2 * 6 * 2e-2, path


def test_other_adapters_begin_where_the_earlier_ones_ended(workdir):
    _, base = weights(workdir / "base" / "model")
    adapters, _, _ = adapters_of(workdir, "more")
    begun = models.merge_lora({**paths.unflatten(base), "lora": adapters}, LORA)
    new = paths.unflatten(trained(workdir, "other"))
    assert set(new["lora"]) == {"head", "layers"}
    ended = paths.flatten(models.merge_lora({**begun, **new}, OTHER))
    _, found = weights(workdir / "other" / "model")
    assert ended.keys() == found.keys()
    for path, leaf in found.items():
        np.testing.assert_allclose(leaf, ended[path], atol=1e-6, err_msg=path)
    # Kernels that had adapters in the first stage only.
    path = "layers/attention/query/kernel"
    assert np.abs(found[path] - base[path]).max() > 1e-3


def test_a_stage_without_adapters_begins_with_them_merged(workdir):
    _, before = weights(workdir / "other" / "model")
    _, after = weights(workdir / "norm" / "model")
    changed = {path for path in before if before[path].tobytes() != after[path].tobytes()}
    assert changed == {"final_norm/scale"}


@pytest.mark.parametrize("stage", ["raft", "more", "other", "both", "scratch"])
def test_readers_score_as_the_stage_did(workdir, stage):
    expected = json.loads((workdir / stage / "results.json").read_text())["test"]
    found = regjax.evaluate(workdir / stage, experiment.data.test, intervals=False).report
    for figure in ("mean/rmse", "mean/mae", "crps", "grid_mass"):
        np.testing.assert_allclose(found[figure], expected[figure], rtol=1e-5, err_msg=figure)


def test_exported_models_are_merged(workdir, tmp_path):
    regjax.export(workdir / "raft", tmp_path / "out")
    assert not list((tmp_path / "out").glob("*adapter*"))
    assert "lora" not in json.loads((tmp_path / "out" / "regjax.json").read_text())
    _, params, _ = regjax.load_model(workdir / "raft")
    _, exported = weights(tmp_path / "out")
    for path, leaf in paths.flatten(params).items():
        assert np.asarray(leaf).tobytes() == exported[path].tobytes(), path
    regjax.export(workdir / "raft", tmp_path / "half", dtype="bfloat16")
    half = paths.flatten(models.split(models.load(tmp_path / "half"))[1])
    for path, leaf in exported.items():
        np.testing.assert_allclose(half[path], leaf, rtol=2**-8, atol=2**-9, err_msg=path)


def test_adapters_of_another_model_are_refused(workdir, tmp_path):
    shutil.copytree(workdir / "raft" / "lora", tmp_path / "raft" / "lora")
    shutil.copytree(workdir / "other" / "model", tmp_path / "base" / "model")
    with pytest.raises(InputError, match="trained beside other parameters, those of small_lora"):
        regjax.load_model(tmp_path / "raft")


def steps(workdir, stage):
    lines = read_log(workdir / "log.jsonl")
    return max((line["step"] for line in lines if line["stage"] == stage), default=0)


def test_a_kill_leaves_no_trace(workdir, tmp_path):
    again = tmp_path / "run"
    process = start(RUN, again)
    wait_for(process, lambda: steps(again, "raft") >= 4)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (again / "more").exists()
    finish(start(RUN, again))
    assert_same_runs(again, workdir)
    assert (again / "raft" / "lora" / "adapter_model.safetensors").is_file()


def test_a_run_with_other_adapters_is_not_resumed(workdir, tmp_path):
    shutil.copytree(workdir, tmp_path / "run")
    stages = list(experiment.stages)
    stages[1] = dataclasses.replace(stages[1], lora=dataclasses.replace(LORA, alpha=6.0))
    with pytest.raises(
        InputError, match=r"raft was trained with other adapters: Lora\(rank=2, alpha=3"
    ):
        regjax.train(dataclasses.replace(experiment, stages=tuple(stages)), tmp_path / "run")


def from_file(workdir, folder, lora):
    """Training that begins with the model of the first stage and adapters from a file."""
    changed = dataclasses.replace(
        experiment,
        model=str(workdir / "base" / "model"),
        stages=(Stage("again", Sft(), decisions=("mean",), lora=lora, steps=0),),
    )
    return regjax.train(changed, folder, quiet=True)["stages"]["again"]


def test_a_stage_can_begin_with_adapters_from_a_file(workdir, tmp_path):
    lora = dataclasses.replace(LORA, path=str(workdir / "raft" / "lora"))
    found = from_file(workdir, tmp_path, lora)
    expected = json.loads((workdir / "raft" / "results.json").read_text())
    assert found["params"] == expected["params"]
    assert found["test"]["mean/rmse"] == expected["test"]["mean/rmse"]
    # PEFT's two files, of the same bytes but for the model's name, and where the model is.
    kept = (tmp_path / "again" / "lora" / "adapter_config.json").read_text()
    assert json.loads(kept)["base_model_name_or_path"] == str(workdir / "base" / "model")
    report = regjax.evaluate(tmp_path, experiment.data.test, intervals=False).report
    np.testing.assert_allclose(report["mean/rmse"], expected["test"]["mean/rmse"], rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 3}, "stage 'again': Lora.rank is 3, in .* it is 2; give the same"),
        ({"alpha": 4.0}, "stage 'again': Lora.alpha is 4.0, in .* it is 3.0"),
        ({"patterns": ("mlp/up/kernel$",)}, "lora/layers/attention/key/a is not asked for by Lora"),
        (
            {"patterns": (".*kernel$",)},
            "lora/head/a is asked for by Lora.patterns and not there in",
        ),
        ({"path": "nowhere"}, "nowhere has no adapter_config.json"),
    ],
)
def test_adapters_in_a_file_that_are_not_the_stages_are_refused(
    workdir, tmp_path, changes, message
):
    lora = dataclasses.replace(LORA, path=str(workdir / "raft" / "lora"))
    with pytest.raises(InputError, match=message):
        from_file(workdir, tmp_path, dataclasses.replace(lora, **changes))


def test_adapters_in_a_file_for_another_model_are_refused(workdir, tmp_path):
    lora = dataclasses.replace(LORA, path=str(workdir / "raft" / "lora"))
    stages = (Stage("again", Sft(), decisions=("mean",), lora=lora, steps=0),)
    with pytest.raises(InputError, match="trained beside other parameters, those of small_lora"):
        regjax.train(dataclasses.replace(experiment, stages=stages), tmp_path, quiet=True)
    with pytest.raises(InputError, match="read, not made; call load_lora"):
        models.create_lora(lora, tiny.decoder()[1], jax.random.key(0))


def test_a_model_of_a_user(tmp_path):
    apply, params = tiny.bigram(300)
    lora = Lora(rank=2, patterns=("^table$",))
    stages = (Stage("only", Sft(), lora=lora, decisions=("mean",)),)
    regjax.train(
        dataclasses.replace(experiment, stages=stages),
        tmp_path,
        model=(apply, params),
        quiet=True,
    )
    found = checkpoint.load_params(tmp_path, "only")
    assert np.asarray(found["table"]).tobytes() == np.asarray(params["table"]).tobytes()
    assert np.abs(found["lora"]["table"]["b"]).max() > 0
    losses = [line["loss"] for line in read_log(tmp_path / "log.jsonl") if "loss" in line]
    assert losses[-1] < losses[0]
    merged = models.merge_lora(found, lora)
    tokens = np.arange(12).reshape(2, 6)
    np.testing.assert_allclose(
        apply(merged, tokens), models.with_lora(apply, lora)(found, tokens), atol=1e-6
    )


def test_what_is_trained_by_default():
    prompt = models.SoftPrompt(length=2)
    for stage, expected in (
        (Stage("a", Sft()), (".*",)),
        (Stage("a", Sft(), lora=LORA), ("^lora/",)),
        (Stage("a", Sft(), lora=LORA, soft_prompt=prompt), ("^lora/", "^soft_prompt/")),
        (Stage("a", Sft(), lora=LORA, trainable=("^head/",)), ("^head/",)),
    ):
        assert trainable_of(stage) == expected
        assert experiment.resolve(stage).trainable == expected


def test_bad_adapters_are_named(tmp_path):
    with pytest.raises(InputError, match="stage 'a': lora is 8; expected a Lora"):
        check_stages([Stage("a", Sft(), lora=8)])
    for lora, message in (
        (Lora(patterns=("^dense/",)), "stage 'a': the pattern '.dense/' matches no parameter"),
        (Lora(patterns=("table$",)), "stage 'a': Lora.patterns matches the embedding table"),
        (Lora(patterns=("scale$",)), "stage 'a': Lora.patterns matches final_norm/scale"),
    ):
        with pytest.raises(InputError, match=message):
            stages = (Stage("a", Sft(), lora=lora, decisions=("mean",)),)
            regjax.train(dataclasses.replace(experiment, stages=stages), tmp_path, quiet=True)
    apply, params = tiny.bigram(300)
    with pytest.raises(InputError, match="the model's own parameters have the name 'lora'"):
        stages = (Stage("a", Sft(), lora=Lora(patterns=("table",))),)
        changed = dataclasses.replace(experiment, stages=stages)
        regjax.train(changed, tmp_path, model=(apply, {**params, "lora": params}), quiet=True)


def test_the_command_line_sets_their_fields(tmp_path, capsys):
    arguments = ["train", "tests/small_lora.py", "--workdir", str(tmp_path)]
    with pytest.raises(SystemExit, match="2"):
        cli.main([*arguments, "--stages.1.lora.rank", "0"])
    assert "Lora.rank is 0" in capsys.readouterr().err


def test_a_step_has_no_gradient_of_a_kernel():
    """In the compiled step of a RAFT stage no product has the shape of a kernel."""
    config = dataclasses.replace(
        tiny.CONFIG, width=24, heads=5, head_dim=8, mlp_width=56, vocabulary_size=72
    )
    model, params = models.split(models.create(config, 0))
    batch = tiny.on_device(tiny.batch([[example] for example in tiny.examples(3)], length=22))
    batch = jax.tree.map(lambda array: array[None], batch)
    everywhere = sharding.replicated(sharding.make_mesh())
    optimizer = optax.adam(1e-3)

    def products(model, trained, frozen):
        update = make_update(model, Raft(), optimizer, tiny.SINGLE, seed=0, sharding=everywhere)
        text = update.lower(init_state(trained, optimizer, everywhere), frozen, batch)
        found = re.findall(r"= f32\[([\d,]+)\](?:\{[^}]*\})? dot\(", text.compile().as_text())
        return {tuple(sorted(map(int, shape.split(",")[-2:]))) for shape in found}

    flat = paths.flatten(params)
    kernels = {
        tuple(sorted(leaf.shape[1:]))
        for path, leaf in flat.items()
        if path.endswith("/kernel") and leaf.ndim == 3
    }
    new = paths.flatten({"lora": models.create_lora(LORA, params, jax.random.key(0))})
    adapted = models.with_lora(model, LORA)
    assert not products(adapted, new, flat) & kernels
    assert products(model, flat, {}) >= kernels
