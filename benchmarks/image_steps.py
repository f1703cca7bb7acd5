"""Training steps of image classifiers on a CPU, beside the same in eager PyTorch.

A step is forward, cross-entropy, backward and SGD with momentum, batches of 128, float32. Several runs read
the same batches: here in one compiled program, in torch one after another. Here a call is a scan over
steps, so batches come as `[steps, 128, H, W, C]`; torch is given its own in its own layout.

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
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
import torch  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn import functional  # noqa: E402

from regjax.models import vision  # noqa: E402

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
    "resnet20": Comparison(vision.CifarResNet(20), resnet20, (32, 32, 3), 1, 12),
    "cnn": Comparison(vision.SmallCnn((16, 32), ()), small_cnn, (28, 28, 1), 16, 4),
    "mlp1": Comparison(vision.Mlp((256,)), functools.partial(perceptron, 256), (28, 28, 1), 16, 20),
    "mlp2": Comparison(
        vision.Mlp((256, 256)), functools.partial(perceptron, 256, 256), (28, 28, 1), 16, 20
    ),
}
WAYS = ("runs, then steps", "steps, then runs", "vmap")
"""`lax.map` over runs of a scan over steps, or the other way round; or a scan of steps of all at once."""


def batches(given: Comparison) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    images = random.standard_normal((given.steps, BATCH, *given.image_shape), np.float32)
    return images, random.integers(0, CLASSES, (given.steps, BATCH))


def our_call(given: Comparison, way: str) -> Callable[[], Any]:
    model = vision.build(given.config, given.image_shape, CLASSES)
    optimizer = optax.sgd(RATE, MOMENTUM)

    def loss(params, statistics, images, labels):
        outputs, statistics = model.apply(params, statistics, images, training=True)
        losses = optax.softmax_cross_entropy_with_integer_labels(outputs.logits, labels)
        return losses.mean(), statistics

    def step(state, batch):
        params, moving, trace = state
        (value, moving), gradient = jax.value_and_grad(loss, has_aux=True)(params, moving, *batch)
        updates, trace = optimizer.update(gradient, trace)
        return (optax.apply_updates(params, updates), moving, trace), value

    def runs_then_steps(state, data):
        return jax.lax.map(lambda run: jax.lax.scan(step, run, data), state)

    def steps_then_runs(state, data):
        def every(state, batch):
            return jax.lax.map(lambda run: step(run, batch), state)

        return jax.lax.scan(every, state, data)

    def vmap(state, data):
        return jax.lax.scan(jax.vmap(step, in_axes=(0, None)), state, data)

    params, moving = jax.jit(jax.vmap(model.init))(jax.random.split(jax.random.key(0), given.runs))
    state = (params, moving, jax.vmap(optimizer.init)(params))
    call = (runs_then_steps, steps_then_runs, vmap)[WAYS.index(way)]
    if given.runs == 1:
        state, call = (
            jax.tree.map(lambda array: array[0], state),
            functools.partial(jax.lax.scan, step),
        )
    call = jax.jit(call, donate_argnums=0)
    data = jax.block_until_ready([jnp.asarray(array) for array in batches(given)])

    def run():
        nonlocal state
        state, values = jax.block_until_ready(call(state, data))
        return values

    return run


def their_call(given: Comparison, layout: torch.memory_format) -> Callable[[], Any]:
    images, labels = (torch.from_numpy(array) for array in batches(given))
    images = images.permute(0, 1, 4, 2, 3)
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
    for way in WAYS if given.runs > 1 else WAYS[:1]:
        calls[way if given.runs > 1 else "scan of steps"] = our_call(given, way)
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
