"""The loop: what it selects, refuses, resumes, records, and leaves behind."""

import dataclasses
import json
import math

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import regjax
from regjax import InputError, Stage, checkpoint, models, paths
from regjax.data import rated_texts
from regjax.log import read_log
from regjax.objectives import Raft, Sft
from regjax.optim import Optimizer, ParameterGroup
from regjax.recorder import TrainingStopped
from tests.small_experiment import experiment


def single(objective=None, *, steps=6, **fields):
    """The experiment with one stage; keywords are fields of the experiment or the stage."""
    names = {"select", "trainable", "decisions"} & fields.keys()
    of_stage = {name: fields.pop(name) for name in names}
    stage = Stage("only", objective or Raft(), decisions=of_stage.pop("decisions", ("mean",)))
    stage = dataclasses.replace(stage, **of_stage)
    quick = {"eval_every": 0, "checkpoint_every": 3, "log_every": 1}
    return dataclasses.replace(
        experiment, **{**quick, "stages": (stage,), "steps": steps, **fields}
    )


def weights(workdir, stage="only"):
    return load_file(workdir / stage / "model" / "model.safetensors")


def same(first, second):
    return first.keys() == second.keys() and all(
        array.tobytes() == second[name].tobytes() for name, array in first.items()
    )


def predicted(path, read_out="mean"):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return np.array([line[read_out] for line in lines]), np.array(
        [line["target"] for line in lines]
    )


# What is selected


@pytest.mark.parametrize(("figure", "better"), [("mean/rmse", min), ("mean/pearson", max)])
def test_the_selected_step_is_the_best_on_validation(tmp_path, figure, better):
    run = single(
        Raft(),
        steps=18,
        eval_every=3,
        select=figure,
        optimizer=Optimizer(learning_rate=0.3, schedule="constant", warmup=0.0),
    )
    found = regjax.train(run, tmp_path, quiet=True)["stages"]["only"]
    name = f"validation/{figure}"
    by_step = {
        line["step"]: line[name] for line in read_log(tmp_path / "log.jsonl") if name in line
    }
    assert list(by_step) == [3, 6, 9, 12, 15, 18]
    best = better(by_step, key=by_step.get)
    assert best != 18, "the test needs a run whose best step is not its last"
    assert found["step"] == best
    assert found["validation"][figure] == by_step[best]
    scores, targets = predicted(tmp_path / "only" / "predictions_test.jsonl")
    rmse = math.sqrt(np.mean((scores - targets) ** 2))
    assert found["test"]["mean/rmse"] == pytest.approx(rmse, rel=1e-12)
    reader = regjax.Reader.load(tmp_path)
    scored = [one.score for one in reader(experiment.data.test)]
    np.testing.assert_allclose(scored, scores, rtol=1e-5)
    again = regjax.train(run, tmp_path, quiet=True)["stages"]["only"]
    assert again == found


@pytest.mark.parametrize("select", ["mean/rsme", "rmse", "median/rmse", "mean/count", "grid_mass"])
def test_unknown_selection_stops_before_training(tmp_path, select):
    with pytest.raises(InputError, match=r"'only': select .* known: mean/rmse"):
        regjax.train(single(select=select), tmp_path)
    assert not (tmp_path / "only").exists()


def test_selection_without_validation_data_is_refused(tmp_path):
    data = dataclasses.replace(experiment.data, validation="")
    with pytest.raises(InputError, match="needs validation data"):
        regjax.train(single(select="mean/rmse", data=data), tmp_path)


# Checked before any step, of whatever stage


def test_mistakes_in_a_late_stage_are_found_first(tmp_path):
    def second(**fields):
        stage = dataclasses.replace(experiment.stages[1], **fields)
        return dataclasses.replace(experiment, stages=(experiment.stages[0], stage))

    cases = {
        "matches no parameter": second(trainable=("no_such_parameter",)),
        "no_such_group": second(optimizer=Optimizer(groups=(ParameterGroup("no_such_group"),))),
        "steps is -1": second(steps=-1),
        "reference_field": dataclasses.replace(experiment, reference_field="text"),
        "no record has the field": second(data=dataclasses.replace(experiment.data, id_field="x")),
    }
    for message, run in cases.items():
        with pytest.raises(InputError, match=message):
            regjax.train(run, tmp_path)
    assert not (tmp_path / "first").exists()


