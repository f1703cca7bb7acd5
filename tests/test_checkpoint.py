"""Checkpoints: what comes back is what was saved, or an error that says why not."""

import gc
import math
import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from regjax import InputError, checkpoint, sharding
from tests.kills import ROOT

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


def saved(folder, states, losses=None, **options):
    with checkpoint.open_manager(folder, **options) as manager:
        for step, value in states.items():
            metrics = {"loss": losses[step]} if losses else None
            checkpoint.save(manager, step, value, {"step": step, "sum": 0.1 + 0.2}, metrics)


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
    with checkpoint.open_manager(tmp_path, keep_latest=6) as manager:
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


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"keep_latest": 1}, [9]),
        ({"keep_latest": 3}, [7, 8, 9]),
        ({"keep_latest": 1, "keep_every": 4}, [4, 8, 9]),
        ({"keep_latest": 1, "select": "loss", "keep_best": 3}, [1, 3, 5, 9]),
        ({"keep_latest": 2, "select": "loss", "keep_best": 2, "keep_every": 6}, [3, 5, 6, 8, 9]),
    ],
)
def test_what_is_kept(tmp_path, options, kept):
    """Of losses 0.2 at 5, 0.3 at 3, 0.4 at 1 and worse after them."""
    losses = dict(zip(range(1, 10), [0.4, 0.9, 0.3, 0.8, 0.2, 0.7, 0.6, 0.5, 0.95], strict=True))
    saved(tmp_path, dict.fromkeys(losses, state()), losses, **options)
    assert sorted(int(path.name) for path in tmp_path.iterdir()) == kept


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
def test_where_the_newest_is_damaged_the_one_before_is_used(tmp_path, capsys, kind):
    """Each file of the newest checkpoint in turn: the right arrays come back, old or new."""
    saved(tmp_path / "whole", {2: state(0), 5: state(1)}, {2: 0.5, 5: 0.25}, select="loss")
    count = len(files_of(tmp_path / "whole" / "5"))
    steps = []
    for index in range(count):
        folder = tmp_path / f"{kind}-{index}"
        shutil.copytree(tmp_path / "whole", folder)
        damage(files_of(folder / "5")[index], kind)
        with checkpoint.open_manager(folder, select="loss") as manager:
            found, data = checkpoint.restore(manager, state(5))
            steps.append(data["step"])
            assert_same(found, state({2: 0, 5: 1}[data["step"]]))
            assert data == {"step": steps[-1], "sum": 0.1 + 0.2}
            assert (manager.latest_step(), manager.best_step()) == (steps[-1], steps[-1])
            said = capsys.readouterr().err
            if steps[-1] == 2:
                assert "step 5" in said and "from step 2" in said and f"{folder}/5.damaged" in said
                assert (folder / "5.damaged").is_dir()
                # As a run that goes on will do.
                checkpoint.save(manager, 5, state(1), {"step": 5}, {"loss": 0.25})
            else:
                assert said == ""
        with checkpoint.open_manager(folder, select="loss") as manager:
            assert sorted(manager.all_steps()) == [2, 5] and manager.best_step() == 5
            assert_same(checkpoint.restore(manager, state(5))[0], state(1))
    assert steps.count(2) >= 3
    gc.collect()


@failing_reads
def test_no_flipped_byte_goes_unnoticed(tmp_path, capsys):
    """Bytes all over the file with the arrays' values and over that with the position in the data."""
    saved(tmp_path, {2: state(0)})
    largest = max(files_of(tmp_path / "2" / "state"), key=lambda path: path.stat().st_size)
    for path, every in ((largest, 40), (tmp_path / "2" / "data" / "metadata", 5)):
        content = path.read_bytes()
        noticed = 0
        for place in range(0, len(content), every):
            changed = bytes([content[place] ^ (1 << place % 8)])
            path.write_bytes(content[:place] + changed + content[place + 1 :])
            with checkpoint.open_manager(tmp_path) as manager:
                try:
                    found, data = checkpoint.restore(manager, state(5))
                except InputError:
                    noticed += 1
                else:
                    assert_same(found, state(0))
                    assert data == {"step": 2, "sum": 0.1 + 0.2}
        assert noticed > len(content) / every / 2
        path.write_bytes(content)
    gc.collect()


