import dataclasses
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from regjax import models, optim, paths, sharding
from regjax.errors import InputError
from regjax.models import Lora
from regjax.models.lora import adapter_shapes
from regjax.prepare import prepare
from regjax.sharding import MeshShape
from regjax.stages import abstract_state
from tests import tiny
from tests.mesh_experiment import experiment as mesh_experiment


def mesh_of(*sizes):
    return AbstractMesh(sizes, sharding.AXES, axis_types=(AxisType.Auto,) * 3)


def shapes_of(config):
    return paths.flatten(jax.eval_shape(lambda: models.split(models.create(config, 0))[1]))


def specs(config, mesh):
    placed = sharding.place(shapes_of(config), mesh, sharding.rules_for(config, mesh))
    return {path: where.spec for path, where in placed.items()}


def test_the_mesh_holds_every_device():
    mesh = sharding.make_mesh()
    assert mesh.axis_names == ("data", "fsdp", "tensor")
    assert mesh.devices.size == jax.device_count()
    assert dict(sharding.make_mesh(MeshShape(1, -1)).shape)["fsdp"] == jax.device_count()
    assert sharding.make_mesh(devices=jax.devices()[:1]).size == 1


def test_specifications():
    mesh = sharding.make_mesh()
    assert sharding.replicated(mesh).spec == jax.P()
    assert sharding.by_row(mesh).spec == jax.P(("data", "fsdp"))
    assert sharding.by_row(mesh, axis=1).spec == jax.P(None, ("data", "fsdp"))
    assert sharding.row_parts(mesh_of(2, 3, 4)) == 6


@pytest.mark.parametrize("sizes", [(4096, 1, 1), (-1, 4096, 1), (-1, -1, 1), (0, 1, 1), (-1, 0, 1)])
def test_sizes_that_do_not_make_up_the_devices_are_refused(sizes):
    named = f"data {sizes[0]}, fsdp {sizes[1]}, tensor {sizes[2]}"
    with pytest.raises(InputError, match=f"mesh of {named}: .* the number of devices"):
        sharding.make_mesh(MeshShape(*sizes))


def test_a_decoder_is_dealt_out_over_both_axes():
    config = dataclasses.replace(tiny.CONFIG, key_value_heads=2, attention_bias=True)
    assert specs(config, mesh_of(2, 2, 2)) == {
        "embedding/table": P("tensor", "fsdp"),
        "final_norm/scale": P(),
        "head/kernel": P("fsdp", "tensor"),
        "layers/attention/key/bias": P(None, "tensor"),
        "layers/attention/key/kernel": P(None, "fsdp", "tensor"),
        "layers/attention/output/kernel": P(None, "tensor", "fsdp"),
        "layers/attention/query/bias": P(None, "tensor"),
        "layers/attention/query/kernel": P(None, "fsdp", "tensor"),
        "layers/attention/value/bias": P(None, "tensor"),
        "layers/attention/value/kernel": P(None, "fsdp", "tensor"),
        "layers/attention_norm/scale": P(),
        "layers/mlp/down/kernel": P(None, "tensor", "fsdp"),
        "layers/mlp/gate/kernel": P(None, "fsdp", "tensor"),
        "layers/mlp/up/kernel": P(None, "fsdp", "tensor"),
        "layers/mlp_norm/scale": P(),
    }
    assert set(specs(config, mesh_of(8, 1, 1)).values()) == {P()}


def test_every_parameter_of_the_family_has_a_rule():
    config = dataclasses.replace(
        tiny.CONFIG, attention_bias=True, attention_output_bias=True, mlp_bias=True,
        query_key_norm=True, post_norms=True,
    )  # fmt: skip
    rules = sharding.rules_for(config, mesh_of(2, 2, 2))
    for path in shapes_of(config):
        assert any(paths.matches(path, [pattern]) for pattern, _ in rules), path
    every_matrix = [leaf for leaf in shapes_of(tiny.CONFIG).values() if min(leaf.shape) > 2]
    mesh = mesh_of(1, 4, 2)
    placed = sharding.place(
        shapes_of(tiny.CONFIG), mesh, sharding.rules_for(tiny.CONFIG, mesh)
    ).values()
    assert sum("fsdp" in where.spec for where in placed) >= len(every_matrix) > 0


