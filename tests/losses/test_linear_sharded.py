"""A vocabulary dealt out over devices: the numbers of one device, and no logits that travel.

Run as a program it is what eight devices find, which the tests below run once and read.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from regjax.losses import linear
from regjax.losses.top_k_teacher import teacher_top_k
from regjax.sharding import MeshShape, make_mesh
from regjax.token_grid import TokenGrid

ROWS, D, V = (8, 3), 5, 8 * 37
MESHES = {"tensor": (1, 1, 8), "all": (2, 2, 2), "data": (8, 1, 1)}
LAYOUT = {"chunk": 16, "block": 2}


def losses(hidden, head, labels, where, teacher_hidden, teacher_head, **layout):
    """`[losses, *ROWS]`, with entries of the grid and of the teacher on several devices."""
    codec = TokenGrid.from_ids([0, 36, 37, 295], [1.0, 2.0, 3.0, 5.0])
    layout |= {"where": where}
    kept = teacher_top_k(teacher_hidden @ teacher_head, 4, temperature=2.0)
    found = [
        linear.linear_cross_entropy(
            hidden, head, labels, label_smoothing=0.1, z_loss=0.01, soft_cap=3.0, **layout
        ),
        linear.linear_expected_score(hidden, head, codec, **layout),
        linear.linear_distillation(
            hidden,
            head,
            teacher_hidden,
            teacher_head,
            kind="jensen_shannon",
            temperature=2.0,
            **layout,
        ),
        linear.linear_top_k_distillation(hidden, head, *kept, temperature=2.0, **layout),
    ]
    return jnp.stack(found)


def graded(weights, **layout):
    """Losses `[losses, *ROWS]`, and the gradients of each loss's weighted sum."""

    def loss(hidden, head, weights, *rest):
        found = losses(hidden, head, *rest, **layout)
        return jnp.sum(found * weights), found

    @jax.jit
    def each(hidden, head, *rest):
        # One loss after the other, so that a gradient that is wrong is not hidden by the others.
        found = jax.lax.map(
            lambda w: jax.value_and_grad(loss, (0, 1), has_aux=True)(hidden, head, w, *rest),
            weights,
        )
        return found[0][1][0], found[1]

    return each


def on_eight_devices() -> dict:
    random = np.random.default_rng(0)
    arrays = [
        random.normal(size=(*ROWS, D)),
        random.normal(size=(D, V)),
        random.integers(0, V, ROWS),
        # All of some device's rows, and none of another's.
        (random.random(ROWS) < 0.5) | (np.arange(8) == 0)[:, None],
        random.normal(size=(*ROWS, D)),
        random.normal(size=(D, V)),
    ]
    arrays = [a.astype(np.float32) if a.dtype == np.float64 else a for a in arrays]
    arrays[0][~arrays[3]] = np.nan
    arrays[3][1] = False
    weights = np.eye(4)[:, :, None, None] * random.normal(size=ROWS)
    weights = weights.astype(np.float32)
    found, one = {"devices": jax.device_count()}, graded(weights, **LAYOUT)(*arrays)
    for name, sizes in MESHES.items():
        mesh = make_mesh(MeshShape(*sizes))
        rows, columns = P(("data", "fsdp")), P(None, "tensor")
        specs = (rows, columns, rows, rows, rows, columns)
        placed = [
            jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip(arrays, specs, strict=True)
        ]
        eight = graded(weights, mesh=mesh, **LAYOUT)(*placed)
        values, gradients = (
            [
                float(np.max(np.abs(a - b)) / max(1.0, np.max(np.abs(b))))
                for a, b in zip(jax.tree.leaves(pair[0]), jax.tree.leaves(pair[1]), strict=True)
            ]
            for pair in zip(eight, one, strict=True)
        )
        found[name] = {
            "values": values,
            "gradients": gradients,
            "gathered": gathered(placed, specs, mesh, {"mesh": mesh}),
        }
        if name == "tensor":
            found["gathered without a mesh"] = gathered(placed, specs, mesh, {})
    return found


def gathered(placed, specs, mesh, options) -> list[list[int]]:
    """Shapes of the arrays that are gathered from several devices, in value and gradients."""

    def loss(hidden, head, labels, where, teacher_hidden, teacher_head):
        layout = {"where": where, **LAYOUT, **options}
        return jnp.sum(
            linear.linear_cross_entropy(hidden, head, labels, **layout)
            + linear.linear_distillation(hidden, head, teacher_hidden, teacher_head, **layout)
        )

    outputs = tuple(NamedSharding(mesh, spec) for spec in specs[:2])
    compiled = jax.jit(jax.grad(loss, (0, 1)), out_shardings=outputs).lower(*placed).compile()
    moved = re.findall(r"= (.*?) (?:all-gather|all-to-all|collective-permute)", compiled.as_text())
    shapes = [shape for line in moved for shape in re.findall(r"\[([0-9,]*)\]", line)]
    return [[int(size) for size in shape.split(",") if size] for shape in shapes]


@pytest.fixture(scope="module")
def found():
    done = subprocess.run(
        [sys.executable, "-m", "tests.losses.test_linear_sharded"],
        env={**os.environ, "JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.pop("devices") == 8
    return found


@pytest.mark.parametrize("mesh", MESHES)
def test_eight_devices_give_the_numbers_of_one(found, mesh):
    for name in ("values", "gradients"):
        np.testing.assert_array_less(found[mesh][name], 1e-5, err_msg=name)


@pytest.mark.parametrize("mesh", MESHES)
def test_nothing_is_gathered(found, mesh):
    assert found[mesh]["gathered"] == []


def test_without_a_mesh_the_head_is_gathered(found):
    """What the test above would see."""
    assert [D, V] in found["gathered without a mesh"]


def test_shapes_that_do_not_divide_are_refused():
    mesh = jax.sharding.AbstractMesh((2, 4), ("data", "tensor"))
    hidden, head, labels = (
        np.zeros((4, D), np.float32),
        np.zeros((D, 8), np.float32),
        np.zeros(4, int),
    )
    for arguments, options, message in (
        ((hidden, head[:, :7], labels), {}, "7 columns do not divide among the 4 .*'tensor'"),
        ((hidden[:3], head, labels[:3]), {}, r"rows of shape \(3,\) .* 2 devices .*'data'"),
        ((hidden[0], head, labels[0]), {}, r"rows of shape \(\) do not divide"),
        ((hidden, head, labels), {"axis": "model"}, "axis is 'model'; expected one of .*'data'"),
    ):
        with pytest.raises(ValueError, match=message):
            linear.linear_cross_entropy(*arguments, mesh=mesh, **options)


if __name__ == "__main__":
    print(json.dumps(on_eight_devices()))