@failing_reads
def test_where_none_is_whole_every_reason_is_given(tmp_path):
    saved(tmp_path, {2: state(0), 5: state(1)})
    for step in (2, 5):
        damage(tmp_path / str(step) / "data" / "metadata", "cut")
    with checkpoint.open_manager(tmp_path) as manager, pytest.raises(InputError) as error:
        checkpoint.restore(manager, state(5))
    for part in ("step 5", "step 2", f"delete {tmp_path} to train the stage anew"):
        assert part in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "5"]


def test_damaged_metrics_are_mended(tmp_path):
    """The best of three, wherever the metrics of one of them are damaged."""
    saved(tmp_path, {1: state(0), 2: state(1), 3: state(2)}, {1: 0.5, 2: 0.25, 3: 0.75},
          select="loss", keep_latest=3)  # fmt: skip
    for step, content in [(1, b'{"loss": 0.1}'), (2, b"\xff"), (2, b'{"loss": 9'), (3, b"{}")]:
        (tmp_path / str(step) / "metrics" / "metrics").write_bytes(content)
        with checkpoint.open_manager(tmp_path, select="loss") as manager:
            assert manager.best_step() == 2
            assert manager.metrics(step) == {"loss": {1: 0.5, 2: 0.25, 3: 0.75}[step]}


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


def test_checksum_sees_a_page_of_zeros():
    """Ones are 127 * 2^23 as words, whose weighted sums would vanish modulo 2^32 over 1,024 of them."""
    ones = jnp.ones((4, 1024))
    totals = {int(checkpoint.checksum({"scale": ones.at[row].set(0)})) for row in range(4)}
    assert len(totals | {int(checkpoint.checksum({"scale": ones}))}) == 5


def test_checksum_is_that_of_numpy():
    """The formula in NumPy's wrapping uint32, for a bfloat16 and a boolean too."""

    def total(words):
        words = words.astype(np.uint32).ravel()
        mixed = words ^ (np.arange(words.size, dtype=np.uint32) * np.uint32(0x9E3779B1))
        mixed = (mixed ^ (mixed >> 16)) * np.uint32(0x85EBCA6B)
        mixed = (mixed ^ (mixed >> 13)) * np.uint32(0xC2B2AE35)
        return int((mixed ^ (mixed >> 16)).sum(dtype=np.uint32))

    a, b = np.array(state()["params"]["a/b"]), np.array([1.5, -2.0], jnp.bfloat16)
    c = np.array([[True], [False]])
    expected = 0
    for index, words in enumerate((a.view(np.uint32), b.view(np.uint16), c.view(np.uint8))):
        expected = (expected * 31 + total(words) + index) % 2**32
    assert int(checkpoint.checksum({"a": a, "b": b, "c": c})) == expected


def test_checksum_moves_no_shards():
    """On eight devices the arrays stay where they are: only sums are added up."""
    code = """
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from regjax import checkpoint, sharding
mesh = sharding.make_mesh(sharding.MeshShape(data=1, fsdp=4, tensor=2))
array = np.random.default_rng(0).standard_normal((16, 24), np.float32)
placed = jax.device_put(array, NamedSharding(mesh, PartitionSpec("tensor", "fsdp")))
assert int(checkpoint.checksum({"a": array})) == int(checkpoint.checksum({"a": placed}))
text = checkpoint.checksum.lower({"a": placed}).compile().as_text()
assert "all-gather" not in text and "all-to-all" not in text and "all-reduce" in text
"""
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "8"}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env=environment)


def test_parameters_of_ones_own_come_back(tmp_path):
    params = {"a/b": jnp.arange(6.0).reshape(2, 3), "c": jnp.ones(2, jnp.bfloat16)}
    (tmp_path / "only").mkdir()
    checkpoint.save_params(tmp_path / "only", params)
    found = checkpoint.load_params(tmp_path, "only")
    assert_same(found, {"a": {"b": params["a/b"]}, "c": params["c"]})
    (tmp_path / "other" / "model").mkdir(parents=True)
    with pytest.raises(InputError, match=r"regjax\.models\.load"):
        checkpoint.load_params(tmp_path, "other")
