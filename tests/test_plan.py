"""Plans of runs on the devices at hand: what they add up to, and what makes a step fit."""

import dataclasses
import gc
import importlib.util
import json

import jax
import pytest

from regjax import chips, cli, compiled, model_flops, models, plan, topology
from regjax.chips import Chip
from regjax.errors import InputError
from regjax.models.lora import Lora
from regjax.train import train
from tests.small_experiment import experiment

SMALL = dataclasses.replace(
    experiment, stages=experiment.stages[1:], eval_batch_size=8, steps=1, eval_every=0
)


@pytest.fixture(scope="module")
def planned():
    return plan.plan(experiment)


def test_every_step_and_scorer_is_planned(planned):
    names = [(one.program.name, one.program.kind, one.program.rows) for one in planned]
    assert names == [
        ("first", "step", 8), ("first", "scorer", 40), ("second", "step", 8), ("second", "scorer", 40),
    ]  # fmt: skip


def test_memory_is_that_of_the_arrays_of_a_run(planned, trained):
    """The state of the run that was really trained has the size that the plan says."""
    _, params = models.split(models.load(trained / "second" / "model"))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    step, scorer = planned[2], planned[3]
    assert step.result.memory.arguments["trained"] == size
    assert scorer.result.memory.arguments["frozen"] == size
    # Two moments of each parameter, and a few counters.
    assert 0 <= step.result.memory.arguments["optimizer"] - 2 * size < 100
    assert step.result.memory.arguments["frozen"] == 0
    assert step.needed == step.result.memory.total > 3 * size


def test_products_are_what_the_model_needs(planned):
    """Attention on a CPU takes all pairs of tokens; a causal mask leaves L (L + 1) / 2 of them."""
    for one in planned[1:]:
        program = one.program
        attention = model_flops.forward(experiment.architecture, program.length, 1).attention
        more = attention * (2 * program.length / (program.length + 1) - 1)
        passes = 3 if program.kind == "step" else 1
        assert one.result.flops == pytest.approx(program.flops + passes * program.rows * more)


def test_adapters_alone_are_trained(planned):
    """Of a frozen model's kernels the products stay that the adapters' gradients go through."""
    rank, size = 2, experiment.architecture
    stage = dataclasses.replace(SMALL.stages[0], lora=Lora(rank=rank))
    step, scorer = plan.plan(dataclasses.replace(SMALL, stages=(stage,)))
    heads, keys = size.heads * size.head_dim, size.key_value_heads * size.head_dim
    first = [(size.width, heads), (size.width, keys), (size.width, keys)]
    later = [(heads, size.width), *[(size.width, size.mlp_width)] * 2, (size.mlp_width, size.width)]
    entries = rank * sum(inputs + outputs for inputs, outputs in first + later)

    memory = step.result.memory.arguments
    assert memory["trained"] == 4 * entries
    assert 0 <= memory["optimizer"] - 2 * memory["trained"] < 100
    assert memory["frozen"] == planned[2].result.memory.arguments["trained"]
    assert scorer.result.memory.arguments["frozen"] == memory["frozen"] + memory["trained"]

    length = step.program.length
    once = model_flops.forward(size, length, 1)
    attention = once.attention * 2 * length / (length + 1)
    # Nothing before the first layer's first kernels is trained: their inputs need no gradient.
    skipped = sum(inputs * outputs for inputs, outputs in first)
    adapters = 3 * entries - rank * sum(inputs for inputs, _ in first)
    products = 2 * once.kernels - 2 * length * skipped + 2 * length * adapters
    head = 2 * 2 * size.width * 320
    assert step.result.flops == step.program.rows * (products + 3 * attention + head)


def test_no_weight_is_made():
    gc.collect()
    before = {id(array) for array in jax.live_arrays()}
    found = plan.plan(SMALL)
    made = sum(array.nbytes for array in jax.live_arrays() if id(array) not in before)
    assert made < found[0].result.memory.arguments["trained"] / 10


def test_rows_without_records_are_as_long_as_they_may_be(tmp_path):
    data = dataclasses.replace(
        experiment.data,
        train=str(tmp_path / "absent.jsonl"),
        validation="",
        test="",
        buckets=(16, 32),
    )
    with pytest.raises(InputError, match="absent"):
        plan.plan(dataclasses.replace(SMALL, data=data))
    tokenizer = tmp_path / "run"
    train(SMALL, tokenizer, quiet=True)
    absent = dataclasses.replace(SMALL, data=data, tokenizer=str(tokenizer / "tokenizer"))
    steps = [one.program for one in plan.plan(absent) if one.program.kind == "step"]
    assert [step.length for step in steps] == [16, 32, 64]
    assert [task.data.train for task in plan.absent_tasks(absent)] == [data.train]
    assert plan.absent_tasks(SMALL) == []


def chip(memory):
    return Chip("small", memory, flops=1e9, bandwidth=1e8, interconnect=1e8)


def test_a_bound_on_the_time_is_the_largest_of_three():
    costs = compiled.Costs(
        compiled.Memory({}, 0, 0, 0), flops=4e9, traffic=10**8, collectives=(), text=""
    )
    seconds = costs.seconds(chip(1))
    assert (seconds.compute, seconds.memory, seconds.exchange) == (4.0, 1.0, 0.0)
    assert (seconds.bound, seconds.limited_by) == (4.0, "compute")


def test_changes_are_tried_until_a_step_fits(monkeypatch, planned):
    step = planned[2]
    monkeypatch.setattr(chips, "find", lambda kind: chip(step.needed - 1))
    assert not dataclasses.replace(step, chip=chips.find("")).fits
    tried = list(plan.remedies(SMALL, "second"))
    assert tried[-1].planned.fits and not any(one.planned.fits for one in tried[:-1])
    assert tried[-1].planned.needed < step.needed
    assert "--" in tried[-1].flags


def test_where_the_arguments_are_too_large_only_smaller_ones_help(monkeypatch, planned):
    arguments = planned[2].result.memory.arguments
    monkeypatch.setattr(chips, "find", lambda kind: chip(arguments["trained"] * 2))
    tried = list(plan.remedies(SMALL, "second"))
    assert not any(one.planned.fits for one in tried if "adapters" not in one.change)
    adapters = next(one for one in tried if "adapters" in one.change)
    assert adapters.experiment.stages[0].lora == Lora()
    # Its arguments are small enough to have the compiler asked.
    assert adapters.compiled and not tried[0].compiled


def test_the_command_prints_and_writes_what_it_found(tmp_path, capsys):
    config = tmp_path / "config.py"
    config.write_text("from tests.test_plan import SMALL as experiment\n")
    output, folder = tmp_path / "plan.json", tmp_path / "programs"
    arguments = ["plan", str(config), "--batch-size", "4", "--output", str(output)]
    assert cli.main([*arguments, "--save-hlo", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert "second step" in shown and "4 x 64" in shown and "KiB" in shown
    programs = json.loads(output.read_text())["programs"]
    assert [one["rows"] for one in programs] == [4, 8]
    assert all(one["fits"] and one["flops"] >= one["model_flops"] for one in programs)
    assert {path.name for path in folder.iterdir()} == {
        "second-step-64.txt",
        "second-scorer-64.txt",
    }
    assert (folder / "second-step-64.txt").read_text().startswith("HloModule")


def test_the_command_says_what_it_is_for(capsys):
    assert cli.main(["plan", "--help"]) == 0
    assert "--topology v5e:4x4" in capsys.readouterr().out
    assert cli.main(["plan"]) == 2


def test_without_its_compiler_a_slice_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'regjax\[tpu\]'"):
        topology.tpu_devices("v5e:4x4")
