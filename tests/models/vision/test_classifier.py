import functools
import json
import math
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from regjax.errors import InputError
from regjax.models.vision import (
    CifarResNet,
    Mlp,
    ResNet,
    SmallCnn,
    VisionTransformer,
    build,
)
from regjax.models.vision.classifier import Network
from regjax.models.vision.layers import Draws
from tests.models.vision.compiling import quick_jit

SHAPE = (8, 8, 3)


def parameters(config, image_shape, classes):
    params, _ = jax.eval_shape(build(config, image_shape, classes).init, jax.random.key(0))
    return sum(math.prod(leaf.shape) for leaf in params.values())


@pytest.mark.parametrize(
    ("config", "image_shape", "classes", "count"),
    [
        (CifarResNet(20), (32, 32, 3), 10, 269_722),
        (CifarResNet(20, shortcut="B"), (32, 32, 3), 10, 272_474),
        (CifarResNet(32), (32, 32, 3), 10, 464_154),
        (CifarResNet(56), (32, 32, 3), 10, 853_018),
        (CifarResNet(110), (32, 32, 3), 10, 1_727_962),
        (ResNet(18), (224, 224, 3), 1000, 11_689_512),
        (ResNet(34), (224, 224, 3), 1000, 21_797_672),
        (ResNet(50), (224, 224, 3), 1000, 25_557_032),
        (ResNet(50, version=2), (224, 224, 3), 1000, 25_549_352),
        (VisionTransformer.tiny(), (224, 224, 3), 1000, 5_717_416),
        (VisionTransformer.small(), (224, 224, 3), 1000, 22_050_664),
        (SmallCnn((32, 64), (128,)), (28, 28, 1), 10, 320 + 18_496 + 7 * 7 * 64 * 128 + 128 + 1290),
        (Mlp((256,)), (28, 28, 1), 10, 784 * 256 + 256 + 2570),
        (Mlp((), bias=False), (1, 6, 1), 3, 18),
    ],
)
def test_parameters_are_as_many_as_published(config, image_shape, classes, count):
    assert parameters(config, image_shape, classes) == count


@pytest.mark.parametrize("depth", [8, 20, 56])
@pytest.mark.parametrize(("widen", "shortcut"), [(1, "B"), (3, "A")])
def test_parameters_of_the_cifar_models_by_formula(depth, widen, shortcut):
    n, first, second, third = (depth - 2) // 6, 16 * widen, 32 * widen, 64 * widen
    convolutions = 27 * first + 9 * (
        2 * n * first**2
        + first * second
        + (2 * n - 1) * second**2
        + second * third
        + (2 * n - 1) * third**2
    )
    norms = 2 * (first + 2 * n * (first + second + third))
    projections = first * second + second * third + 2 * (second + third) if shortcut == "B" else 0
    config = CifarResNet(depth, widen, shortcut)
    assert (
        parameters(config, (32, 32, 3), 10) == convolutions + norms + projections + 10 * third + 10
    )


@pytest.fixture(scope="module")
def small():
    """A classifier with batch norm, and `train(params, statistics, batches)`: steps in one scan."""
    classifier = build(CifarResNet(8), SHAPE, 4)

    def step(state, images):
        def loss(params):
            outputs, new = classifier.apply(params, state[1], images, training=True)
            log_probabilities = jax.nn.log_softmax(outputs.logits)
            return -jnp.mean(log_probabilities[:, 0]), new

        (value, new), gradients = jax.value_and_grad(loss, has_aux=True)(state[0])
        params = jax.tree.map(lambda p, g: p - 0.1 * g, state[0], gradients)
        return (params, new), value

    def train(params, statistics, batches):
        return jax.lax.scan(step, (params, statistics), batches)

    batches = np.random.default_rng(0).normal(size=(2, 4, *SHAPE)).astype(np.float32)
    return classifier, train, batches


def assert_trees_close(ours, expected, atol):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=atol, rtol=1e-4), ours, expected
    )


