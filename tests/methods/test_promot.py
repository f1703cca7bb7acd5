"""ProMoT: what each stage changes, what it leaves alone to the bit, and what it keeps in files."""

import dataclasses
import json
import zlib

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import load_file

import regjax
from regjax import checkpoint, generate, paths, prompting
from regjax.errors import InputError
from regjax.methods import promot
from regjax.models.prompt import SoftPrompt
from regjax.models.prompt_files import load_prompt
from regjax.objectives import Raft, Sft
from regjax.prepare import prepare
from regjax.probes import Answers
from tests import small_promot as small

METHODS = {
    "fine_tuning": promot.fine_tuning,
    "promot": promot.promot,
    "joint_training": promot.joint_training,
    "fixed_prompt": promot.fixed_prompt,
}


def run(workdir, *stages, **changes):
    """The pretraining stage and these; returns what `results.json` holds."""
    experiment = dataclasses.replace(small.experiment, stages=(small.pretraining, *stages))
    return regjax.train(dataclasses.replace(experiment, **changes), workdir, quiet=True)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("promot") / "run"
    stages = [stage for method in METHODS.values() for stage in method(small.recipe)]
    first = stages.index(next(s for s in stages if s.name == "promot_prompt"))
    stages[first] = dataclasses.replace(
        stages[first], probes=(*stages[first].probes, small.alignment)
    )
    run(workdir, *stages)
    return workdir


def tensors(workdir, stage):
    return load_file(workdir / stage / "model" / "model.safetensors")


def prompt(workdir, stage, name="main"):
    return np.asarray(load_prompt(workdir / stage / "soft_prompt" / name)[0])


def same(one, other):
    return one.keys() == other.keys() and all(
        one[name].tobytes() == other[name].tobytes() for name in one
    )


def last_state(workdir, stage):
    with checkpoint.open_manager(workdir / stage / "checkpoints") as manager:
        restore = ocp.args.Composite(state=ocp.args.StandardRestore())
        return manager.restore(manager.latest_step(), args=restore)["state"]


def leaf_names(tree):
    return {jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(tree)}


def test_the_first_stage_changes_the_prompt_alone(workdir):
    # S1: the model that the prompt belongs to, by the checksum of every bit, is the pretrained one.
    pretrained = regjax.load_model(workdir / "pretraining")
    folder = workdir / "promot_prompt"
    origin = load_prompt(folder / "soft_prompt" / "main")[1]
    assert origin.checksum == int(checkpoint.checksum(paths.flatten(pretrained.params)))
    assert not (folder / "model").exists()
    assert sum(f.stat().st_size for f in (folder / "soft_prompt").rglob("*")) < 16_000

    names = leaf_names(last_state(workdir, "promot_prompt"))
    arrays = {name for name in names if "count" not in name and "step" not in name}
    assert {name for name in arrays if "soft_prompt/main" not in name} == set()
    moments = [name for name in arrays if "optimizer" in name]
    assert len(moments) == 2


def test_the_prompt_is_trained(workdir):
    # It begins with rows of the pretrained table, and none of its entries stays what it was.
    table = regjax.load_model(workdir / "pretraining").params["embedding"]["table"]
    trained = prompt(workdir, "promot_prompt")
    assert trained.shape == (4, 16)
    assert not np.isin(trained, np.asarray(table)).any()
    # The prompt that is never trained is as it was drawn.
    fixed = prompt(workdir, "fixed_prompt")
    key = jax.random.fold_in(jax.random.key(0), zlib.crc32(b"main"))
    drawn = jax.random.uniform(key, (4, 16), minval=-0.5, maxval=0.5)
    assert fixed.tobytes() == np.asarray(drawn).tobytes()


def test_the_second_stage_leaves_the_prompt_alone(workdir):
    # S2: no bit changes, and nothing of it is in the optimizer's state or the checkpoints.
    assert prompt(workdir, "promot").tobytes() == prompt(workdir, "promot_prompt").tobytes()
    names = leaf_names(last_state(workdir, "promot"))
    assert not any("soft_prompt" in name for name in names)
    assert any("layers/mlp" in name for name in names)
    pretrained, tuned = tensors(workdir, "pretraining"), tensors(workdir, "promot")
    assert pretrained.keys() == tuned.keys()
    assert all(
        not np.array_equal(pretrained[name], tuned[name]) for name in tuned if "proj" in name
    )


def test_joint_training_changes_both(workdir):
    state = leaf_names(last_state(workdir, "joint_training"))
    assert any("soft_prompt/main" in name for name in state)
    assert any("layers/mlp" in name for name in state)