def test_packing_trains_and_is_evaluated_one_example_a_row(tmp_path):
    data = dataclasses.replace(experiment.data, packing=True, max_length=64)
    found = regjax.train(single(data=data, steps=2), tmp_path, quiet=True)
    assert found["stages"]["only"]["test"]["count"] == 40


def test_no_steps_is_the_initial_model(tmp_path):
    two = dataclasses.replace(single(steps=2), stages=(Stage("none", Sft(), steps=0),))
    regjax.train(two, tmp_path, quiet=True)
    from regjax.prepare import prepare

    run = prepare(two, tmp_path)
    _, params = models.split(models.load(tmp_path / "none" / "model"))
    assert same(
        {name: np.asarray(leaf) for name, leaf in run.params.items()},
        {name: np.asarray(leaf) for name, leaf in paths.flatten(params).items()},
    )


# Resuming


def test_a_finished_stage_is_left_alone(tmp_path):
    run = single()
    first = regjax.train(run, tmp_path, quiet=True)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "only").rglob("*") if p.is_file()}
    assert regjax.train(run, tmp_path, quiet=True) == first
    after = {p: p.stat().st_mtime_ns for p in (tmp_path / "only").rglob("*") if p.is_file()}
    assert before == after


def test_more_steps_go_on_from_the_last(tmp_path):
    constant = Optimizer(learning_rate=1e-2, schedule="constant", warmup=0.0)
    regjax.train(single(steps=5, optimizer=constant), tmp_path / "a", quiet=True)
    found = regjax.train(single(steps=9, optimizer=constant), tmp_path / "a", quiet=True)
    regjax.train(single(steps=9, optimizer=constant), tmp_path / "b", quiet=True)
    assert found["stages"]["only"]["step"] == 9
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    losses = [
        (line["step"], line["loss"])
        for line in read_log(tmp_path / "a" / "log.jsonl")
        if "loss" in line
    ]
    assert [step for step, _ in losses] == list(range(1, 10))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "another seed"),
        ({"batch_size": 4}, "other batches"),
        ({"steps": 4}, "trained for 6 steps, 4 are asked"),
        ({"vocabulary_size": 310}, "vocabulary_size"),
        (
            {"data": dataclasses.replace(experiment.data, train=rated_texts(95, seed=1))},
            "training data",
        ),
        ({"architecture": dataclasses.replace(experiment.architecture, width=24)}, "another model"),
        ({"optimizer": Optimizer(name="sgd")}, "optimizer"),
    ],
)
def test_another_experiment_in_the_same_workdir_is_refused(tmp_path_factory, change, message):
    workdir = tmp_path_factory.getbasetemp() / "shared-workdir"
    regjax.train(single(), workdir, quiet=True)
    before = weights(workdir)
    with pytest.raises(InputError, match=message):
        regjax.train(dataclasses.replace(single(), **change), workdir, quiet=True)
    assert same(weights(workdir), before)


def test_a_stage_whose_start_has_changed_is_refused(tmp_path):
    short = dataclasses.replace(single(steps=2), stages=experiment.stages)
    regjax.train(short, tmp_path, quiet=True)
    with pytest.raises(InputError, match=r"second was trained from other parameters"):
        regjax.train(dataclasses.replace(short, steps=3), tmp_path, quiet=True)


def test_frozen_parameters_keep_their_bits(tmp_path):
    run = single(trainable=("^layers/",))
    regjax.train(run, tmp_path, quiet=True)
    _, params = models.split(models.load(tmp_path / "only" / "model"))
    from regjax.prepare import prepare

    initial = prepare(run, tmp_path).params
    for name, leaf in paths.flatten(params).items():
        kept = np.asarray(leaf).tobytes() == np.asarray(initial[name]).tobytes()
        assert kept is not name.startswith("layers/"), name


# Numbers that are not finite


