"""Checkpoints: what comes back is what was saved, or an error that says why not."""

import gc
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from regjax import InputError, checkpoint, sharding

# Where a read fails, orbax leaves the coroutines of the other arrays unawaited.
failing_reads = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning", "ignore:coroutine:RuntimeWarning"
)


def state(seed=0, width=7):
    keys = jax.random.split(jax.random.key(seed), 3)
    tree = {
        "params": {
            "a/b": jax.random.normal(keys[0], (5, width)),
            "c": jnp.arange(4, dtype=jnp.int32),
        },
        "optimizer": (jax.random.normal(keys[1], (3,)).astype(jnp.bfloat16), jnp.zeros(())),
    }
    return jax.device_put(tree, sharding.replicated(sharding.make_mesh()))


def assert_same(first, second):
    assert jax.tree.structure(first) == jax.tree.structure(second)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()


def saved(folder, states, **options):
    with checkpoint.open_manager(folder, **options) as manager:
        for step, value in states.items():
            checkpoint.save(manager, step, value, {"step": step, "sum": 0.1 + 0.2})


def test_bits_and_position_come_back(tmp_path):
    saved(tmp_path, {3: state(0), 8: state(1)})
    with checkpoint.open_manager(tmp_path) as manager:
        found, data = checkpoint.restore(manager, state(5))
        assert_same(found, state(1))
        assert data == {"step": 8, "sum": 0.1 + 0.2}
        found, data = checkpoint.restore(manager, state(5), 3)
        assert_same(found, state(0))


def test_restored_arrays_can_be_donated(tmp_path):
    saved(tmp_path, {1: state(0)})
    with checkpoint.open_manager(tmp_path) as manager:
        found, _ = checkpoint.restore(manager, state(5))
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    after = step(found)
    np.testing.assert_array_equal(after["params"]["c"], np.arange(4) + 1)


def test_what_is_saved_is_not_what_comes_later(tmp_path):
    """Saving goes on in the background while the state is donated to the next step."""
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    big = {"x": jnp.zeros((512, 1024))}
    big = jax.device_put(big, sharding.replicated(sharding.make_mesh()))
    with checkpoint.open_manager(tmp_path, keep=6) as manager:
        for number in range(1, 6):
            big = step(big)
            checkpoint.save(manager, number, big, {})
        manager.wait_until_finished()
        for number in range(1, 6):
            found, _ = checkpoint.restore(manager, big, number)
            np.testing.assert_array_equal(found["x"], float(number))


@pytest.mark.parametrize(
    ("largest", "figures", "best", "kept"),
    [
        (False, [3.0, 1.0, 2.0, 4.0, 5.0], 2, [2, 4, 5]),
        (True, [3.0, 9.0, 2.0, 4.0, 5.0], 2, [2, 4, 5]),
        (False, [3.0, math.nan, math.nan, 4.0, 5.0], 1, [1, 4, 5]),
        (True, [3.0, math.nan, None, 2.0, None], 1, [1, 4, 5]),
        (False, [5.0, 4.0, 3.0, 2.0, 1.0], 5, [4, 5]),
        (False, [2.0, None, None, None, 2.0], 5, [4, 5]),
    ],
)
def test_best_and_newest_are_kept(tmp_path, largest, figures, best, kept):
    def open_manager():
        return checkpoint.open_manager(tmp_path, select="mean/rmse", largest=largest)

    with open_manager() as manager:
        for step, figure in enumerate(figures, 1):
            report = None if figure is None else {"mean/rmse": figure}
            checkpoint.save(manager, step, state(), {}, report)
    with open_manager() as manager:
        assert manager.best_step() == best
        assert sorted(manager.all_steps()) == kept


@failing_reads
@pytest.mark.parametrize(
    "other",
    [
        {**state(), "params": {"a/b": state()["params"]["a/b"]}},
        {**state(), "params": {**state()["params"], "d": jnp.zeros(2)}},
        state(width=8),
        {**state(), "optimizer": ()},
    ],
    ids=["fewer", "more", "shape", "optimizer"],
)
def test_another_tree_is_refused(tmp_path, other):
    saved(tmp_path, {4: state()})
    other = jax.device_put(other, sharding.replicated(sharding.make_mesh()))
    with checkpoint.open_manager(tmp_path) as manager, pytest.raises(InputError) as error:
        checkpoint.restore(manager, other)
    assert "step 4" in str(error.value) and str(tmp_path) in str(error.value)
    gc.collect()


def files_of(folder):
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.stat().st_size)


def damage(path, kind):
    content = path.read_bytes()
    if kind == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif kind == "gone":
        path.unlink()
    else:
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 0x55]) + content[middle + 1 :])


@failing_reads
@pytest.mark.parametrize("kind", ["cut", "gone", "flipped"])
def test_a_damaged_checkpoint_is_an_error_and_never_silently_wrong(tmp_path, kind):
    """Each file of the newest checkpoint in turn: the right arrays come back, or an InputError."""
    saved(tmp_path / "whole", {2: state(0)})
    count = len(files_of(tmp_path / "whole" / "2"))
    errors = 0
    for index in range(count):
        folder = tmp_path / f"{kind}-{index}"
        shutil.copytree(tmp_path / "whole", folder)
        damage(files_of(folder / "2")[index], kind)
        try:
            with checkpoint.open_manager(folder) as manager:
                found, data = checkpoint.restore(manager, state(5), 2)
        except InputError as error:
            errors += 1
            assert "step 2" in str(error)
        else:
            assert_same(found, state(0))
            assert data == {"step": 2, "sum": 0.1 + 0.2}
    assert errors >= 2
    gc.collect()


def test_checksum_sees_every_bit():
    params = state()["params"]
    known = int(checkpoint.checksum(params))
    assert known == int(checkpoint.checksum(dict(reversed(params.items()))))
    flipped = np.array(params["a/b"])
    flipped.view(np.uint32)[2, 3] ^= 1
    swapped = np.array(params["a/b"])[::-1]
    others = [{**params, "a/b": jnp.asarray(array)} for array in (flipped, swapped)]
    others.append({"a/x": params["a/b"], "c": params["c"] + 1})
    assert known not in [int(checkpoint.checksum(other)) for other in others]


def test_parameters_of_ones_own_come_back(tmp_path):
    params = {"a/b": jnp.arange(6.0).reshape(2, 3), "c": jnp.ones(2, jnp.bfloat16)}
    (tmp_path / "only").mkdir()
    checkpoint.save_params(tmp_path / "only", params)
    found = checkpoint.load_params(tmp_path, "only")
    assert_same(found, {"a": {"b": params["a/b"]}, "c": params["c"]})
    (tmp_path / "other" / "model").mkdir(parents=True)
    with pytest.raises(InputError, match=r"regjax\.models\.load"):
        checkpoint.load_params(tmp_path, "other")