def test_adapters_go_where_their_kernels_go():
    """A's inputs as the kernel's, B's outputs as the kernel's, ranks whole."""
    config = dataclasses.replace(tiny.CONFIG, key_value_heads=2)
    kernels = shapes_of(config)
    lora = Lora(rank=4, patterns=("/kernel$",))
    adapters = adapter_shapes(lora, paths.unflatten(kernels))
    assert len(adapters) == 2 * 8
    for mesh in (mesh_of(2, 2, 2), mesh_of(1, 1, 2), mesh_of(1, 4, 1)):
        rules = sharding.rules_for(config, mesh)
        found = {path: where.spec for path, where in sharding.place(adapters, mesh, rules).items()}
        for path, leaf in kernels.items():
            if not path.endswith("/kernel"):
                continue
            spec = sharding.place(kernels, mesh, rules)[path].spec
            *stack, inputs, outputs = (*spec, *[None] * (leaf.ndim - len(spec)))
            place = f"lora/{path.removesuffix('/kernel')}"
            whole = [None] * len(stack)
            assert found[f"{place}/a"] == (P(*whole, inputs) if inputs else P())
            assert found[f"{place}/b"] == (P(*whole, None, outputs) if outputs else P())


def test_heads_stay_whole():
    """Two query heads and one of keys: 32 and 16 columns, which would divide."""
    found = specs(tiny.CONFIG, mesh_of(1, 1, 2))
    assert found["layers/attention/query/kernel"] == P(None, None, "tensor")
    assert found["layers/attention/key/kernel"] == P()
    found = specs(tiny.CONFIG, mesh_of(1, 1, 4))
    assert found["layers/attention/query/kernel"] == found["layers/attention/output/kernel"] == P()
    assert found["layers/mlp/down/kernel"] == P(None, "tensor")


def test_what_does_not_divide_stays_whole_and_the_table_says_so():
    config = dataclasses.replace(tiny.CONFIG, vocabulary_size=65)
    mesh = mesh_of(1, 4, 2)
    assert specs(config, mesh)["embedding/table"] == P(None, "fsdp")
    rows = sharding.table(shapes_of(config), mesh, sharding.rules_for(config, mesh))
    by_path = {row["parameter"]: row for row in rows}
    assert by_path["embedding/table"] == {
        "parameter": "embedding/table",
        "shape": "65 x 32",
        "partition": "-, fsdp",
        "bytes a device": 4 * 65 * 32 // 4,
        "does not divide": "65 by tensor 2",
    }
    assert by_path["layers/mlp/up/kernel"]["bytes a device"] == 4 * 2 * 32 * 64 // 8
    assert by_path["layers/mlp/up/kernel"]["does not divide"] == ""
    assert rows[-1]["parameter"] == "all"
    assert rows[-1]["bytes a device"] == sum(row["bytes a device"] for row in rows[:-1])


def test_a_model_without_rules_is_dealt_out_by_its_largest_dimension():
    shapes = {
        "a/kernel": jax.ShapeDtypeStruct((3, 8, 20), jnp.float32),
        "b/kernel": jax.ShapeDtypeStruct((3, 8, 21), jnp.float32),
        "c/kernel": jax.ShapeDtypeStruct((3, 7), jnp.float32),
        "d/bias": jax.ShapeDtypeStruct((8,), jnp.float32),
        "soft_prompt/main": jax.ShapeDtypeStruct((8, 8), jnp.float32),
    }
    mesh = mesh_of(1, 4, 2)
    placed = sharding.place(shapes, mesh, sharding.rules_for(None, mesh))
    assert {path: where.spec for path, where in placed.items()} == {
        "a/kernel": P(None, None, "fsdp"),
        "b/kernel": P(None, "fsdp"),
        "c/kernel": P(),
        "d/bias": P(),
        "soft_prompt/main": P(),
    }


def abstract(config, mesh):
    shapes = shapes_of(config)
    placed = sharding.place(shapes, mesh, sharding.rules_for(config, mesh))
    return {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed[path])
        for path, leaf in shapes.items()
    }


@pytest.mark.parametrize("grouped", [False, True])
def test_the_optimizers_state_lives_with_its_parameters(grouped):
    """Adamw keeps two arrays of every parameter, each where the parameter is."""
    mesh = mesh_of(1, 4, 2)
    params = abstract(tiny.CONFIG, mesh)
    groups = (optim.ParameterGroup("^embedding", 0.5),) if grouped else ()
    optimizer = optim.build(optim.Optimizer(groups=groups), 10, params)
    state = abstract_state(params, optimizer, mesh)
    assert state.step.sharding == NamedSharding(mesh, P())
    assert {path: leaf.sharding for path, leaf in state.params.items()} == {
        path: leaf.sharding for path, leaf in params.items()
    }
    seen = dict.fromkeys(params, 0)
    for keys, leaf in jax.tree.leaves_with_path(state.optimizer):
        path = getattr(keys[-1], "key", None)
        if path in params:
            seen[path] += 1
            assert leaf.sharding == params[path].sharding
        else:
            assert leaf.shape == () and leaf.sharding.spec == P()
    assert set(seen.values()) == {2}


