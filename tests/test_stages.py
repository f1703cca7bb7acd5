import dataclasses
import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from regjax import optim, paths, sharding
from regjax.errors import InputError
from regjax.objectives import Raft, Sft
from regjax.optim import Optimizer
from regjax.stages import (
    Stage,
    TrainState,
    apply_gradients,
    check_stages,
    init_state,
    make_update,
)
from tests import tiny

APPLY, TREE = tiny.decoder()
PARAMS = paths.flatten(TREE)
SGD = Optimizer("sgd", learning_rate=0.1, schedule="constant", warmup=0.0, clip_norm=0.0, b1=0.0)
ADAMW = Optimizer(learning_rate=1e-2, weight_decay=0.1, epsilon=1e-3)


def mesh_sharding():
    return sharding.replicated(sharding.make_mesh())


def micro_batches(arrays, count):
    return {
        name: jnp.asarray(array.reshape(count, len(array) // count, *array.shape[1:]))
        for name, array in arrays.items()
        if name != "record_ids"
    }


@functools.cache
def unequal_batch():
    """32 rows in four quarters with very different numbers of labels, prompts and weights."""
    shapes = [(2, 1), (4, 12), (12, 4), (6, 8)]
    rows = []
    for seed, (prompt, response) in enumerate(shapes):
        rows += tiny.examples(8, seed, prompt=prompt, response=response)
    # Two padding rows, and one example that is not to count.
    rows[9] = rows[9]._replace(weight=0.0)
    batch = tiny.batch([[] if index in (3, 30) else [row] for index, row in enumerate(rows)])
    labels = batch["label_weights"].reshape(4, -1).sum(1)
    assert labels.max() > 3 * labels.min()
    return batch


def trainer(objective, optimizer, trained=PARAMS, seed=0):
    rule = optim.build(optimizer, 100, trained)
    update = make_update(APPLY, objective, rule, tiny.SINGLE, seed=seed, sharding=mesh_sharding())
    return update, init_state(trained, rule, mesh_sharding())


@functools.cache
def compiled(objective, optimizer):
    return trainer(objective, optimizer)[0]


def run(objective, optimizer, accumulation, steps=1):
    update = compiled(objective, optimizer)
    state = init_state(PARAMS, optim.build(optimizer, 100, PARAMS), mesh_sharding())
    batch = micro_batches(unequal_batch(), accumulation)
    for _ in range(steps):
        state, metrics = update(state, {}, batch)
    return state, {name: np.asarray(value) for name, value in metrics.items()}


def assert_same_params(found, expected, tolerance):
    """To `tolerance` of each parameter array's largest entry."""
    for path, other in expected.items():
        largest = float(jnp.abs(other).max())
        np.testing.assert_allclose(found[path], other, rtol=0, atol=tolerance * largest)


each_objective = pytest.mark.parametrize("objective", [Sft(), Raft()], ids=["sft", "raft"])


@each_objective
def test_32_rows_equal_4_times_8(objective):
    state, metrics = run(objective, SGD, 1)
    accumulated, summed = run(objective, SGD, 4)
    assert metrics.keys() == summed.keys() >= {"loss", "gradient_norm", "bad"}
    for name in metrics:
        np.testing.assert_allclose(summed[name], metrics[name], rtol=1e-6, err_msg=name)
    moved = {path: state.params[path] - PARAMS[path] for path in PARAMS}
    assert min(float(jnp.abs(leaf).max()) for leaf in moved.values()) > 1e-5
    for path, after in state.params.items():
        np.testing.assert_allclose(
            accumulated.params[path], after, rtol=1e-6, atol=1e-7, err_msg=path
        )


def test_a_mean_of_micro_batch_means_would_be_seen():
    """The control of the test above: what the usual mistake gives differs by far more."""
    _, metrics = run(Sft(), SGD, 1)
    batch = micro_batches(unequal_batch(), 4)
    means = []
    for index in range(4):
        quarter = {name: array[index] for name, array in batch.items()}
        total, weight = Sft()(APPLY, TREE, quarter, jax.random.key(0), tiny.SINGLE)["loss"]
        means.append(total / weight)
    loss = metrics["loss"][0] / metrics["loss"][1]
    assert abs(np.mean(means) / loss - 1) > 1e-3


@each_objective
def test_32_rows_equal_4_times_8_over_steps_of_adamw(objective):
    """Adam divides each entry's rounding error (1e-7 of the largest) by its own size plus epsilon,
    1e-3 here, so the errors of a step are at most 1e-4 of the learning rate of 1e-2."""
    state, metrics = run(objective, ADAMW, 1, steps=4)
    accumulated, summed = run(objective, ADAMW, 4, steps=4)
    np.testing.assert_allclose(summed["loss"], metrics["loss"], rtol=1e-5)
    np.testing.assert_allclose(summed["gradient_norm"], metrics["gradient_norm"], rtol=1e-5)
    for path, after in state.params.items():
        assert float(jnp.abs(after - PARAMS[path]).max()) > 1e-3
        np.testing.assert_allclose(accumulated.params[path], after, rtol=0, atol=1e-6)


def test_a_step_of_sgd_is_minus_rate_times_the_gradient_of_the_average():
    state, metrics = run(Raft(), SGD, 1)

    def average(params):
        batch = tiny.on_device(unequal_batch())
        total, weight = Raft()(
            APPLY, paths.unflatten(params), batch, jax.random.key(0), tiny.SINGLE
        )["loss"]
        return total / weight

    grads = jax.jit(jax.grad(average))(PARAMS)
    np.testing.assert_allclose(metrics["gradient_norm"], [optax.tree.norm(grads), 1], rtol=1e-5)
    expected = {path: PARAMS[path] - 0.1 * grads[path] for path in PARAMS}
    assert_same_params(state.params, expected, 1e-6)


def test_frozen_parameters_stay_and_have_no_optimizer_state():
    trained, frozen = paths.split_by_patterns(TREE, ["^layers/mlp", "final_norm"])
    before = {path: np.array(leaf) for path, leaf in frozen.items()}
    update, state = trainer(Raft(), ADAMW, trained)
    moments = [leaf for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim]
    assert sum(leaf.size for leaf in moments) == 2 * sum(leaf.size for leaf in trained.values())
    batch = micro_batches(unequal_batch(), 2)
    for _ in range(3):
        state, _ = update(state, frozen, batch)
    assert set(state.params) == set(trained)
    assert all(np.any(state.params[path] != leaf) for path, leaf in trained.items())
    for path, leaf in frozen.items():
        np.testing.assert_array_equal(leaf, before[path], err_msg=path)


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def poison(batch, place):
    batch = {name: array.copy() for name, array in batch.items()}
    if place == "target":
        batch["scores"][5] = np.nan
    elif place == "weight":
        batch["weights"][5] = np.nan
    elif place == "infinite weight":
        batch["weights"][5] = np.inf
    return batch


@pytest.mark.parametrize("place", ["target", "weight", "infinite weight", "parameter"])
def test_what_is_not_finite_changes_nothing_but_the_step(place):
    trained, frozen = paths.split_by_patterns(TREE, ["^layers"])
    update, state = trainer(Raft(), ADAMW, trained)
    good = micro_batches(unequal_batch(), 4)
    state, metrics = update(state, frozen, good)
    assert metrics["bad"][0] == 0
    before = bits((state.params, state.optimizer))
    sick = frozen
    if place == "parameter":
        sick = {**frozen, "head/kernel": frozen["head/kernel"].at[0, 0].set(jnp.nan)}
    state, metrics = update(state, sick, micro_batches(poison(unequal_batch(), place), 4))
    np.testing.assert_array_equal(metrics["bad"], [1, 1])
    assert int(state.step) == 2
    assert bits((state.params, state.optimizer)) == before
    state, metrics = update(state, frozen, good)
    assert metrics["bad"][0] == 0 and np.isfinite(metrics["loss"]).all()
    assert bits(state.params) != before[: len(trained)]


@pytest.mark.parametrize("sick", [False, True])
@pytest.mark.parametrize("vmapped", [False, True])
def test_a_branch_gives_what_a_selection_gives(sick, vmapped):
    rule = optim.build(dataclasses.replace(SGD, b1=0.9), 100, PARAMS)
    grads = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.5, jnp.float32), PARAMS)
    if sick:
        grads["head/kernel"] = grads["head/kernel"].at[0, 0].set(jnp.inf)
    sums = {"loss": (jnp.float32(8), jnp.float32(4))}
    start = PARAMS, rule.init(PARAMS), grads

    def update(branch):
        def one(params, state, grads):
            return apply_gradients(rule, params, state, grads, sums, branch=branch)

        if not vmapped:
            return jax.jit(one)(*start)
        twice = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), start)
        return jax.jit(jax.vmap(one))(*twice)

    found, expected = update(True), update(False)
    for leaf, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(leaf, other, rtol=1e-6, atol=1e-7)
    assert np.all(found[2]["bad"][..., 0] == sick)
    if sick and not vmapped:
        assert bits(found[:2]) == bits(start[:2])