@dataclasses.dataclass(frozen=True)
class Breaks:
    """RAFT whose loss is NaN wherever the batch holds one of the given targets' weights above 5."""

    def __call__(self, model, params, batch, key, codec):
        sums = Raft()(model, params, batch, key, codec)
        broken = (batch["weights"] > 5).any()
        total, weight = sums["loss"]
        return {**sums, "loss": (jnp.where(broken, jnp.nan, total), weight)}


def weighted_records(count):
    """Records of which the first `count` break the objective."""
    records = rated_texts(96, seed=1)
    return [{**record, "weight": 9.0 if i < count else 1.0} for i, record in enumerate(records)]


def breaking(count, **fields):
    data = dataclasses.replace(
        experiment.data,
        train=weighted_records(count),
        weight_field="weight",
        validation="",
        test="",
    )
    return single(Breaks(), data=data, steps=12, **fields)


def test_a_bad_step_changes_nothing_and_names_its_records(tmp_path):
    regjax.train(
        breaking(1, checkpoint_every=1, optimizer=Optimizer(schedule="constant", warmup=0.0)),
        tmp_path,
        quiet=True,
    )
    log = read_log(tmp_path / "log.jsonl")
    bad = [line for line in log if line.get("not_finite")]
    assert len(bad) == 1
    assert "review-0" in bad[0]["record_ids"] and len(bad[0]["record_ids"]) == 8
    good = [line["step"] for line in log if "loss" in line]
    assert good == [step for step in range(1, 13) if step != bad[0]["step"]]
    assert all(math.isfinite(line["loss"]) for line in log if "loss" in line)
    assert all(np.isfinite(array).all() for array in weights(tmp_path).values())


def test_a_bad_step_leaves_parameters_and_moments(tmp_path):
    """With every record bad but one step's, the parameters after n steps are the initial ones."""
    run = breaking(96, max_bad_steps=20)
    regjax.train(run, tmp_path, quiet=True)
    from regjax.prepare import prepare

    initial = prepare(run, tmp_path).params
    _, params = models.split(models.load(tmp_path / "only" / "model"))
    for name, leaf in paths.flatten(params).items():
        assert np.asarray(leaf).tobytes() == np.asarray(initial[name]).tobytes()


def test_too_many_bad_steps_stop_the_run_which_can_go_on(tmp_path):
    with pytest.raises(TrainingStopped, match=r"3 steps in a row, up to step 3"):
        regjax.train(breaking(96, max_bad_steps=3, checkpoint_every=2), tmp_path, quiet=True)
    with checkpoint.open_manager(tmp_path / "only" / "checkpoints") as manager:
        assert manager.all_steps() == [2]
    assert not (tmp_path / "results.json").exists()
    # The bad steps before the checkpoint count when the run goes on.
    with pytest.raises(TrainingStopped, match=r"3 steps in a row, up to step 3"):
        regjax.train(breaking(96, max_bad_steps=3, checkpoint_every=2), tmp_path, quiet=True)
    cured = dataclasses.replace(
        breaking(96, max_bad_steps=3), stages=(Stage("only", Raft(), decisions=("mean",)),)
    )
    found = regjax.train(cured, tmp_path, quiet=True)
    assert found["stages"]["only"]["step"] == 12


def test_an_infinite_weight_is_no_record(tmp_path):
    records = [{**r, "weight": math.inf if i == 4 else 1.0} for i, r in enumerate(rated_texts(16))]
    data = dataclasses.replace(experiment.data, train=records, weight_field="weight")
    with pytest.raises(InputError, match=r"records\[4\]: weight = inf: is not a finite number"):
        regjax.train(single(data=data), tmp_path)


# A model of one's own


class Bag(linen.Module):
    """Logits from the running mean of embeddings."""

    @linen.compact
    def __call__(self, tokens):
        hidden = linen.Embed(320, 16)(tokens)
        counts = jnp.arange(1, tokens.shape[1] + 1)[:, None]
        return linen.Dense(320)(linen.relu(linen.Dense(32)(hidden.cumsum(1) / counts)))


