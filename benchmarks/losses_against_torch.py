"""Losses over a vocabulary, forward and backward, beside the same in eager PyTorch: time and memory.

First both sides' losses and gradients are compared. Then the two take turns on the same two
processor cores; printed are medians and ratios. Memory is measured for both in the same way: in a
process for each library and loss, the peak of the resident memory (VmHWM of Linux, set back before)
during one step, less what was resident before, inputs and an equal step on a few rows included.

    python benchmarks/losses_against_torch.py
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

CORES = sorted(os.sched_getaffinity(0))[:2]
os.sched_setaffinity(0, CORES)  # before jax counts them for its threads

DIGITS = np.arange(15, 25)  # where a vocabulary might have its ten digits
Inputs = dict[str, np.ndarray]
Step = Callable[[], tuple[float, np.ndarray]]

# Loss: the arrays it takes, the one to differentiate first.
LOSSES = {
    "cross-entropy": ("student", "labels"),
    "KD, T = 2": ("student", "teacher"),
    "JSD": ("student", "teacher"),
    "number token, Wasserstein": ("student", "numbers"),
    "number token, squared": ("student", "numbers"),
}


def make_inputs(name: str, rows: int, vocabulary: int) -> Inputs:
    random = np.random.default_rng(0)
    inputs: Inputs = {}
    for part in LOSSES[name]:
        if part == "labels":
            inputs[part] = random.integers(0, vocabulary, rows)
        elif part == "numbers":
            inputs[part] = random.integers(0, 10, rows).astype(np.float32)
        else:
            inputs[part] = random.standard_normal((rows, vocabulary), np.float32)
    return inputs


def regjax_step(name: str, inputs: Inputs) -> Step:
    import jax
    import jax.numpy as jnp

    from regjax import losses
    from regjax.token_grid import TokenGrid

    grid = TokenGrid.from_ids(DIGITS, np.arange(10))
    loss = {
        "cross-entropy": losses.token_cross_entropy,
        "KD, T = 2": lambda s, t: losses.distillation(s, t, temperature=2.0),
        "JSD": lambda s, t: losses.distillation(s, t, kind="jensen_shannon"),
        "number token, Wasserstein": lambda s, y: losses.number_token(s, y, grid),
        "number token, squared": lambda s, y: losses.number_token(s, y, grid, kind="mse"),
    }[name]
    arrays = jax.block_until_ready([jnp.asarray(array) for array in inputs.values()])
    inputs.clear()
    step = jax.jit(jax.value_and_grad(lambda *given: loss(*given).mean()))
    step = step.lower(*arrays).compile()

    def run() -> tuple[float, np.ndarray]:
        value, gradient = jax.block_until_ready(step(*arrays))
        return float(value), gradient

    return run


def torch_step(name: str, inputs: Inputs) -> Step:
    import torch
    from torch.nn import functional

    torch.set_num_threads(len(CORES))
    values = torch.arange(10.0)
    digits = torch.from_numpy(DIGITS)

    def distillation(student, teacher):
        student, teacher = (functional.log_softmax(z / 2.0, -1) for z in (student, teacher))
        divergence = functional.kl_div(student, teacher, reduction="batchmean", log_target=True)
        return 4.0 * divergence

    def jensen_shannon(student, teacher, beta=0.5):
        student, teacher = (functional.log_softmax(z, -1) for z in (student, teacher))
        weights = torch.tensor([1.0 - beta, beta]).log()
        both = torch.stack([student + weights[0], teacher + weights[1]])
        mixture = torch.logsumexp(both, dim=0)
        of_teacher = functional.kl_div(mixture, teacher, reduction="none", log_target=True)
        of_student = functional.kl_div(mixture, student, reduction="none", log_target=True)
        return (beta * of_teacher + (1.0 - beta) * of_student).sum(-1).mean()

    def wasserstein(logits, numbers):
        probabilities = logits[:, digits].softmax(-1)
        return (probabilities * (values - numbers[:, None]).abs()).sum(-1).mean()

    def squared(logits, numbers):
        return functional.mse_loss(logits[:, digits].softmax(-1) @ values, numbers)

    loss = {
        "cross-entropy": functional.cross_entropy,
        "KD, T = 2": distillation,
        "JSD": jensen_shannon,
        "number token, Wasserstein": wasserstein,
        "number token, squared": squared,
    }[name]
    arrays = [torch.from_numpy(array) for array in inputs.values()]
    inputs.clear()
    arrays[0].requires_grad_()

    def run() -> tuple[float, np.ndarray]:
        arrays[0].grad = None
        value = loss(*arrays)
        value.backward()
        return value.item(), arrays[0].grad.numpy()

    return run


STEPS = {"regjax": regjax_step, "torch": torch_step}


def resident(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024


def peak_growth(library: str, name: str, rows: int, vocabulary: int) -> int:
    """Bytes; in a process that does nothing else."""
    STEPS[library](name, make_inputs(name, 8, vocabulary))()
    step = STEPS[library](name, make_inputs(name, rows, vocabulary))
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    kept = step()
    growth = resident("VmHWM") - before
    del kept
    return growth


def compare(name: str, rows: int, vocabulary: int, repeats: int) -> dict[str, float]:
    """Median seconds of each library, after a check that both compute the same."""
    steps = {
        library: make(name, make_inputs(name, rows, vocabulary)) for library, make in STEPS.items()
    }
    (ours, gradient), (theirs, expected) = (step() for step in steps.values())
    difference = abs(ours - theirs) / abs(theirs)
    gradient = np.asarray(gradient)
    scale = np.abs(expected).max()
    worst = max(
        np.abs(gradient[row] - expected[row]).max() / scale for row in range(0, rows, rows // 64)
    )
    print(f"{name}: {ours:.6f} and {theirs:.6f}, relative difference {difference:.0e}, "
          f"of the gradients {worst:.0e}")  # fmt: skip
    if not max(difference, worst) < 1e-4:
        raise SystemExit(f"{name}: the two sides do not compute the same loss")
    del gradient, expected
    times: dict[str, list[float]] = {library: [] for library in steps}
    for _ in range(repeats):
        for library, step in steps.items():
            time.sleep(0.2)  # so that the other library's threads have stopped spinning
            start = time.perf_counter()
            step()
            times[library].append(time.perf_counter() - start)
    return {library: statistics.median(found) for library, found in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--memory-of", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    sizes = (given.rows, given.vocabulary)
    if given.memory_of:
        print(peak_growth(*given.memory_of, *sizes))
        return
    print(f"N={given.rows}, V={given.vocabulary}, float32, {len(CORES)} cores, medians of "
          f"{given.repeats}; load {os.getloadavg()[0]:.1f} before")  # fmt: skip
    medians, growths = {}, {}
    for name in LOSSES:
        medians[name] = compare(name, *sizes, given.repeats)
        for library in STEPS:
            command = [sys.executable, __file__, "--memory-of", library, name]
            command += ["--rows", str(given.rows), "--vocabulary", str(given.vocabulary)]
            found = subprocess.run(command, check=True, capture_output=True, text=True)
            growths[name, library] = int(found.stdout)
    print(f"load {os.getloadavg()[0]:.1f} after\n")
    print(
        "| loss and gradient | regjax | torch | time ratio | peak, regjax | peak, torch | ratio |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|")
    for name, seconds in medians.items():
        ours, theirs = growths[name, "regjax"], growths[name, "torch"]
        print(f"| {name} | {seconds['regjax']:.3f} s | {seconds['torch']:.3f} s "
              f"| {seconds['regjax'] / seconds['torch']:.2f} | {ours / 1e6:.0f} MB "
              f"| {theirs / 1e6:.0f} MB | {ours / theirs:.2f} |")  # fmt: skip


if __name__ == "__main__":
    main()