def test_a_batch_without_weight_has_a_loss_and_a_gradient_of_zero():
    update, state = trainer(Raft(), SGD)
    state, metrics = update(state, {}, micro_batches(tiny.batch([[], []]), 1))
    for name in ("loss", "gradient_norm", "bad"):
        assert metrics[name][0] == 0
    assert bits(state.params) == bits(dict(PARAMS))


class Counting:
    """An objective that counts how often it is traced."""

    def __init__(self):
        self.calls = 0

    def __call__(self, *args):
        self.calls += 1
        return Raft()(*args)


@pytest.mark.parametrize("accumulation", [1, 4])
def test_the_step_is_compiled_once(accumulation):
    objective = Counting()
    update, state = trainer(objective, ADAMW)
    for seed in range(4):
        rows = [[example] for example in tiny.examples(8, seed)]
        state, _ = update(state, {}, micro_batches(tiny.batch(rows), accumulation))
        if seed == 0:
            once = objective.calls
    assert objective.calls == once
    assert int(state.step) == 4


def test_the_state_is_donated_and_nothing_else():
    trained, frozen = paths.split_by_patterns(TREE, ["^layers"])
    update, state = trainer(Raft(), ADAMW, trained)
    batch = micro_batches(tiny.batch([[example] for example in tiny.examples(8)]), 1)
    after, _ = update(state, frozen, batch)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((state.params, state.optimizer)))
    kept = jax.tree.leaves((after, frozen, trained, batch))
    assert not any(leaf.is_deleted() for leaf in kept)


