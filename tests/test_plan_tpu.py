"""Steps and scorers as the TPU compiler compiles them, for slices that are not here."""

import importlib.util
import math

import jax
import pytest

from regjax import chips, compiled, hlo, model_flops, models, paths, programs, sharding, topology
from regjax.compiled import Costs
from regjax.models import DecoderConfig, Execution
from regjax.models.lora import Lora, adapter_shapes, with_lora
from regjax.models.prompt import with_prompts
from regjax.objectives import NumberToken, Raft, Sft
from regjax.optim import Optimizer
from regjax.sharding import MeshShape
from regjax.token_grid import TokenGrid

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu, the TPU compiler, is not installed (pip install 'regjax[tpu]')",
)

VOCABULARY, LENGTH, ROWS_A_CHIP = 1280, 256, 2
CONFIG = DecoderConfig(
    vocabulary_size=VOCABULARY, width=128, layers=2, heads=4, key_value_heads=4, head_dim=32,
    mlp_width=384,
)  # fmt: skip
CODEC = TokenGrid.from_ids([10, 11, 12, 13, 14], [1.0, 2.0, 3.0, 4.0, 5.0])
OBJECTIVES = (Sft(), Sft(tokens="all"), Raft(), NumberToken())
TOPOLOGIES = ("v5e:2x2", "v5e:4x4", "v5p:4x4x4", "v6e:4x4")
KERNELS = {(128, 384), (384, 128), (128, 128)}
"""Of a layer; the head and the embedding are those with a vocabulary."""


def plan(name, objective, *, mesh=MeshShape(), extra="", execution=Execution()):
    """What a step (or with no objective the scorer) of the tiny model takes on a slice."""
    devices = topology.tpu_devices(name)
    mesh = sharding.make_mesh(mesh, devices)
    config = models.resolve_execution(CONFIG, execution, "tpu").config
    apply = models.split(jax.eval_shape(lambda: models.create(config, 0)))[0]
    shapes = jax.eval_shape(lambda: paths.flatten(models.split(models.create(config, 0))[1]))
    trainable = (".*",)
    if extra == "lora":
        shapes |= adapter_shapes(Lora(), paths.unflatten(shapes))
        apply, trainable = with_lora(apply, Lora()), ("^lora/",)
    if extra == "soft prompt":
        shapes["soft_prompt/main"] = jax.ShapeDtypeStruct((8, CONFIG.width), "float32")
        apply, trainable = with_prompts(apply, ["main"], after=0), ("^soft_prompt/",)
    places = sharding.place(shapes, mesh, sharding.rules_for(config, mesh))
    params = {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=places[path])
        for path, leaf in shapes.items()
    }
    rows = ROWS_A_CHIP * sharding.row_parts(mesh)
    batch = programs.rows_of(rows, LENGTH, labels=4)
    if objective is None:
        program = programs.scorer("tiny", apply, params, CODEC, batch, mesh, config)
    else:
        program = programs.training_step(
            "tiny", apply, params, trainable, objective, CODEC, Optimizer(), batch, mesh,
            config=config,
        )  # fmt: skip
    chip = chips.find(devices[0].device_kind)
    found = compiled.compile_program(program.lower, program.parts, chip)
    assert isinstance(found, Costs), found.message
    assert 0 < found.memory.total < chip.memory
    return program, found


def shapes_of(found):
    """Every array of a compiled program, without dimensions of 1."""
    module = hlo.parse(found.text)
    return {
        tuple(size for size in shape.dims if size > 1)
        for computation in module.computations.values()
        for one in computation.values()
        for shape in one.shapes
    }


@pytest.mark.parametrize("name", TOPOLOGIES)
@pytest.mark.parametrize("objective", [*OBJECTIVES, None], ids=str)
def test_it_compiles_and_does_what_the_model_needs(name, objective):
    _, found = plan(name, objective, execution=Execution(rematerialisation="none"))
    head_rows = LENGTH if objective == Sft(tokens="all") else 4 if isinstance(objective, Sft) else 1
    once = model_flops.forward(CONFIG, LENGTH, head_rows)
    # The kernels do half of all pairs of queries and keys, and in the backward pass the scores twice.
    attention = once.attention * LENGTH / (LENGTH + 1)
    if objective is None:
        needed = once.kernels + once.head + attention
    else:
        needed = 3 * once.kernels + 3 * once.head + 4.5 * attention
    if isinstance(objective, Sft):
        # Rows of labels are padded to a block, here to twice as many. Of all tokens the program has a
        # branch, not taken, for losses whose cotangents differ: two products for the gradients, and the
        # logits once more for each, since the compiler makes them in a loop of their own.
        extra = 4 if objective.tokens == "all" else 3
        assert needed <= found.flops / ROWS_A_CHIP <= needed + extra * once.head
    else:
        assert found.flops == ROWS_A_CHIP * needed
    kinds = {one.kind for one in found.collectives}
    assert kinds <= (set() if objective is None else {"all-reduce", "collective-permute"})
    if not isinstance(objective, Sft):
        assert max(map(math.prod, shapes_of(found))) < ROWS_A_CHIP * LENGTH * VOCABULARY
        assert not any({LENGTH, VOCABULARY} <= set(shape) for shape in shapes_of(found))
    assert "splash_mha_fwd" in found.text
    assert not any(shape.count(LENGTH) == 2 for shape in shapes_of(found))


