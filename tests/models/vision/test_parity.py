"""Two training steps and an evaluation beside torch modules with the same weights."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from regjax.models.vision import (
    CifarResNet,
    Mlp,
    ResNet,
    SmallCnn,
    VisionTransformer,
    build,
)
from tests.models.vision import torch_classifiers as theirs
from tests.models.vision.compiling import quick_jit

CLASSES = 7
RATE = 0.002


def cifar(depth, widen=1, padded=True):
    widths = [16 * widen, 32 * widen, 64 * widen]
    block = functools.partial(theirs.BasicV1, padded=padded)
    counts = [(depth - 2) // 6] * 3
    body = theirs.ResNet(block, 1, widths[0], counts, widths, preactivated=False, imagenet=False)
    return body, widths[-1]


def resnet(block, expansion, counts, preactivated=False, imagenet=True):
    widths = (64, 128, 256, 512)[: len(counts)]
    body = theirs.ResNet(
        block, expansion, 64, counts, widths, preactivated=preactivated, imagenet=imagenet
    )
    return body, expansion * widths[-1]


class Short(ResNet):
    """The first two stages, with two blocks and one: all kinds of blocks, soon compiled."""

    @property
    def plan(self):
        return dataclasses.replace(super().plan, blocks=(2, 1), channels=(64, 128))


# Name: (config, () -> (torch body, width of its features), side of the images, their number)
CASES = {
    "linear": (Mlp(hidden=()), lambda: (theirs.Dense(192, ()), 192), 8, 6),
    "linear without bias": (Mlp(hidden=(), bias=False), lambda: (theirs.Dense(192, ()), 192), 8, 6),
    "mlp": (Mlp(hidden=(40, 30)), lambda: (theirs.Dense(192, (40, 30)), 30), 8, 6),
    "cnn": (
        SmallCnn(channels=(8, 12), hidden=(20,)),
        lambda: (theirs.SmallCnn(14, (8, 12), (20,)), 20),
        14,
        6,
    ),
    "resnet-8 wide B": (
        CifarResNet(8, widen=2, shortcut="B"),
        lambda: cifar(8, widen=2, padded=False),
        16,
        6,
    ),
    "resnet-20": (CifarResNet(20), lambda: cifar(20), 16, 6),
    "resnet-32": (CifarResNet(32), lambda: cifar(32), 16, 6),
    "resnet-56": (CifarResNet(56), lambda: cifar(56), 16, 6),
    "resnet-18": (ResNet(18), lambda: resnet(theirs.BasicV1, 1, (2, 2, 2, 2)), 48, 4),
    "resnet-18 v2": (
        Short(18, version=2, stem="cifar"),
        lambda: resnet(theirs.BasicV2, 1, (2, 1), preactivated=True, imagenet=False),
        16,
        4,
    ),
    "resnet-50": (
        Short(50, stem="cifar"),
        lambda: resnet(theirs.BottleneckV1, 4, (2, 1), imagenet=False),
        16,
        4,
    ),
    "resnet-50 v2": (
        Short(50, version=2),
        lambda: resnet(theirs.BottleneckV2, 4, (2, 1), preactivated=True),
        32,
        4,
    ),
    "vit": (
        VisionTransformer(patch=4, width=24, depth=3, heads=3, mlp_ratio=2),
        lambda: (theirs.Transformer(12, 4, 24, 3, 3, 2), 24),
        12,
        4,
    ),
}


def torch_steps(model, batches, labels):
    model.eval()
    records = {"evaluated": [], "trained": [], "gradients": []}
    with torch.no_grad():
        records["evaluated"].append(model(batches[0]).numpy())
    model.train()
    for images in batches:
        logits = model(images)
        model.zero_grad()
        torch.nn.functional.cross_entropy(logits, labels).backward()
        records["trained"].append(logits.detach().numpy())
        named = [(name, each.grad) for name, each in model.named_parameters()]
        records["gradients"].append(theirs.by_our_paths(named))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= RATE * parameter.grad
    model.eval()
    with torch.no_grad():
        records["evaluated"].append(model(batches[0]).numpy())
    records["statistics"] = theirs.by_our_paths(model.named_buffers())
    return records


def our_steps(classifier, params, statistics, batches, labels):
    @quick_jit
    def evaluate(params, statistics):
        outputs, kept = classifier.apply(params, statistics, batches[0], training=False)
        return outputs.logits, kept

    @quick_jit
    def step(params, statistics, images):
        def loss(params):
            outputs, new = classifier.apply(params, statistics, images, training=True)
            log_probabilities = jax.nn.log_softmax(outputs.logits)
            return -jnp.mean(log_probabilities[jnp.arange(len(labels)), labels]), (outputs, new)

        gradients, (outputs, new) = jax.grad(loss, has_aux=True)(params)
        params = jax.tree.map(lambda p, g: p - RATE * g, params, gradients)
        return params, new, outputs.logits, gradients

    records = {"evaluated": [], "trained": [], "gradients": []}
    logits, kept = evaluate(params, statistics)
    jax.tree.map(np.testing.assert_array_equal, kept, statistics)
    records["evaluated"].append(logits)
    for images in batches:
        params, statistics, logits, gradients = step(params, statistics, images)
        records["trained"].append(logits)
        records["gradients"].append(gradients)
    records["evaluated"].append(evaluate(params, statistics)[0])
    records["statistics"] = statistics
    return records


@pytest.fixture(scope="module", autouse=True)
def one_torch_thread():
    """Small arrays take threads longer to deal out than to compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=CASES)
def records(request):
    config, make_body, side, batch = CASES[request.param]
    body, width = make_body()
    model = theirs.Classifier(body, width, CLASSES, bias=getattr(config, "bias", True))
    theirs.randomise(model)
    images = np.random.default_rng(0).normal(size=(2, batch, side, side, 3)).astype(np.float32)
    labels = np.arange(batch) % CLASSES

    classifier = build(config, (side, side, 3), CLASSES)
    params = theirs.by_our_paths(model.named_parameters())
    statistics = theirs.by_our_paths(model.named_buffers())
    expected_params, expected_statistics = jax.eval_shape(classifier.init, jax.random.key(0))
    shapes = functools.partial(jax.tree.map, np.shape)
    assert shapes(params) == shapes(expected_params)
    assert shapes(statistics) == shapes(expected_statistics)

    ours = our_steps(classifier, params, statistics, images, labels)
    batches = torch.tensor(images).permute(0, 1, 4, 2, 3)
    return ours, torch_steps(model, batches, torch.tensor(labels))


def test_logits(records):
    ours, expected = records
    for mode in ("evaluated", "trained"):
        for step in range(2):
            np.testing.assert_allclose(
                ours[mode][step], expected[mode][step], atol=1e-4, rtol=0, err_msg=f"{mode} {step}"
            )


def test_gradients(records):
    ours, expected = records
    for step in range(2):
        assert ours["gradients"][step].keys() == expected["gradients"][step].keys()
        for path, gradient in expected["gradients"][step].items():
            scale = float(np.abs(gradient).max())
            # What a norm takes out again has no gradient: only rounding is left of it.
            np.testing.assert_allclose(
                ours["gradients"][step][path],
                gradient,
                atol=max(1e-4 * scale, 1e-6),
                rtol=0,
                err_msg=path,
            )


def test_running_statistics_after_two_steps(records):
    ours, expected = records
    assert ours["statistics"].keys() == expected["statistics"].keys()
    for path, statistic in expected["statistics"].items():
        np.testing.assert_allclose(
            ours["statistics"][path], statistic, atol=1e-5, rtol=1e-5, err_msg=path
        )
