"""Chunks of steps of image models as the TPU compiler compiles them, for a slice that is not here."""

import importlib.util

import jax
import numpy as np
import pytest

from regjax import hlo, hlo_costs, optim, sharding, topology
from regjax.classification import program
from regjax.data.images import Augmentation
from regjax.models import vision
from regjax.objectives.classification import CrossEntropy, Facts, Robust
from tests.classification.small import OPTIMIZER

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu, the TPU compiler, is not installed (pip install 'regjax[tpu]')",
)

IMAGES, HELD_OUT, STEPS, ROWS = 256, 50, 8, 64


def compiled(config, shape, runs, augmentation, objective):
    mesh = sharding.make_mesh(devices=topology.tpu_devices("v5e:2x2"))
    everywhere = sharding.replicated(mesh)
    model = vision.build(config, shape, 10)
    params, statistics = jax.eval_shape(model.init, jax.random.key(0))
    rule = optim.build(OPTIMIZER, 100, params)

    def array(shape, dtype, place=everywhere):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    def of_runs(tree):
        return jax.tree.map(lambda leaf: array((runs, *leaf.shape), leaf.dtype), tree)

    given, extras = {}, ()
    if isinstance(objective, Robust):
        labels = np.arange(IMAGES) % 10
        facts = Facts(
            num_classes=10, counts=np.bincount(labels), noise_matrix=np.eye(10), labels=labels,
            held_out_labels=labels[:HELD_OUT], teacher_logits=None, held_out_teacher_logits=None, seed=0,
        )  # fmt: skip
        given = jax.tree.map(np.asarray, objective.given(facts))
        extras = jax.eval_shape(objective.initial, given)
    state = program.ClassifierState(
        program.RunState(
            of_runs(params), of_runs(statistics), of_runs(jax.eval_shape(rule.init, params)),
            of_runs(extras), (),
        ),
        array((), np.int32),
    )  # fmt: skip
    own = program.Own(
        jax.tree.map(lambda _: array((runs,), np.float32), objective), of_runs(given),
        array((runs, IMAGES), np.int32), None, (), {"labels": array((runs, HELD_OUT), np.int32)},
    )  # fmt: skip
    pixel = array(shape[-1:], np.float32)
    shared = program.Shared(
        array((IMAGES, *shape), np.uint8), pixel, pixel, array((HELD_OUT, *shape), np.uint8)
    )
    rows = everywhere if program.are_dealt_out(runs, mesh) else sharding.by_row(mesh, axis=1)
    update = program.make_chunk(
        model, [], rule, objective, augmentation, num_classes=10, count=runs, by="vmap", order_seed=0,
        average=False, mesh=mesh, eval_batch_size=64,
    )  # fmt: skip
    lowered = update.lower(state, own, shared, array((STEPS, ROWS), np.int32, rows))
    return lowered.compile(), sum(leaf.size for leaf in params.values())


def test_runs_dealt_out_exchange_nothing_but_their_results():
    """Six runs on four chips, one of them three times: each state is gathered once, not once a step."""
    robust = Robust(target="labels", adjust_every=2)
    found, size = compiled(vision.Mlp((32,)), (8, 8, 1), 6, Augmentation(), robust)
    exchanged = hlo_costs.collectives(hlo.parse(found.as_text()))
    assert exchanged and {one.kind for one in exchanged} <= {"all-gather", "all-reduce"}
    assert sum(one.bytes * one.count for one in exchanged) < 1.5 * 4 * 8 * 2 * size


def test_rows_of_one_run_exchange_its_gradients_and_statistics():
    """A residual network with crops, flips, cutout and mixup; images stay on the chips."""
    found, size = compiled(
        vision.CifarResNet(8), (16, 16, 3), 1, Augmentation(2, True, 4, 0.2), CrossEntropy()
    )
    exchanged = hlo_costs.collectives(hlo.parse(found.as_text()))
    summed = sum(one.bytes * one.count for one in exchanged if one.kind == "all-reduce")
    assert 4 * size * STEPS <= summed <= 1.2 * 4 * size * STEPS