@pytest.mark.parametrize("mesh", [MeshShape(1, 4, 1), MeshShape(1, 2, 2), MeshShape(1, 1, 4)])
def test_no_logits_are_gathered_whatever_the_mesh(mesh):
    _, found = plan("v5e:2x2", Raft(), mesh=mesh)
    vocabulary = {VOCABULARY // mesh.tensor, VOCABULARY}
    width = {CONFIG.width, CONFIG.width // mesh.fsdp}
    for one in found.collectives:
        for text in one.operands:
            shape = [int(size) for size in text[text.index("[") + 1 : -1].split(",") if size]
            if vocabulary & set(shape) and not width & set(shape):
                # No part of the table or the head, so logits: of the rows that are scored alone.
                rows = math.prod(shape) // max(vocabulary & set(shape))
                assert rows <= ROWS_A_CHIP * mesh.fsdp
                assert one.kind != "all-gather" or mesh.tensor < 4
    assert max(map(math.prod, shapes_of(found))) < ROWS_A_CHIP * LENGTH * VOCABULARY


@pytest.mark.parametrize("extra", ["", "lora", "soft prompt"])
def test_a_frozen_model_has_no_gradient(extra):
    _, found = plan("v5e:2x2", Raft(), extra=extra)
    module = hlo.parse(found.text)
    made = {
        tuple(size for size in one.shapes[0].dims if size > 1)
        for computation in module.computations.values()
        for one in computation.values()
        if one.opcode == "convolution"
    }
    gradients = made & (KERNELS | {(CONFIG.width, VOCABULARY), (VOCABULARY, CONFIG.width)})
    assert bool(gradients) == (extra == "")
    exchanged = sum(one.bytes for one in found.collectives)
    whole = sum(
        math.prod(leaf.shape) * 4
        for path, leaf in _parts(extra).items()
        if extra == "" or path.startswith(("lora/", "soft_prompt/"))
    )
    # Only gradients of what is trained are added up over chips, and a few scalars.
    assert exchanged <= whole + 1000


def _parts(extra):
    shapes = jax.eval_shape(lambda: paths.flatten(models.split(models.create(CONFIG, 0))[1]))
    if extra == "lora":
        return adapter_shapes(Lora(), paths.unflatten(shapes))
    if extra == "soft prompt":
        return {"soft_prompt/main": jax.ShapeDtypeStruct((8, CONFIG.width), "float32")}
    return shapes


def test_a_step_that_does_not_fit_says_how_much_it_needs():
    """Activations of one row too long, so that the compiler has to say so."""
    devices = topology.tpu_devices("v5e:2x2")
    where = jax.sharding.NamedSharding(sharding.make_mesh(devices=devices), jax.P())
    x = jax.ShapeDtypeStruct((200_000, 1024), "bfloat16", sharding=where)
    square = jax.jit(lambda x: jax.numpy.sin(x @ x.T) @ x)
    found = compiled.compile_program(lambda: square.lower(x), {"x": x}, chips.V5E)
    assert isinstance(found, compiled.DoesNotFit)
    # The compiler keeps a quarter of a GiB of a v5e's 16 to itself.
    assert found.memory in (chips.V5E.memory, chips.V5E.memory - 2**28)
    assert found.needed >= 2 * 200_000**2


def test_arguments_that_cannot_fit_are_not_compiled():
    where = jax.sharding.NamedSharding(sharding.make_mesh(), jax.P())
    x = jax.ShapeDtypeStruct((2**34,), "uint8", sharding=where)
    found = compiled.compile_program(lambda: pytest.fail("compiled"), {"x": x, "y": x}, chips.V5E)
    assert isinstance(found, compiled.DoesNotFit)
    assert (found.needed, found.arguments) == (2**35, {"x": 2**34, "y": 2**34})
    assert not found.message