def test_three_models_side_by_side_are_three_single_ones(small):
    classifier, train, batches = small
    keys = jax.random.split(jax.random.key(1), 3)
    params, statistics = jax.vmap(classifier.init)(keys)
    together = quick_jit(jax.vmap(train, in_axes=(0, 0, None)))(params, statistics, batches)
    alone = quick_jit(train)
    for index, key in enumerate(keys):
        one = classifier.init(key)
        assert_trees_close(jax.tree.map(lambda x, i=index: x[i], (params, statistics)), one, 1e-6)
        expected = alone(*one, batches)
        assert_trees_close(jax.tree.map(lambda x, i=index: x[i], together), expected, 1e-5)
    assert np.ptp(np.asarray(together[1][:, -1])) > 1e-3


def test_evaluation_does_not_depend_on_the_rest_of_the_batch(small):
    classifier, _, batches = small
    params, statistics = classifier.init(jax.random.key(0))
    apply = quick_jit(classifier.apply, static_argnames="training")
    together, kept = apply(params, statistics, batches[0], training=False)
    alone, _ = apply(params, statistics, batches[0][:1], training=False)
    assert_trees_close(jax.tree.map(lambda x: x[:1], together), alone, 1e-5)
    assert_trees_close(kept, statistics, 0)
    head = together.features @ params["head/kernel"] + params["head/bias"]
    np.testing.assert_allclose(together.logits, head, atol=1e-5)


