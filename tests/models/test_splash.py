"""Splash attention: its values and gradients, and what the TPU compiler makes of it."""

import dataclasses
import functools
import importlib.util
import json
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from regjax import compilation, models, topology
from regjax.models import splash
from regjax.models.attention import attend, causal_mask
from regjax.sharding import AXES


def rows(batch, length, heads, key_heads, size, dtype=jnp.float32):
    """Queries, keys, values, weights of the outputs, and packed segments with padding at both ends."""
    random = np.random.default_rng(0)
    shapes = [(batch, length, count, size) for count in (heads, key_heads, key_heads, heads)]
    arrays = [jnp.asarray(random.normal(size=shape), dtype) for shape in shapes]
    starts = random.random((batch, length)) < 0.03
    segment_ids = np.cumsum(starts, axis=1)
    segment_ids[:, -5:] = 0
    return arrays, jnp.asarray(segment_ids, jnp.int32)


def value_and_gradients(function, arrays):
    *inputs, weights = arrays

    def total(*inputs):
        mixed = function(*inputs)
        return jnp.sum(mixed.astype(jnp.float32) * weights), mixed

    return jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))(*inputs)


def close(ours, theirs, tolerance):
    """Largest differences in units of each array's largest entry."""
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        one, other = np.asarray(one, np.float32), np.asarray(other, np.float32)
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * np.abs(other).max())


@pytest.mark.parametrize(
    "shape, window, soft_cap",
    [
        ((2, 128, 4, 2, 8), None, None),
        ((2, 200, 4, 1, 16), 7, 3.0),
        ((1, 640, 2, 2, 6), 150, None),
        ((1, 256, 6, 3, 32), None, 5.0),
        ((3, 5, 2, 1, 8), 2, None),
    ],
    ids=str,
)
def test_splash_equals_attention_by_its_formula(shape, window, soft_cap):
    arrays, segment_ids = rows(*shape)
    options = {"scale": 0.3, "soft_cap": soft_cap}
    ours = value_and_gradients(
        lambda *heads: splash.attend(*heads, segment_ids, window=window, interpret=True, **options),
        arrays,
    )
    mask = causal_mask(segment_ids, window)
    theirs = value_and_gradients(lambda *heads: attend(*heads, mask, **options), arrays)
    close(ours, theirs, 1e-5)


def test_splash_in_bfloat16_rounds_little():
    arrays, segment_ids = rows(2, 256, 4, 2, 64)
    options = {"scale": 0.1, "soft_cap": None}
    exact = value_and_gradients(
        lambda *heads: attend(*heads, causal_mask(segment_ids), **options), arrays
    )
    low = [array.astype(jnp.bfloat16) for array in arrays]
    rounded = value_and_gradients(
        lambda *heads: splash.attend(*heads, segment_ids, window=None, interpret=True, **options),
        low,
    )
    (_, mixed), gradients = rounded
    assert {leaf.dtype for leaf in (mixed, *gradients)} == {jnp.dtype(jnp.bfloat16)}
    # Inputs, scaled queries, weights and results are rounded by 2^-9 each.
    close((mixed, gradients), (exact[0][1], exact[1]), 2**-9 * 8)


TINY = models.DecoderConfig(
    vocabulary_size=31,
    width=16,
    layers=3,
    heads=4,
    key_value_heads=2,
    head_dim=8,
    mlp_width=20,
    initializer_scale=0.3,
    attention_pattern=("local", "global"),
    sliding_window=3,
    local_rope_theta=50.0,
    attention_soft_cap=5.0,
)


@pytest.mark.parametrize("remat, scan", [("none", True), ("dots", True), ("full", False)])
def test_a_decoder_with_splash_is_the_same_function(remat, scan, monkeypatch):
    apply, params = models.split(models.create(TINY, 1))
    config = dataclasses.replace(
        TINY, attention="splash", rematerialisation=remat, scan_layers=scan
    )
    other, _ = models.split(models.create(config, 1))
    tokens = np.random.default_rng(0).integers(0, 31, (2, 10))
    segment_ids = np.array([[0, 0, 0, 1, 1, 1, 1, 2, 2, 2], [1, 1, 1, 1, 1, 2, 2, 3, 0, 0]])

    def loss(params, apply):
        logits = apply(params, tokens, segment_ids=segment_ids)
        return jnp.sum(jnp.where(segment_ids[..., None] > 0, jnp.sin(logits), 0))

    by_formula = jax.jit(jax.value_and_grad(loss), static_argnums=1)(params, apply)
    monkeypatch.setattr(splash, "attend", functools.partial(splash.attend, interpret=True))
    by_kernel = jax.jit(jax.value_and_grad(loss), static_argnums=1)(params, other)
    close(by_kernel, by_formula, 1e-5)


def test_a_mesh_changes_nothing():
    done = subprocess.run(
        [sys.executable, "-m", "tests.models.splash_on_four_devices"],
        env={**os.environ, "JAX_NUM_CPU_DEVICES": "4", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert max(json.loads(done.stdout)) < 1e-6


@pytest.fixture
def tpu_devices():
    """Four chips that need not be there: the compiler is libtpu's own."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu, the TPU compiler, is not installed (pip install regjax[tpu])")
    with compilation.not_kept():
        yield np.array(topology.tpu_devices("v5e:2x2"))


@pytest.mark.parametrize(
    "axes, attention, changes, kernels",
    [
        # A forward pass, and two backward: of queries, and of keys and values.
        ((2, 1, 2), "auto", {"rematerialisation": "none"}, 3),
        ((1, 2, 2), "auto", {"rematerialisation": "dots"}, 3),
        # The forward pass twice.
        ((4, 1, 1), "auto", {"rematerialisation": "full"}, 4),
        # More parts than key heads; a branch for each kind of layer.
        ((1, 1, 4), "auto", {"rematerialisation": "none", "local": True}, 6),
        ((2, 1, 2), "xla", {"rematerialisation": "none"}, 0),
    ],
)
def test_compiled_for_a_tpu_no_scores_are_kept(tpu_devices, axes, attention, changes, kernels):
    architecture = models.DecoderConfig(
        width=64, layers=3, heads=4, key_value_heads=2, head_dim=32, mlp_width=64
    )
    if changes.pop("local", False):
        architecture = dataclasses.replace(
            architecture,
            attention_pattern=("local", "global"),
            sliding_window=100,
            attention_soft_cap=30.0,
        )
    execution = models.Execution(attention=attention, **changes)
    config = models.resolve_execution(architecture, execution, "tpu").config
    apply, _ = models.split(nnx.eval_shape(lambda: models.create(config, 0)))
    mesh = Mesh(tpu_devices.reshape(axes), AXES, axis_types=(AxisType.Auto,) * 3)

    def shape(leaf, *spec):
        return jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec))
        )

    params = jax.eval_shape(lambda: models.split(models.create(config, 0))[1])
    rows = shape(np.zeros((8, 384), np.int32), ("data", "fsdp"))

    @jax.jit
    @jax.grad
    def gradient(params, tokens, segment_ids):
        return jnp.sum(jnp.square(apply.hidden(params, tokens, segment_ids=segment_ids)))

    with jax.set_mesh(mesh):
        compiled = gradient.lower(jax.tree.map(shape, params), rows, rows).compile()
    text = compiled.as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == kernels
    # Nothing of L x L, be it a mask.
    assert bool(re.search(r"\[(\d+,)*384,(\d+,)*384[,\]]", text)) == (attention == "xla")
