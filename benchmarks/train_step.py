"""Training steps of a Llama-like decoder beside transformers' Llama on torch: time, memory, utilisation.

Cross-entropy of every token, and RAFT without reasoning. torch, eager and compiled, does what is published:
the loss of `LlamaForCausalLM`, and for RAFT the logits of all positions, of which those at the score go
through a softmax over the vocabulary (as in TRACT's code, whose cross-entropy has no tokens here). The
third side for RAFT is regjax's own decoder with logits of all positions. All have the same weights, and
their first losses are compared; all clip the gradient to norm 1 and take a step of AdamW, torch's fused.

Each side has a process of its own on the same two cores. The sides take turns, a step each; printed
are medians and ratios. Memory is what was resident at most during a step (VmHWM of Linux) less what was
before the model was loaded, and the same without the parameters and AdamW's two moments, which
all sides hold. Utilisation is model flops (`regjax.model_flops`) by time, as a share of the best that a
product of matrices reached in regjax's and in torch's process.

    python benchmarks/train_step.py [--repeats 7] [--objectives raft] [--vocabularies 152000]
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

CORES = sorted(os.sched_getaffinity(0))[:2]
OBJECTIVES = ("cross-entropy", "raft")
SIDES = {
    "cross-entropy": ("regjax", "eager", "compiled"),
    "raft": ("regjax", "all logits", "eager", "compiled"),
}
GRID_TOKENS, GRID_VALUES = [11, 12, 13, 14, 15], [1.0, 2.0, 3.0, 4.0, 5.0]

Step = Callable[[], float]
"""One update; returns the loss before it."""


def make_batch(rows: int, length: int, vocabulary: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {
        "tokens": random.integers(20, vocabulary, (rows, length)).astype(np.int32),
        "positions": np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
        "segment_ids": np.ones((rows, length), np.int32),
        "score_positions": np.full((rows, 1), length - 3, np.int32),
        "scores": random.uniform(1, 5, (rows, 1)).astype(np.float32),
        "weights": np.ones((rows, 1), np.float32),
    }


def write_weights(folder: Path, given: argparse.Namespace) -> None:
    from regjax import models

    config = models.DecoderConfig(
        vocabulary_size=given.vocabulary, width=given.width, layers=given.layers,
        heads=given.width // 64, key_value_heads=given.width // 64, head_dim=64,
        mlp_width=round(given.width * 8 / 3 / 64) * 64,
    )  # fmt: skip
    _, params = models.split(models.create(config, 0))
    models.save(folder, config, params)


def on_regjax(given: argparse.Namespace) -> tuple[Step, dict[str, float]]:
    import jax
    import jax.numpy as jnp

    from regjax import losses, model_flops, models, optim, paths, sharding
    from regjax.objectives import Raft, Sft
    from regjax.objectives.objective import weighted
    from regjax.stages import init_state, make_update
    from regjax.throughput import measured_peak
    from regjax.token_grid import TokenGrid

    grid = TokenGrid.from_ids(GRID_TOKENS, GRID_VALUES)

    def all_logits(model, params, batch, key, codec):
        places = {name: batch[name] for name in ("positions", "segment_ids")}
        logits = model(params, batch["tokens"], **places)
        rows = jnp.take_along_axis(logits, batch["score_positions"][..., None], axis=1)
        return {"loss": weighted(losses.raft(rows, batch["scores"], codec), batch["weights"])}

    if given.side == "all logits":
        objective: Any = all_logits
    else:
        objective = Raft() if given.objective == "raft" else Sft(tokens="all")
    module = models.load(
        given.weights,
        rematerialisation=given.rematerialisation,
        scan_layers=given.scan_layers or given.rematerialisation != "none",
    )
    model, nested = models.split(module)
    params = paths.flatten(nested)
    everywhere = sharding.replicated(sharding.make_mesh())
    rule = optim.Optimizer(learning_rate=1e-4, schedule="constant", warmup=0.0)
    optimizer = optim.build(rule, 1000, params)
    state = init_state(params, optimizer, everywhere)
    update = make_update(model, objective, optimizer, grid, seed=0, sharding=everywhere)
    numbers = make_batch(given.rows, given.length, given.vocabulary)
    batch = {name: jnp.asarray(array)[None] for name, array in numbers.items()}
    through_head = 1 if given.objective == "raft" else given.length
    row = model_flops.training(module.config, given.length, through_head, params)
    flops = given.rows * row
    size = sum(array.size for array in params.values())
    del module, nested, params

    def step() -> float:
        nonlocal state
        state, metrics = update(state, {}, batch)
        total, weight = np.asarray(metrics["loss"])
        jax.block_until_ready(state)
        return float(total / weight)

    peak = max(measured_peak(n, jnp.float32, seconds=1.0) for n in (1024, 2048))
    return step, {"flops": flops, "parameters": size, "peak": peak}


def on_torch(given: argparse.Namespace) -> tuple[Step, dict[str, float]]:
    import torch
    from transformers import LlamaForCausalLM

    torch.set_num_threads(len(CORES))
    network = LlamaForCausalLM.from_pretrained(given.weights, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, weight_decay=0.0, fused=True)
    batch = make_batch(given.rows, given.length, given.vocabulary)
    tokens = torch.tensor(batch["tokens"], dtype=torch.long)
    at = torch.tensor(batch["score_positions"][:, 0], dtype=torch.long)
    rows = torch.arange(len(tokens))
    scores = torch.tensor(batch["scores"][:, 0])
    ids, values = torch.tensor(GRID_TOKENS), torch.tensor(GRID_VALUES)

    def cross_entropy() -> torch.Tensor:
        return network(tokens, labels=tokens, use_cache=False).loss

    def raft() -> torch.Tensor:
        logits = network(tokens, use_cache=False).logits
        expected = logits[rows, at].softmax(-1)[:, ids] @ values
        return torch.nn.functional.mse_loss(expected, scores)

    loss_of = raft if given.objective == "raft" else cross_entropy
    if given.side == "compiled":
        loss_of = torch.compile(loss_of)

    def step() -> float:
        loss = loss_of()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    def measured_peak(n: int) -> float:
        matrix = torch.ones(n, n)
        best, end = float("inf"), time.perf_counter() + 1
        while (start := time.perf_counter()) < end:
            matrix @ matrix
            best = min(best, time.perf_counter() - start)
        return 2 * n**3 / best

    return step, {"peak": max(measured_peak(n) for n in (1024, 2048))}


def resident(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024


def work(given: argparse.Namespace) -> None:
    """A side: answers each line that it reads with the loss, seconds and peak memory of a step."""
    ours = given.side in ("regjax", "all logits")
    if ours:
        import jax

        jax.block_until_ready(jax.numpy.zeros(()) + 1)
        import regjax.train  # noqa: F401
    else:
        import torch._dynamo  # noqa: F401
        import transformers.models.llama.modeling_llama  # noqa: F401
    before = resident("VmRSS")
    step, told = (on_regjax if ours else on_torch)(given)
    trim = ctypes.CDLL(None).malloc_trim
    print(json.dumps(told), flush=True)
    for _ in sys.stdin:
        trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        start = time.perf_counter()
        loss = step()
        seconds = time.perf_counter() - start
        memory = resident("VmHWM") - before
        trim(0)  # so that what a step has freed is there for the other sides
        print(json.dumps({"loss": loss, "seconds": seconds, "memory": memory}), flush=True)


class Ended(Exception):
    """A side's process is gone, killed for want of memory or by an error of its own."""