def test_a_batch_dealt_out_over_eight_devices_is_one_batch():
    found = subprocess.run(
        [sys.executable, "-m", "tests.models.vision.on_eight_devices"],
        env={**os.environ, "JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout) < 1e-5


def test_with_zero_residuals_a_network_starts_as_its_shortcuts():
    classifier = build(CifarResNet(8, zero_residual=True), SHAPE, 4)
    params, statistics = classifier.init(jax.random.key(0))
    images = np.random.default_rng(0).normal(size=(2, *SHAPE)).astype(np.float32)
    apply = quick_jit(classifier.apply, static_argnames="training")
    features = apply(params, statistics, images, training=False)[0].features
    kernel = np.asarray(params["body/stem/kernel"], np.float64)
    padded = np.pad(images.astype(np.float64), ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
    stem = np.einsum("bijcuv,uvcd->bijd", windows, kernel) / np.sqrt(1 + 1e-5)
    expected = np.maximum(stem, 0)[:, ::4, ::4].mean(axis=(1, 2))
    np.testing.assert_allclose(features[:, :16], expected, atol=1e-5)
    np.testing.assert_array_equal(features[:, 16:], 0)


def test_with_zero_residuals_a_branch_of_version_two_adds_nothing():
    config = ResNet(18, version=2, stem="cifar", zero_residual=True)
    network = Network(config, SHAPE, 4, Draws(np.ones(12_000_000, np.float32)))
    for block in network.body.blocks:
        first, last = (convolution.kernel[...] for convolution in block.convolutions)
        assert np.all(first) and not np.any(last)


def test_kernels_start_with_the_deviations_of_the_papers():
    params, statistics = build(CifarResNet(8, widen=2), SHAPE, 50).init(jax.random.key(0))
    for path, leaf in params.items():
        values = np.asarray(leaf)
        if path.startswith("body") and path.endswith("kernel"):
            deviation = math.sqrt(2 / (9 * values.shape[-1]))
            assert abs(values.std() / deviation - 1) < 4 / math.sqrt(2 * values.size), path
        elif path == "head/kernel":
            deviation = 1 / math.sqrt(3 * 128)
            assert abs(values.std() / deviation - 1) < 4 / math.sqrt(2 * values.size)
        else:
            np.testing.assert_array_equal(values, 1 if path.endswith("scale") else 0)
    for path, leaf in statistics.items():
        np.testing.assert_array_equal(leaf, 1 if path.endswith("variance") else 0)


@pytest.mark.parametrize(
    "config",
    [
        SmallCnn((8,), (16,), dtype="bfloat16"),
        CifarResNet(8, dtype="bfloat16"),
        VisionTransformer(4, 24, 1, 3, dtype="bfloat16"),
    ],
)
def test_bfloat16_rounds_but_parameters_statistics_and_logits_are_float32(config):
    half = build(config, SHAPE, 4)
    full = build(type(config)(**{**vars(config), "dtype": "float32"}), SHAPE, 4)
    state = half.init(jax.random.key(0))
    images = np.random.default_rng(0).normal(size=(4, *SHAPE)).astype(np.float32)
    results = [
        quick_jit(lambda state, apply=model.apply: apply(*state, images, training=True))(state)
        for model in (half, full)
    ]
    assert {leaf.dtype for leaf in jax.tree.leaves((state, results))} == {jnp.dtype("float32")}
    rounded, exact = (outputs.logits for outputs, _ in results)
    error = float(jnp.abs(rounded - exact).max() / jnp.abs(exact).max())
    assert 1e-5 < error < 0.05


def test_classifiers_that_were_built_alike_are_equal():
    first, second = (build(CifarResNet(8), SHAPE, 4) for _ in range(2))
    assert first == second and hash(first) == hash(second)
    assert first != build(CifarResNet(8), SHAPE, 5)
    assert first.apply != build(CifarResNet(8, shortcut="B"), SHAPE, 4).apply


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CifarResNet(18), "CifarResNet.depth is 18; expected one of 8, 20, 32, 56, 110"),
        (lambda: CifarResNet(20, widen=0), "CifarResNet.widen is 0; expected at least 1"),
        (lambda: CifarResNet(20, shortcut="C"), "CifarResNet.shortcut is 'C'; expected one of 'A'"),
        (lambda: ResNet(101), "ResNet.depth is 101; expected one of 18, 34, 50"),
        (lambda: ResNet(18, version=3), "ResNet.version is 3; expected one of 1, 2"),
        (lambda: ResNet(18, stem="tiny"), "ResNet.stem is 'tiny'"),
        (lambda: Mlp((64, 0)), r"Mlp.hidden is \(64, 0\); expected at least 1"),
        (lambda: SmallCnn(dtype="float16"), "SmallCnn.dtype is 'float16'"),
        (lambda: VisionTransformer(width=100), r"width is 100, not a multiple of heads \(3\)"),
        (lambda: build(ResNet(18), (28, 28, 3), 10), "28 by 28 pixels, too small .* 32 by 32"),
        (lambda: build(CifarResNet(8), (32, 3, 3), 10), "32 by 3 pixels, too small"),
        (lambda: build(SmallCnn((8, 8, 8)), (7, 7, 1), 10), "too small .* 8 by 8"),
        (lambda: build(VisionTransformer(8), (28, 28, 1), 10), r"patch \(8\) does not divide"),
        (lambda: build(Mlp(), (0, 28, 1), 10), r"image_shape is \(0, 28, 1\)"),
        (lambda: build(Mlp(), (28, 28, 1), 0), "num_classes is 0"),
        (lambda: build("resnet", (28, 28, 1), 2), "model is 'resnet'; expected an Mlp"),
    ],
)
def test_models_that_cannot_be_are_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_images_of_another_shape_are_refused():
    classifier = build(Mlp(()), (4, 4, 1), 2)
    params, statistics = classifier.init(jax.random.key(0))
    with pytest.raises(InputError, match=r"shape \(3, 16\).*built for \('B', 4, 4, 1\)"):
        classifier.apply(params, statistics, jnp.ones((3, 16)), training=False)


def test_one_value_a_channel_has_no_variance():
    classifier = build(CifarResNet(8), (4, 4, 3), 2)
    state = jax.eval_shape(classifier.init, jax.random.key(0))
    apply = functools.partial(classifier.apply, training=True)
    with pytest.raises(InputError, match="one value a channel"):
        jax.eval_shape(apply, *state, jnp.ones((1, 4, 4, 3)))