def test_without_its_prompt_and_second_stage_the_model_is_the_pretrained_one(tmp_path, workdir):
    # S3: zero steps of the second stage, prompt removed: bit-equal logits and equal answers.
    recipe = dataclasses.replace(small.recipe, model_steps=0)
    results = run(tmp_path / "run", *promot.promot(recipe))
    assert same(tensors(tmp_path / "run", "promot"), tensors(workdir, "pretraining"))
    tokens = np.arange(3, 9)[None]
    plain = regjax.load_model(workdir / "pretraining")
    without = regjax.load_model(tmp_path / "run", soft_prompt=False)
    one, other = (m.model(m.params, tokens) for m in (plain, without))
    assert np.asarray(one).tobytes() == np.asarray(other).tobytes()
    with_prompt = regjax.load_model(tmp_path / "run")
    assert not np.array_equal(with_prompt.model(with_prompt.params, tokens), one)
    again = json.loads((workdir / "promot_prompt" / "results.json").read_text())["test"]
    for figure in ("larger/exact_match", "larger/format_ratio"):
        assert results["stages"]["promot"]["test"][figure] == again[figure]


def test_a_run_with_one_task_is_multi_task_promot(tmp_path):
    # S9: the per-task prompt of one task is the single path, bit for bit.
    recipe = dataclasses.replace(small.recipe, task=small.judge, prompt_steps=6, model_steps=6)
    recipe = dataclasses.replace(recipe, select="")
    run(tmp_path / "one", *promot.promot(recipe, name="p"))
    run(tmp_path / "many", *promot.multi_task_promot(recipe, (small.judge,), name="p"))
    assert same(tensors(tmp_path / "one", "p"), tensors(tmp_path / "many", "p"))
    one = prompt(tmp_path / "one", "p", "judge")
    assert one.tobytes() == prompt(tmp_path / "many", "p", "judge").tobytes()


def test_every_task_has_its_own_prompt(tmp_path):
    recipe = dataclasses.replace(small.recipe, prompt_steps=6, model_steps=6, select="")
    tasks = (small.judge, small.order)
    results = run(tmp_path / "run", *promot.multi_task_promot(recipe, tasks, name="many"))
    first, second = (prompt(tmp_path / "run", "many", task.name) for task in tasks)
    assert not np.array_equal(first, second)
    # Each is the one that its own stage trained.
    assert first.tobytes() == prompt(tmp_path / "run", "many_judge", "judge").tobytes()
    assert first.tobytes() == prompt(tmp_path / "run", "many_order", "judge").tobytes()
    assert second.tobytes() == prompt(tmp_path / "run", "many_order", "order").tobytes()
    assert {"judge/accuracy", "order/accuracy"} <= results["stages"]["many"]["test"].keys()


def test_the_files_answer_as_the_run_did(workdir):
    lines = [
        json.loads(line)
        for line in (workdir / "promot" / "answers_main_test.jsonl").read_text().splitlines()
    ]
    records = small.records("judge", 2)[:8]
    questions = [f"judge {r['x']} {r['y']} =" for r in records]
    loaded = regjax.load_model(workdir / "promot")
    answers = generate.texts(*loaded, questions, max_new_tokens=3, stop=("\n",))
    assert answers == [line["answer"] for line in lines]
    assert [r["answer"] for r in records] == [line["expected"] for line in lines]
    results = json.loads((workdir / "results.json").read_text())
    share = np.mean([line["answer"] == line["expected"] for line in lines])
    row = next(row for row in results["text_table"] if row["stage"] == "promot")
    assert row["main/exact_match"] == pytest.approx(share)
    ranked = np.mean([line["ranked_first"] == line["expected"] for line in lines])
    assert row["main/accuracy"] == pytest.approx(ranked)


def test_a_reader_reads_with_the_prompt(workdir, tmp_path):
    records = [{k: r[k] for k in ("word", "x", "y")} for r in small.records("judge", 2)[:8]]
    lines = (workdir / "promot_prompt" / "answers_main_test.jsonl").read_text().splitlines()
    ranked = [json.loads(line)["ranked_first"] for line in lines]
    for folder in (
        workdir / "promot_prompt",
        regjax.export(workdir / "promot_prompt", tmp_path / "e"),
    ):
        reader = regjax.Reader.load(folder, read_out="mode")
        assert [small.LABELS[int(s.score)] for s in reader(records)] == ranked
    exported = load_prompt(tmp_path / "e" / "soft_prompt")[0]
    assert np.asarray(exported).tobytes() == prompt(workdir, "promot_prompt").tobytes()