class Side:
    """A process with a side, and what its steps took."""

    def __init__(self, choices: dict[str, Any]) -> None:
        self._name = "{objective}, {vocabulary:,}, {side}".format(**choices)
        command = [sys.executable, __file__, "--work", json.dumps(choices)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.told = self._answer()
        self.first = self._ask()  # compiles
        self.steps: list[dict[str, float]] = []

    def step(self) -> None:
        time.sleep(0.3)  # so that the other side's threads have stopped spinning
        self.steps.append(self._ask())

    def median(self, name: str) -> float:
        return statistics.median(step[name] for step in self.steps)

    def close(self) -> None:
        self._process.communicate()

    def _ask(self) -> dict[str, float]:
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write("step\n")
            self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, float]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            how = f"signal {-code} ended it" if code < 0 else f"it ended with status {code}"
            raise Ended(f"{self._name}: {how} (9 is what Linux sends where memory is short)")
        return json.loads(line)


def compare(given: argparse.Namespace, objective: str, vocabulary: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        choices = {**vars(given), "objective": objective, "vocabulary": vocabulary}
        choices["weights"] = f"{folder}/model"
        write = [sys.executable, __file__, "--work", json.dumps({**choices, "side": "weights"})]
        subprocess.run(write, check=True)
        sides = {}
        for name in SIDES[objective]:
            try:
                sides[name] = Side({**choices, "side": name})
            except Ended as ended:
                print(ended, file=sys.stderr)
    for _ in range(given.repeats):
        for name, side in list(sides.items()):
            try:
                side.step()
            except Ended as ended:
                print(ended, file=sys.stderr)
                del sides[name]
    for side in sides.values():
        side.close()
    if "regjax" not in sides:
        return
    losses = [side.first["loss"] for side in sides.values()]
    if not max(losses) - min(losses) < 1e-4 * abs(losses[0]):
        raise SystemExit(f"{objective}: the sides do not compute the same loss: {losses}")
    ours = sides["regjax"]
    peak = max(side.told["peak"] for side in sides.values())
    state = 12 * ours.told["parameters"]  # the parameters and two moments, float32
    for name, side in sides.items():
        seconds, memory = side.median("seconds"), side.median("memory")
        print(
            f"| {objective}, {vocabulary:,} | {name} | {seconds:.2f} s "
            f"| {seconds / ours.median('seconds'):.2f} | {memory / 1e6:,.0f} MB "
            f"| {memory / ours.median('memory'):.2f} | {(memory - state) / 1e6:,.0f} MB "
            f"| {(memory - state) / (ours.median('memory') - state):.2f} "
            f"| {100 * ours.told['flops'] / seconds / peak:.0f} % |", flush=True,
        )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--objectives", nargs="+", choices=OBJECTIVES, default=OBJECTIVES)
    parser.add_argument("--vocabularies", nargs="+", type=int, default=[32_000, 152_000])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--rematerialisation", choices=("none", "dots", "full"), default="none",
        help="regjax: what of a layer is computed again in the backward pass",
    )  # fmt: skip
    parser.add_argument("--scan-layers", action="store_true", help="regjax: one compiled layer")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    given = parser.parse_args()
    os.sched_setaffinity(0, CORES)  # before any library counts them for its threads
    if given.work:
        choices = argparse.Namespace(**json.loads(given.work))
        if choices.side == "weights":
            write_weights(Path(choices.weights), choices)
        else:
            work(choices)
        return
    del given.work
    print(
        f"{given.layers} layers, width {given.width}, batch {given.rows} x {given.length}, float32, "
        f"{len(CORES)} cores, medians of {given.repeats}; load {os.getloadavg()[0]:.1f} before\n\n"
        "| step, vocabulary | side | time | by regjax's | memory | by regjax's "
        "| without the state | by regjax's | utilisation |\n"
        "|---|---|---:|---:|---:|---:|---:|---:|---:|"
    )
    for objective in given.objectives:
        for vocabulary in given.vocabularies:
            compare(given, objective, vocabulary)
    print(f"\nload {os.getloadavg()[0]:.1f} after")


if __name__ == "__main__":
    main()
