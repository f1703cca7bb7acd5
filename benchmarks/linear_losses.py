"""Cross-entropy over a large vocabulary: from hidden states in blocks, against logits held whole.

Value and gradients of both arrays. The ways take turns; printed are medians, and ratios to the first.

    python benchmarks/linear_losses.py
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from regjax.losses.distillation import distillation
from regjax.losses.linear import BLOCK, CHUNK, linear_cross_entropy
from regjax.losses.linear_teachers import linear_distillation
from regjax.losses.tokens import token_cross_entropy


def ways(given: argparse.Namespace) -> dict[str, Callable[..., jax.Array]]:
    """Losses of hidden states and a head, the student's and the teacher's."""
    random = np.random.default_rng(2)
    labels = jnp.asarray(random.integers(0, given.vocabulary, given.rows))
    half = jnp.asarray(random.permutation(given.rows) < given.rows // 2)
    sizes = {"chunk": given.chunk, "block": given.block}
    found: dict[str, Callable[..., jax.Array]] = {
        "logits": lambda h, w, *_: token_cross_entropy(h @ w, labels),
        "blocks": lambda h, w, *_: linear_cross_entropy(h, w, labels, **sizes),
        "logits, half the rows": lambda h, w, *_: token_cross_entropy(h @ w, labels, where=half),
        "blocks, half the rows": lambda h, w, *_: linear_cross_entropy(
            h, w, labels, where=half, **sizes
        ),
    }
    if given.distillation:
        found |= {
            "distillation, logits": lambda h, w, th, tw: distillation(h @ w, th @ tw),
            "distillation, blocks": lambda *both: linear_distillation(*both, **sizes),
        }
    return found


def arrays(given: argparse.Namespace, seed: int) -> tuple[jax.Array, jax.Array]:
    random = np.random.default_rng(seed)
    hidden = random.standard_normal((given.rows, given.width), np.float32)
    head = random.standard_normal((given.width, given.vocabulary), np.float32)
    return jnp.asarray(hidden), jnp.asarray(head / np.float32(np.sqrt(given.width)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--vocabulary", type=int, default=152_000)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--chunk", type=int, default=CHUNK)
    parser.add_argument("--block", type=int, default=BLOCK)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--distillation", action="store_true", help="a teacher of that size, too")
    given = parser.parse_args()
    before = os.getloadavg()[0]
    # The teacher's as arguments: the products of constants would be made by the compiler.
    both = *arrays(given, 0), *(arrays(given, 1) if given.distillation else ())
    steps, memory = {}, {}
    for name, loss in ways(given).items():
        graded = jax.jit(jax.value_and_grad(lambda *both, loss=loss: loss(*both).sum(), (0, 1)))
        steps[name] = graded.lower(*both).compile()
        memory[name] = steps[name].memory_analysis().temp_size_in_bytes
    times: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(given.repeats + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            jax.block_until_ready(step(*both))
            if repeat:
                times[name].append(time.perf_counter() - start)
    print(
        f"{jax.devices()[0].device_kind}, V={given.vocabulary}, D={given.width}, "
        f"{given.rows} rows, blocks of {given.block} rows, chunks of {given.chunk} columns, float32; "
        f"load {before:.1f} before, {os.getloadavg()[0]:.1f} after\n"
    )
    print("| value and gradients | time | of logits | of blocks | temporary memory | of logits |")
    print("|---|---:|---:|---:|---:|---:|")
    median = {name: statistics.median(found) for name, found in times.items()}
    for name, seconds in median.items():
        base = "distillation, " if name.startswith("distillation") else ""
        logits, blocks = median[f"{base}logits"], median[f"{base}blocks"]
        print(
            f"| {name} | {seconds:.2f} s | {seconds / logits:.2f} | {seconds / blocks:.2f} | "
            f"{memory[name] / 1e6:.0f} MB | 1/{memory[f'{base}logits'] / memory[name]:.1f} |"
        )


if __name__ == "__main__":
    main()