def noise(model, params, batch, key, codec):
    """An objective whose second entry is random and whose loss is a parameter's sum."""
    drawn = jax.random.normal(key)
    total = params["a"].sum() * batch["weights"].sum()
    return {"loss": (total, batch["weights"].sum()), "noise": (drawn, jnp.float32(1))}


def noises(seed, first, count, accumulation=1):
    params = {"a": jnp.ones(3)}
    update, state = trainer(noise, SGD, params, seed=seed)
    state = TrainState(state.params, state.optimizer, jnp.int32(first))
    batch = {"weights": jnp.ones((accumulation, 2, 1))}
    found = []
    for _ in range(count):
        state, metrics = update(state, {}, batch)
        found.append(float(metrics["noise"][0]))
    return found


def test_randomness_is_a_function_of_seed_and_step():
    drawn = noises(0, 0, 5)
    assert len(set(drawn)) == 5
    assert noises(0, 3, 2) == drawn[3:]
    assert not set(noises(1, 0, 5)) & set(drawn)


def test_micro_batches_have_keys_of_their_own():
    key = jax.random.fold_in(jax.random.key(0), 7)
    expected = sum(jax.random.normal(jax.random.fold_in(key, index)) for index in range(3))
    np.testing.assert_allclose(noises(0, 7, 1, accumulation=3), [expected], rtol=1e-6)