def test_adafactors_means_live_along_what_is_left_of_their_parameter():
    mesh = mesh_of(1, 4, 2)
    config = dataclasses.replace(tiny.CONFIG, width=128, mlp_width=256, vocabulary_size=192)
    params = abstract(config, mesh)
    optimizer = optim.build(optim.Optimizer("adafactor"), 10, params)
    state = abstract_state(params, optimizer, mesh)
    found = {
        leaf.shape: leaf.sharding.spec
        for keys, leaf in jax.tree.leaves_with_path(state.optimizer)
        if getattr(keys[-1], "key", None) == "layers/mlp/up/kernel" and math.prod(leaf.shape) > 1
    }
    # The parameter is [2, 128, 256] as (None, fsdp, tensor).
    assert found == {(2, 128): P(None, "fsdp"), (2, 256): P(None, "tensor")}


def test_the_mesh_is_known_inside_a_traced_function():
    mesh = mesh_of(2, 1, 4)
    seen = []

    def function(x):
        with sharding.known_inside(mesh):
            seen.append(sharding.current_mesh(64))
            seen.append(sharding.current_mesh(66))
        seen.append(sharding.current_mesh())
        return x

    jax.eval_shape(function, 1.0)
    assert seen == [mesh, None, None]
    with sharding.known_inside(mesh_of(1, 1, 1)):
        assert sharding.current_mesh() is None


@pytest.mark.parametrize("sizes", [(1, 2, 1), (2, 1, 2)])
def test_pmap_replicates(tmp_path, sizes):
    run = dataclasses.replace(mesh_experiment, parallelism="pmap")
    with pytest.raises(InputError, match=r"leave mesh.fsdp and mesh.tensor at 1"):
        prepare(run, tmp_path, mesh=mesh_of(*sizes))


ON_EIGHT_DEVICES = """
import jax
import numpy as np
from regjax import checkpoint, losses, sharding
from regjax.initial import initial_model
from regjax.sharding import MeshShape
from tests.mesh_experiment import experiment

tokenizer = range(300)
meshes = {
    sizes: sharding.make_mesh(MeshShape(*sizes), jax.devices()[: np.prod(sizes)])
    for sizes in [(1, 1, 1), (8, 1, 1), (1, 1, 2), (1, 3, 1), (1, 2, 4), (2, 2, 2)]
}
runs = {sizes: initial_model(experiment, tokenizer, None, mesh) for sizes, mesh in meshes.items()}
one = runs[1, 1, 1][1]
assert one["embedding/table"].shape == (320, 16)
for sizes, (apply, params, config) in runs.items():
    for path, leaf in params.items():
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(one[path]))
        expected = sharding.place(params, meshes[sizes], sharding.rules_for(config, meshes[sizes]))
        assert leaf.sharding == expected[path]
    shapes = initial_model(experiment, tokenizer, None, meshes[sizes], weights=False)[1]
    assert {p: s.sharding for p, s in shapes.items()} == {p: s.sharding for p, s in params.items()}
    assert int(checkpoint.checksum(params)) == int(checkpoint.checksum(one))
params = runs[2, 2, 2][1]
assert "all-gather" not in checkpoint.checksum.lower(params).compile().as_text()

# A user's model is laid out too, and what an objective learns of the mesh is enough for a loss.
mesh = meshes[2, 2, 2]
given = {"table": np.ones((320, 16), np.float32)}
apply, placed, _ = initial_model(
    experiment, tokenizer, (lambda params, tokens: params["table"][tokens] @ params["table"].T, given), mesh
)
assert placed["table"].sharding.spec == jax.P("fsdp")
draw = np.random.default_rng(0)
hidden, labels = draw.normal(size=(8, 4, 16)).astype("f"), draw.integers(0, 320, (8, 4))
batch = sharding.RowLayout(mesh, 8).put({"hidden": hidden, "labels": labels})

@jax.jit
def loss(head, batch):
    with sharding.known_inside(mesh):
        layout = sharding.current_mesh(head.shape[1])
        assert layout is not None
        return losses.linear_cross_entropy(batch["hidden"], head, batch["labels"], mesh=layout)

head = params["head/kernel"]
expected = losses.linear_cross_entropy(hidden, np.asarray(head), labels)
np.testing.assert_allclose(loss(head, batch), expected, rtol=1e-5)
"""


def test_parameters_are_made_where_they_live_with_the_same_bits_on_every_mesh():
    done = subprocess.run(
        [sys.executable, "-c", ON_EIGHT_DEVICES],
        env={**os.environ, "JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"},
        cwd=Path(__file__).resolve().parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
