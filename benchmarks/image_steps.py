"""Training steps of image classifiers on a CPU, beside the same in eager PyTorch.

A step is forward, cross-entropy, backward and SGD with momentum, batches of 128, float32. Ours are those of
`regjax train` and `regjax sweep`, with all that belongs to them: batches are picked from the images and
standardised within the compiled program, and a step that is not finite changes nothing. Torch is given its
batches ready, in its own layout; several runs it trains one after another.

Both sides take turns in one process on the same two cores, with a pause so that the threads of one have
stopped spinning; printed are medians of the time of a step of all runs, and how many times as fast each
way is as torch. Where other programs run, two threads that wait for each other are slowed down many
times, and not both sides alike: `--one-core` gives each side one thread and takes the time of the
processor instead.

    python benchmarks/image_steps.py
    python benchmarks/image_steps.py --one-core --only cnn
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

ONE_CORE = "--one-core" in sys.argv
CORES = sorted(os.sched_getaffinity(0))[-1:] if ONE_CORE else sorted(os.sched_getaffinity(0))[:2]
os.sched_setaffinity(0, CORES)  # before jax counts them for its threads

import jax  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn import functional  # noqa: E402

from regjax import optim, sharding  # noqa: E402
from regjax.classification import program  # noqa: E402
from regjax.cores import one_device_a_core  # noqa: E402
from regjax.data.images import Augmentation  # noqa: E402
from regjax.models import vision  # noqa: E402
from regjax.objectives.classification import CrossEntropy  # noqa: E402

BATCH, CLASSES, RATE, MOMENTUM = 128, 10, 0.05, 0.9
clock = time.process_time if ONE_CORE else time.perf_counter


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, outputs // inputs, 1, bias=False)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(outputs) for _ in range(2))
        self.new = outputs - inputs

    def forward(self, images):
        found = functional.relu(self.norms[0](self.first(images)))
        found = self.norms[1](self.second(found))
        if self.new:
            images = functional.pad(images[:, :, ::2, ::2], (0, 0, 0, 0, 0, self.new))
        return functional.relu(found + images)


class Mean(nn.Module):
    def forward(self, images):
        return images.mean((2, 3))


def resnet20() -> nn.Module:
    sizes = (16, 16, 16, 16, 32, 32, 32, 64, 64, 64)
    stem = (nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
    blocks = map(Block, sizes[:-1], sizes[1:])
    return nn.Sequential(*stem, *blocks, Mean(), nn.Linear(64, CLASSES))


def small_cnn() -> nn.Module:
    layers: list[nn.Module] = []
    for inputs, outputs in ((1, 16), (16, 32)):
        layers += [nn.Conv2d(inputs, outputs, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(7 * 7 * 32, CLASSES))


def perceptron(*hidden: int) -> nn.Module:
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in zip((784, *hidden), hidden, strict=False):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(hidden[-1], CLASSES))


class Comparison(NamedTuple):
    config: vision.VisionModel
    theirs: Callable[[], nn.Module]
    image_shape: tuple[int, int, int]
    runs: int
    steps: int
    """Of a call."""


COMPARISONS = {
    "resnet20": Comparison(vision.CifarResNet(20), resnet20, (32, 32, 3), 1, 16),
    "cnn": Comparison(vision.SmallCnn((16, 32), ()), small_cnn, (28, 28, 1), 16, 16),
    "mlp1": Comparison(vision.Mlp((256,)), functools.partial(perceptron, 256), (28, 28, 1), 16, 64),
    "mlp2": Comparison(
        vision.Mlp((256, 256)), functools.partial(perceptron, 256, 256), (28, 28, 1), 16, 64
    ),
}


def images_of(given: Comparison) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    shape = (given.steps * BATCH, *given.image_shape)
    return random.integers(0, 256, shape, np.uint8), random.integers(0, CLASSES, shape[0])


def our_call(given: Comparison, by: program.RunsBy, devices: int) -> Callable[[], Any]:
    mesh = sharding.make_mesh(devices=jax.devices()[:devices])
    model = vision.build(given.config, given.image_shape, CLASSES)
    objective = CrossEntropy()
    shapes, _ = jax.eval_shape(model.init, jax.random.key(0))
    sgd = optim.Optimizer(
        name="sgd", learning_rate=RATE, b1=MOMENTUM, weight_decay=0.0, schedule="constant",
        warmup=0.0, clip_norm=0.0,
    )  # fmt: skip
    optimizer = optim.build(sgd, 1, shapes)
    images, labels = images_of(given)
    channels = given.image_shape[-1]
    own, shared, indices = jax.device_put(
        (
            program.Own(
                objective=jax.tree.map(lambda value: np.full(given.runs, value, np.float32), objective),
                given={}, labels=np.broadcast_to(labels.astype(np.int32), (given.runs, len(labels))),
                teacher_logits=None, teachers=(), held_out=None,
            ),
            program.Shared(
                images, np.full(channels, 0.5, np.float32), np.full(channels, 0.25, np.float32), None
            ),
            np.arange(len(images), dtype=np.int32).reshape(given.steps, BATCH),
        ),
        sharding.replicated(mesh),
    )  # fmt: skip
    state = program.init_state(
        model, optimizer, objective,
        {"seed": np.arange(given.runs, dtype=np.uint32), "objective": own.objective, "given": {},
         "start": None},
        average=False, mesh=mesh,
    )  # fmt: skip
    update = program.make_chunk(
        model, [], optimizer, objective, Augmentation(), num_classes=CLASSES, count=given.runs, by=by,
        order_seed=0, average=False, mesh=mesh, eval_batch_size=500,
    )  # fmt: skip

    def run():
        nonlocal state
        state, metrics = jax.block_until_ready(update(state, own, shared, indices))
        return metrics

    return run


def their_call(given: Comparison, layout: torch.memory_format) -> Callable[[], Any]:
    pixels, classes = images_of(given)
    pixels = (pixels.astype(np.float32) / 255 - 0.5) / 0.25
    images = torch.from_numpy(pixels.reshape(given.steps, BATCH, *given.image_shape))
    images = images.permute(0, 1, 4, 2, 3)
    labels = torch.from_numpy(classes.reshape(given.steps, BATCH))
    # `contiguous` would leave images of one channel as they are, and torch take them for channels last.
    empty = [torch.empty(each.shape, memory_format=layout) for each in images]
    images = [place.copy_(each) for place, each in zip(empty, images, strict=True)]
    models = [given.theirs().to(memory_format=layout) for _ in range(given.runs)]
    optimizers = [torch.optim.SGD(model.parameters(), RATE, MOMENTUM) for model in models]
    ours = vision.build(given.config, given.image_shape, CLASSES).init
    shapes = jax.eval_shape(ours, jax.random.key(0))[0].values()
    if sum(p.numel() for p in models[0].parameters()) != sum(shape.size for shape in shapes):
        raise SystemExit(f"{given.config}: the two sides do not have as many parameters")

    def run():
        for model, optimizer in zip(models, optimizers, strict=True):
            for batch, correct in zip(images, labels, strict=True):
                optimizer.zero_grad()
                functional.cross_entropy(model(batch), correct).backward()
                optimizer.step()

    return run


def compare(given: Comparison, repeats: int) -> dict[str, float]:
    """Median milliseconds of a step of all runs."""
    calls = {"torch": their_call(given, torch.contiguous_format)}
    if not isinstance(given.config, vision.Mlp):
        calls["torch, channels last"] = their_call(given, torch.channels_last)
    calls["regjax"] = our_call(given, "map", len(CORES))
    if len(CORES) > 1:
        calls["regjax, one device"] = our_call(given, "map", 1)
    if given.runs > 1:
        calls["regjax, vmap"] = our_call(given, "vmap", len(CORES))
    times: dict[str, list[float]] = {way: [] for way in calls}
    for repeat in range(repeats + 1):
        for way, call in calls.items():
            time.sleep(0.2)
            start = clock()
            call()
            if repeat:  # the first one compiles
                times[way].append(clock() - start)
    return {way: 1e3 * statistics.median(found) / given.steps for way, found in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=COMPARISONS, default=list(COMPARISONS))
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--one-core", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(len(CORES))
    one_device_a_core(BATCH)
    print(f"{len(CORES)} cores, medians of {given.repeats}; load {os.getloadavg()[0]:.1f} before\n")
    print("| | runs | way | ms a step of all runs | times as fast as torch |")
    print("|---|---:|---|---:|---:|")
    for name in given.only:
        medians = compare(COMPARISONS[name], given.repeats)
        for way, found in medians.items():
            print(
                f"| {name} | {COMPARISONS[name].runs} | {way} | {found:.1f} "
                f"| {medians['torch'] / found:.2f} |",
                flush=True,
            )
    print(f"\nload {os.getloadavg()[0]:.1f} after")


if __name__ == "__main__":
    main()
