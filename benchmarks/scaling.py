"""Weak scaling over processes, the cost of checkpoints, and waiting for data, on processor cores.

Scaling: one process on one core against two of one core each (`jax.distributed`, gloo), with the same
number of rows a process; they take turns. Besides, two such processes that know nothing of each other:
what two cores of the machine do together, which no exchange can better. Checkpoints: blocks of 50 steps,
of which every other begins with saving the state as `regjax.train` does; the block ends when the
checkpoint is written. Waiting: the share that `regjax.train` logs over a run on texts that it reads,
tokenises and shuffles.

    python benchmarks/scaling.py [--repeats 5] [--only scaling checkpoints data]
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

CORES = sorted(os.sched_getaffinity(0))[:2]
PARTS = ("scaling", "checkpoints", "data")
BLOCK = 50


def setup(given: argparse.Namespace):
    """`(step, state)`: a function of the state, of rows that are this process's own."""
    import jax
    import numpy as np

    from regjax import models, optim, paths, sharding
    from regjax.objectives import Sft
    from regjax.stages import init_state, make_update

    config = models.DecoderConfig(
        vocabulary_size=given.vocabulary, width=given.width, layers=4, heads=4, key_value_heads=4,
        head_dim=given.width // 4, mlp_width=given.width * 8 // 3 // 16 * 16, scan_layers=False,
    )  # fmt: skip
    model, nested = models.split(models.create(config, 0))
    mesh = sharding.make_mesh()
    everywhere = sharding.replicated(mesh)
    params = jax.jit(paths.flatten, out_shardings=everywhere)(nested)
    optimizer = optim.build(optim.Optimizer(), 100_000, params)
    state = init_state(params, optimizer, everywhere)
    update = make_update(model, Sft("all"), optimizer, None, seed=0, sharding=everywhere)
    shape = (1, given.rows, given.length)
    random = np.random.default_rng(jax.process_index())
    rows = {
        "tokens": random.integers(0, given.vocabulary, shape).astype(np.int32),
        "positions": np.broadcast_to(np.arange(given.length, dtype=np.int32), shape),
        "segment_ids": np.ones(shape, np.int32),
        "weights": np.ones((1, given.rows, 1), np.float32),
    }
    place = sharding.by_row(mesh, axis=1)
    batch = {
        name: jax.make_array_from_process_local_data(place, array) for name, array in rows.items()
    }

    def step(state):
        state, metrics = update(state, {}, batch)
        np.asarray(metrics["loss"])
        return state

    return step, step(step(state))


def work_scaling(given: argparse.Namespace) -> None:
    """Prints the seconds of a step."""
    import jax

    if given.processes > 1:
        jax.distributed.initialize(given.coordinator, given.processes, given.process)
    step, state = setup(given)
    start = time.perf_counter()
    for _ in range(given.steps):
        state = step(state)
    seconds = (time.perf_counter() - start) / given.steps
    print(json.dumps(seconds), flush=True)


def work_checkpoints(given: argparse.Namespace) -> None:
    """Prints the seconds of blocks without a checkpoint and of blocks with one."""
    from regjax import checkpoint

    step, state = setup(given)
    blocks: dict[bool, list[float]] = {False: [], True: []}
    with (
        tempfile.TemporaryDirectory() as folder,
        checkpoint.open_manager(Path(folder)) as manager,
    ):
        for repeat in range(given.repeats + 1):
            for saves in blocks:
                start = time.perf_counter()
                if saves:
                    checkpoint.save(manager, int(state.step), state, {})
                for _ in range(BLOCK if repeat else 2):
                    state = step(state)
                checkpoint.wait(manager)
                if repeat:
                    blocks[saves].append(time.perf_counter() - start)
    print(json.dumps([blocks[False], blocks[True]]), flush=True)


