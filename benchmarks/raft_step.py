"""One RAFT update, three ways, side by side: time and memory.

regjax (logits of the score row only) against the same decoder with logits of every position, and against
transformers on torch, which is what one would patch otherwise. The three take turns; printed are medians
and ratios.

    python benchmarks/raft_step.py
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from regjax import losses, models, optim, paths, sharding
from regjax.objectives import Raft
from regjax.objectives.objective import weighted
from regjax.stages import init_state, make_update
from regjax.token_grid import TokenGrid

GRID = TokenGrid.from_ids([11, 12, 13, 14, 15], [1, 2, 3, 4, 5])


def full_logits(model, params, batch, key, codec):
    """RAFT as it is usually written: logits of every position, then the score row."""
    logits = model(
        params, batch["tokens"], positions=batch["positions"], segment_ids=batch["segment_ids"]
    )
    rows = jnp.take_along_axis(logits, batch["score_positions"][..., None], axis=1)
    return {"loss": weighted(losses.raft(rows, batch["scores"], codec), batch["weights"])}


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


def ours(config: models.DecoderConfig, objective, batch) -> tuple[Callable[[], None], int]:
    model, params = models.split(models.create(config, 0))
    params = paths.flatten(params)
    everywhere = sharding.replicated(sharding.make_mesh())
    optimizer = optim.build(optim.Optimizer(learning_rate=1e-4), 1000, params)
    state = init_state(params, optimizer, everywhere)
    update = make_update(model, objective, optimizer, GRID, seed=0, sharding=everywhere)
    micro = {name: jnp.asarray(array)[None] for name, array in batch.items()}
    compiled = update.lower(state, {}, micro).compile()
    temporary = compiled.memory_analysis().temp_size_in_bytes

    def step() -> None:
        nonlocal state
        state, metrics = compiled(state, {}, micro)
        jax.block_until_ready(metrics)

    return step, temporary


def on_torch(config: models.DecoderConfig, batch) -> Callable[[], None]:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    network = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocabulary_size,
            hidden_size=config.width,
            intermediate_size=config.mlp_width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.key_value_heads,
            head_dim=config.head_dim,
        )
    )
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
    tokens = torch.tensor(batch["tokens"], dtype=torch.long)
    at = torch.tensor(batch["score_positions"][:, 0], dtype=torch.long)
    scores = torch.tensor(batch["scores"][:, 0])
    ids = torch.tensor(GRID.tokens[:, 0], dtype=torch.long)
    values = torch.tensor(GRID.values)

    def step() -> None:
        logits = network(tokens).logits
        rows = logits[torch.arange(len(tokens)), at].float()
        expected = rows.softmax(-1)[:, ids] @ values
        loss = ((expected - scores) ** 2).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=9)
    given = parser.parse_args()
    config = models.DecoderConfig(
        vocabulary_size=given.vocabulary, width=256, layers=4, heads=8, key_value_heads=8,
        head_dim=32, mlp_width=704,
    )  # fmt: skip
    batch = make_batch(given.rows, given.length, given.vocabulary)
    score_row, small = ours(config, Raft(), batch)
    every_row, large = ours(config, full_logits, batch)
    arms = {"regjax": score_row, "all logits": every_row, "torch": on_torch(config, batch)}
    times: dict[str, list[float]] = {name: [] for name in arms}
    for repeat in range(given.repeats + 1):
        for name, step in arms.items():
            start = time.perf_counter()
            step()
            if repeat:
                times[name].append(time.perf_counter() - start)
    median = {name: statistics.median(found) for name, found in times.items()}
    print(f"{jax.devices()[0].device_kind}, V={given.vocabulary}, B={given.rows}, L={given.length}")
    for name, seconds in median.items():
        print(f"{name:>10}: {seconds:.3f} s, regjax takes {median['regjax'] / seconds:.2f} of it")
    print(f"temporary memory: regjax {small / 1e6:.0f} MB, all logits {large / 1e6:.0f} MB")
    print(f"ratio {small / large:.3f}")


if __name__ == "__main__":
    main()