def test_a_prompt_of_a_file_begins_a_stage(workdir, tmp_path):
    path = str(workdir / "promot_prompt" / "soft_prompt" / "main")
    start = SoftPrompt(init="file", path=path)
    recipe = dataclasses.replace(small.recipe, prompt=start, prompt_steps=0)
    run(tmp_path / "run", *promot.prompt_tuning(recipe))
    assert (
        prompt(tmp_path / "run", "prompt_tuning").tobytes()
        == prompt(workdir, "promot_prompt").tobytes()
    )


def test_the_alignment_is_logged_from_the_first_step(workdir):
    log = [json.loads(line) for line in (workdir / "log.jsonl").read_text().splitlines()]
    name = "validation/alignment/cosine_mlp"
    found = {line["step"]: line[name] for line in log if name in line}
    assert found.keys() == {0, 10, 20}
    assert all(-1 <= value <= 1 for value in found.values())


def test_shots_stand_before_every_record(tmp_path):
    recipe = dataclasses.replace(small.recipe, prompt_steps=2, model_steps=2, select="")
    data = dataclasses.replace(small.experiment.data, max_length=40)
    experiment = dataclasses.replace(
        small.experiment,
        data=data,
        stages=(small.pretraining, *promot.promot_with_shots(recipe)),
    )
    ready = prepare(experiment, tmp_path).stages
    template = regjax.data.task_template(ready[1].tasks[0])
    assert template.prompt.endswith("\n\n{word} {x} {y} =")
    [example] = regjax.data.shots(
        regjax.data.read_records(data.train), small.TEMPLATE, small.GRID, data, 1, 0
    )
    assert template.prompt.startswith("".join(example))
    plain = prepare(small.experiment, tmp_path / "plain").stages[1].splits.train
    longer = ready[1].splits.train
    extra = {
        len(a.tokens) - len(b.tokens) for a, b in zip(longer.examples, plain.examples, strict=True)
    }
    assert len(extra) == 1 and extra.pop() > 5


def test_the_defaults_are_the_papers_and_fit_every_method(tmp_path):
    recipe = promot.Recipe()
    # Wang et al., 2024, appendix B: prompt 100 long, 5000 steps at 0.2; model 1000 at 0.001.
    assert (recipe.prompt.length, recipe.prompt_steps, recipe.model_steps) == (100, 5000, 1000)
    rules = (recipe.prompt_optimizer, recipe.model_optimizer)
    assert [rule.learning_rate for rule in rules] == [0.2, 0.001]
    assert all(rule.name == "adafactor" and rule.schedule == "constant" for rule in rules)
    assert recipe.model_objective == Sft(label_smoothing=0.1)
    stages = [stage for method in METHODS.values() for stage in method(recipe)]
    stages += promot.multi_task_promot(recipe, (small.judge, small.order))
    ready = prepare(dataclasses.replace(small.experiment, stages=tuple(stages)), tmp_path).stages
    assert [r.stage.steps for r in ready] == [1000, 5000, 1000, 1000, 1000, 5000, 5000, 1000]


def test_the_first_published_step_moves_the_prompt_by_the_rate(tmp_path):
    # P1, through a whole stage: one step of adafactor at 0.2, weight decay aside.
    rule = dataclasses.replace(promot.Recipe().prompt_optimizer, weight_decay=0.0)
    recipe = dataclasses.replace(small.recipe, prompt_optimizer=rule, prompt_steps=0)
    [start] = promot.prompt_tuning(recipe, name="start")
    [moved] = promot.prompt_tuning(dataclasses.replace(recipe, prompt_steps=1), name="moved")
    run(tmp_path / "run", start, dataclasses.replace(moved, start="pretraining"))
    change = prompt(tmp_path / "run", "moved") - prompt(tmp_path / "run", "start")
    np.testing.assert_allclose(np.abs(change), 0.2, rtol=1e-5)