def work_data(given: argparse.Namespace) -> None:
    """Prints the share of the time that a run waited for data."""
    import regjax
    from regjax import Experiment, ScoreGrid, Stage
    from regjax.data import Data, Template, rated_texts
    from regjax.log import read_log
    from regjax.models import DecoderConfig
    from regjax.objectives import Sft

    experiment = Experiment(
        stages=(Stage("only", Sft("all")),),
        data=Data(train=rated_texts(20_000, seed=1), packing=True, max_length=given.length),
        template=Template("{text}\nStars:", response=" {score}"),
        grid=ScoreGrid.integers(1, 5),
        architecture=DecoderConfig(
            width=given.width, layers=4, heads=4, key_value_heads=4, head_dim=given.width // 4,
            mlp_width=given.width * 8 // 3 // 16 * 16,
        ),
        batch_size=given.rows, steps=100, log_every=100, checkpoint_every=BLOCK,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        regjax.train(experiment, folder, quiet=True)
        (line,) = [line for line in read_log(Path(folder) / "log.jsonl") if "loss" in line]
    print(json.dumps(line["speed/data_wait_share"]), flush=True)


WORK = {"scaling": work_scaling, "checkpoints": work_checkpoints, "data": work_data}


def start(cores: list[int], choices: dict[str, Any]) -> subprocess.Popen:
    command = [sys.executable, __file__, "--work", json.dumps({**choices, "cores": cores})]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def answers(processes: list[subprocess.Popen]) -> list[Any]:
    outputs = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise SystemExit("a process has failed: its error stands above")
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def seconds_of(count: int, choices: dict[str, Any], *, together: bool) -> float:
    """Of a step of `count` processes, of one job or each on its own."""
    job = {"coordinator": f"localhost:{free_port()}", "processes": count if together else 1}
    started = [
        start([CORES[index]], {**choices, **job, "process": index}) for index in range(count)
    ]
    return max(answers(started))


def scaling(choices: dict[str, Any], repeats: int) -> None:
    kinds = {"1 process": (1, True), "2 apart": (2, False), "2 processes": (2, True)}
    found: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(repeats):
        for name, (count, together) in kinds.items():
            found[name].append(seconds_of(count, choices, together=together))
    tokens = choices["rows"] * choices["length"]
    alone = found["1 process"]
    for name, (count, _) in kinds.items():
        rate = count * tokens / statistics.median(found[name])
        ratios = [count * a / b for a, b in zip(alone, found[name], strict=True)]
        print(f"{name}: {rate:,.0f} tokens/s, by one's {statistics.median(ratios):.2f} "
              f"({min(ratios):.2f} to {max(ratios):.2f})", flush=True)  # fmt: skip


def checkpoints(choices: dict[str, Any]) -> None:
    ((without, having),) = answers([start(CORES, choices)])
    overheads = [b / a - 1 for a, b in zip(without, having, strict=True)]
    print(f"{BLOCK} steps: {statistics.median(without):.2f} s, with a checkpoint "
          f"{statistics.median(having):.2f} s: {100 * statistics.median(overheads):+.1f} % "
          f"(of pairs {100 * min(overheads):+.1f} to {100 * max(overheads):+.1f} %)", flush=True)  # fmt: skip


def data(choices: dict[str, Any]) -> None:
    (share,) = answers([start(CORES, choices)])
    print(f"waiting for data: {100 * share:.2f} % of a step", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--rows", type=int, default=16, help="of a process")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work:
        choices = argparse.Namespace(**json.loads(given.work))
        os.sched_setaffinity(0, choices.cores)  # before jax counts them for its threads
        WORK[choices.part](choices)
        return
    print(f"4 layers, width {given.width}, vocabulary {given.vocabulary}, {given.rows} x {given.length} "
          f"a process; load {os.getloadavg()[0]:.1f} before")  # fmt: skip
    names = ("width", "vocabulary", "rows", "length", "steps", "repeats")
    choices = {name: getattr(given, name) for name in names}
    if "scaling" in given.only:
        scaling({**choices, "part": "scaling"}, given.repeats)
    if "checkpoints" in given.only:
        checkpoints({**choices, "part": "checkpoints"})
    if "data" in given.only:
        data({**choices, "part": "data"})
    print(f"load {os.getloadavg()[0]:.1f} after")


if __name__ == "__main__":
    main()