def bag():
    module = Bag()
    return module.apply, module.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))


def test_a_linen_module_trains_and_is_read_back(tmp_path):
    run = dataclasses.replace(single(steps=30, optimizer=Optimizer(learning_rate=0.05)))
    apply, params = bag()
    found = regjax.train(run, tmp_path, model=(apply, params), quiet=True)
    log = [line["loss"] for line in read_log(tmp_path / "log.jsonl") if "loss" in line]
    assert np.mean(log[-5:]) < 0.7 * log[0]
    assert not (tmp_path / "only" / "model").exists()
    last = checkpoint.load_params(tmp_path, "only")
    assert jax.tree.structure(last) == jax.tree.structure(params)
    # The parameters are those of the report: score the test records by hand.
    from regjax.prepare import prepare

    prepared = prepare(run, tmp_path, (apply, params))
    examples = prepared.stages[0].splits.test
    scores, _ = predicted(tmp_path / "only" / "predictions_test.jsonl")
    for example, score in zip(examples.examples[:5], scores[:5], strict=True):
        logits = apply(last, example.tokens[None, : example.score_start])[0, -1]
        chosen = jax.nn.softmax(logits)[prepared.stages[0].codec.tokens[:, 0]]
        assert score == pytest.approx(float(chosen @ prepared.stages[0].codec.values), rel=1e-4)
    assert found["stages"]["only"]["test"]["count"] == 40


def test_a_bare_function_trains(tmp_path):
    def apply(params, tokens):
        return params["bias"] + params["table"][tokens]

    params = {"bias": jnp.zeros(320), "table": jnp.zeros((320, 320))}
    regjax.train(single(steps=3), tmp_path, model=(apply, params), quiet=True)
    last = checkpoint.load_params(tmp_path, "only")
    assert last["bias"].shape == (320,) and np.abs(last["bias"]).max() > 0
    with pytest.raises(InputError, match=r"holds no params\.safetensors"):
        checkpoint.load_params(tmp_path, "other")


def test_another_model_of_ones_own_is_no_resumed_run(tmp_path):
    apply, params = bag()
    regjax.train(single(steps=3), tmp_path, model=(apply, params), quiet=True)
    other = jax.tree.map(lambda leaf: leaf + 1, params)
    with pytest.raises(InputError, match="another model"):
        regjax.train(single(steps=3), tmp_path, model=(apply, other), quiet=True)


def test_own_models_that_do_not_fit_are_refused(tmp_path):
    apply, params = bag()
    packed = single(data=dataclasses.replace(experiment.data, packing=True))
    with pytest.raises(InputError, match="packing needs a model that takes segment_ids"):
        regjax.train(packed, tmp_path, model=(apply, params))
    narrow = (lambda params, tokens: params["table"][tokens], {"table": jnp.zeros((320, 200))})
    with pytest.raises(InputError, match="V at least 300"):
        regjax.train(single(), tmp_path, model=narrow)


# The loop and the device


def test_steps_are_not_waited_for(tmp_path, monkeypatch):
    """When a step's metrics are read, the step after it has been dispatched."""

    from importlib import import_module

    train, recorder = import_module("regjax.train"), import_module("regjax.recorder")
    events = []
    make_update = train.make_update

    def watched(*args, **kwargs):
        update = make_update(*args, **kwargs)

        def step(state, frozen, batch):
            events.append("dispatch")
            return update(state, frozen, batch)

        return step

    class WatchedNumpy:
        def __getattr__(self, name):
            if name == "asarray":
                events.append("fetch")
            return getattr(np, name)

    monkeypatch.setattr(train, "make_update", watched)
    monkeypatch.setattr(recorder, "np", WatchedNumpy())
    run = single(steps=5, checkpoint_every=100, decisions=())
    regjax.train(run, tmp_path, quiet=True)
    order = [event for i, event in enumerate(events) if i == 0 or events[i - 1] != event]
    assert order[:2] == ["dispatch", "fetch"]
    first_fetch = events.index("fetch")
    assert events[:first_fetch].count("dispatch") == 2
    assert order[-1] == "fetch"