only_tested = dataclasses.replace(
    small.larger, name="tested", data=dataclasses.replace(small.larger.data, validation="")
)
BAD = {
    "a probe of a prompt that is not there": (
        {"probes": (Answers(soft_prompt="other"),), "select": ""},
        "no soft prompt 'other'; it has main",
    ),
    "a figure of another kind of task": (
        {"probes": (Answers(small.larger),), "select": "larger/accuracy"},
        "'larger/accuracy' is no figure of its validation report; known: larger/exact_match",
    ),
    "a figure of a task without validation records": (
        {"probes": (Answers(only_tested),), "select": "tested/exact_match"},
        "'tested/exact_match' is no figure",
    ),
    "a figure that no probe has": ({"select": "main/rmse"}, "'main/rmse' is no figure"),
    "read-outs of text": (
        {"tasks": (small.larger,), "decisions": ("mean",), "select": ""},
        "need one task",
    ),
    "an objective of scores for text": (
        {"tasks": (small.larger,), "objective": Raft(), "select": "", "probes": ()},
        "needs one task with a grid",
    ),
    "packing": (
        {"data": dataclasses.replace(small.experiment.data, packing=True)},
        "turn packing off",
    ),
    "two tasks of one name": ({"tasks": (small.judge, small.judge)}, "have one name: judge, judge"),
    "no task": ({"tasks": ("judge",)}, "expected a tuple of regjax.data.Task"),
    "no soft prompt": ({"soft_prompt": 8}, "expected a SoftPrompt"),
    "no such parameter": ({"trainable": ("^soft_prompt/other$",)}, "matches no parameter"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_stage_that_cannot_run_stops_before_it_starts(case, tmp_path):
    changes, message = BAD[case]
    with pytest.raises(InputError, match=message):
        stage = dataclasses.replace(promot.prompt_tuning(small.recipe)[0], **changes)
        run(tmp_path / "run", stage)
    assert not (tmp_path / "run" / "pretraining").exists()


def test_a_prompt_after_the_first_token_is_asked_there(tmp_path):
    recipe = dataclasses.replace(small.recipe, prompt=SoftPrompt(length=4, after_bos=True))
    stage = promot.prompt_tuning(recipe)[0]
    run(tmp_path / "run", stage)
    folder = tmp_path / "run" / stage.name
    assert load_prompt(folder / "soft_prompt" / "main")[1].after_bos is True
    lines = (folder / "answers_main_test.jsonl").read_text().splitlines()
    questions = [f"judge {r['x']} {r['y']} =" for r in small.records("judge", 2)[:8]]
    answers = generate.texts(*regjax.load_model(folder), questions, max_new_tokens=3, stop=("\n",))
    assert answers == [json.loads(line)["answer"] for line in lines]

    class Wrong:
        bos_token_id = 0

    examples = prepare(small.experiment, tmp_path / "plain").stages[1].splits.train
    with pytest.raises(InputError, match="leave it off"):
        prompting.place(stage, examples, Wrong)
    assert prompting.place(dataclasses.replace(stage, soft_prompt=None), examples, Wrong) == 0


@pytest.mark.parametrize("change", [{"length": 5}, {"after_bos": True}])
def test_a_trained_prompt_keeps_its_length_and_place(change, tmp_path):
    first, second = promot.promot(small.recipe)
    other = dataclasses.replace(small.recipe.prompt, **change)
    with pytest.raises(InputError, match="the prompt 'main' that it starts with 4 and False"):
        run(tmp_path / "run", first, dataclasses.replace(second, soft_prompt=other))


def test_a_model_that_was_trained_is_kept_however_the_pattern_is_written(tmp_path, workdir):
    [stage] = promot.prompt_tuning(dataclasses.replace(small.recipe, prompt_steps=2, select=""))
    both = dataclasses.replace(stage, trainable=("^soft_prompt/main$|^head/",))
    run(tmp_path / "run", both)
    before, after = tensors(workdir, "pretraining"), tensors(tmp_path / "run", stage.name)
    changed = {name for name in after if not np.array_equal(before[name], after[name])}
    assert changed == {"lm_head.weight"}


def test_records_are_read_once(tmp_path, monkeypatch):
    from regjax import prepare as module

    asked = []
    load = module.load_task
    monkeypatch.setattr(
        module,
        "load_task",
        lambda task, *rest, **how: (
            asked.append((task.name, rest[1:], *how.values())) or load(task, *rest, **how)
        ),
    )
    stages = (small.pretraining, *promot.promot(small.recipe), *promot.joint_training(small.recipe))
    prepare(dataclasses.replace(small.experiment, stages=stages), tmp_path)
    # Two tasks of three splits, and the questions of two splits each.
    assert len(set(asked)) == len(asked) == 10


def test_results_name_the_probes_without_their_records(workdir):
    path = workdir / "promot" / "results.json"
    found = json.loads(path.read_text())["probes"]
    assert found.keys() == {"main", "larger"}
    task = found["larger"]["config"]["task"]
    assert task["data"]["train"] == "12 records in memory"
    assert found["larger"].keys() == {"config", "validation", "test"}
    assert path.stat().st_size < 8000