def test_bfloat16_parameters_have_float32_gradients_and_moments():
    params = {path: leaf.astype(jnp.bfloat16) for path, leaf in PARAMS.items()}
    objective = Counting()
    update, state = trainer(objective, ADAMW, params)
    types = [leaf.dtype for leaf in jax.tree.leaves(state)]
    batch = micro_batches(tiny.batch([[example] for example in tiny.examples(8)]), 2)
    for step in range(3):
        state, metrics = update(state, {}, batch)
        if step == 0:
            once = objective.calls
    assert objective.calls == once
    assert [leaf.dtype for leaf in jax.tree.leaves(state)] == types
    assert {leaf.dtype for leaf in state.params.values()} == {jnp.dtype("bfloat16")}
    moments = {leaf.dtype for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim}
    assert moments == {jnp.dtype("float32")}
    assert metrics["bad"][0] == 0


def test_one_device_equals_eight(tmp_path):
    """Eight in a process of their own, since the number of devices is fixed when jax starts."""
    path = tmp_path / "eight.npz"
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"}
    root = Path(__file__).resolve().parents[1]
    subprocess.run(
        [sys.executable, "-c", ON_EIGHT_DEVICES, str(path)], env=environment, cwd=root, check=True
    )
    eight = dict(np.load(path))
    for name, objective in {"sft": Sft(), "raft": Raft()}.items():
        state, metrics = run(objective, SGD, 4)
        for key, value in {**metrics, **state.params}.items():
            np.testing.assert_allclose(
                eight.pop(f"{name}/{key}"), value, rtol=1e-6, atol=1e-7, err_msg=f"{name} {key}"
            )
    assert not eight


ON_EIGHT_DEVICES = """
import sys
import jax
import numpy as np
from regjax import sharding
from regjax.objectives import Raft, Sft
from regjax.stages import init_state
from tests.test_stages import PARAMS, SGD, compiled, micro_batches, optim, unequal_batch

assert jax.device_count() == 8
mesh = sharding.make_mesh()
everywhere = sharding.replicated(mesh)
batch = jax.device_put(micro_batches(unequal_batch(), 4), sharding.by_row(mesh, axis=1))
assert len(batch["tokens"].addressable_shards) == 8
assert batch["tokens"].addressable_shards[0].data.shape == (4, 1, 24)
found = {}
for name, objective in (("sft", Sft()), ("raft", Raft())):
    state = init_state(PARAMS, optim.build(SGD, 100, PARAMS), everywhere)
    state, metrics = compiled(objective, SGD)(state, {}, batch)
    assert state.step.sharding.is_fully_replicated
    found |= {f"{name}/{key}": value for key, value in {**metrics, **state.params}.items()}
np.savez(sys.argv[1], **{key: np.asarray(value) for key, value in found.items()})
"""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": ""}, "stage name ''"),
        ({"name": "a/b"}, "stage name 'a/b': use letters"),
        ({"name": "initial"}, "neither 'previous' nor 'initial'"),
        ({"name": "first"}, "two stages are named 'first'"),
        ({"start": "third"}, "starts from 'third'; known: previous, initial, first"),
        ({"objective": "raft"}, "'second': its objective is not callable"),
        ({"decisions": ("mean", "average")}, "unknown read-out 'average'; known: mean, norm"),
        ({"decisions": "mean"}, "decisions is the string 'mean'; expected a tuple"),
        ({"trainable": "^layers"}, "trainable is the string '.layers'; expected a tuple"),
        ({"trainable": ()}, "'second': trainable is empty"),
    ],
)
def test_stages_that_cannot_be_run_are_refused(changes, message):
    stages = Stage("first", Sft()), Stage("second", Raft(), start="first")
    check_stages(stages)
    with pytest.raises(InputError, match=message):
        check_stages((stages[0], dataclasses.replace(stages[1], **changes)))


def test_an_empty_list_of_stages_is_refused():
    with pytest.raises(InputError, match="has no stages"):
        check_stages(())
