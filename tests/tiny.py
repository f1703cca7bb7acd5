"""A tiny decoder, grids for it, and rows of a few tokens in the shapes that the library agrees on."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from regjax import models
from regjax.models import Apply, DecoderConfig
from regjax.token_grid import TokenGrid

VOCABULARY = 64
CONFIG = DecoderConfig(
    vocabulary_size=VOCABULARY,
    layers=2,
    width=32,
    heads=2,
    key_value_heads=1,
    head_dim=16,
    mlp_width=64,
    # Ten times the default: distributions far from uniform, so that errors show.
    initializer_scale=0.2,
)

SINGLE = TokenGrid.from_ids([10, 11, 12, 13, 14], [1.0, 2.0, 3.0, 4.0, 5.0])
"""1..5, a token each."""

SEVERAL = TokenGrid.from_ids(
    [[10], [10, 15], [10, 15, 16], [11, 12], [12], [13, 10]],
    [0.5, 1.0, 2.0, 4.0, 8.0, 10.0],
    terminator=2,
)
"""Values of two to four tokens, the terminator included."""


@functools.cache
def decoder(seed: int = 0) -> tuple[Apply, dict[str, Any]]:
    """`(apply, params)` of the decoder with random parameters."""
    return models.split(models.create(CONFIG, seed))


def bigram(size: int, seed: int = 0) -> tuple[Apply, dict[str, Any]]:
    """A bare function as a model: the next token's logits are a table's row of the last token."""
    table = np.random.default_rng(seed).normal(size=(size, size)).astype(np.float32)
    return models.from_function(_bigram), {"table": jnp.asarray(table)}


def _bigram(params, tokens):
    return params["table"][tokens]


class Example(NamedTuple):
    """`prompt`, then `response`, whose last token is the score."""

    prompt: tuple[int, ...]
    response: tuple[int, ...]
    score: float
    weight: float = 1.0


def examples(count: int, seed: int = 0, *, prompt: int = 8, response: int = 3) -> list[Example]:
    """Random examples of 2 to `prompt` and 1 to `response` tokens, of weights 0.5 to 2."""
    random = np.random.default_rng(seed)

    def one() -> Example:
        before = random.integers(3, VOCABULARY, random.integers(2, prompt + 1))
        reasoning = random.integers(20, VOCABULARY, random.integers(0, response))
        score = int(random.integers(1, 6))
        written = (*reasoning.tolist(), 9 + score)
        return Example(tuple(before.tolist()), written, float(score), random.uniform(0.5, 2.0))

    return [one() for _ in range(count)]


def batch(
    rows: Sequence[Sequence[Example]],
    *,
    length: int = 24,
    labels: int = 12,
    slots: int | None = None,
    side: Literal["right", "left"] = "right",
) -> dict[str, np.ndarray]:
    """The rows, each of no, one or several examples, as arrays of static shape."""
    slots = max(1, *map(len, rows)) if slots is None else slots
    size = len(rows)
    integers = {"tokens": length, "positions": length, "segment_ids": length}
    integers |= {"labels": labels, "label_positions": labels, "score_positions": slots}
    floats = {"label_weights": labels, "scores": slots, "weights": slots}
    arrays = {name: np.zeros((size, width), np.int32) for name, width in integers.items()}
    arrays |= {name: np.zeros((size, width), np.float32) for name, width in floats.items()}
    arrays["record_ids"] = np.full((size, slots), -1, np.int32)
    record = 0
    for index, row in enumerate(rows):
        used = sum(len(example.prompt) + len(example.response) for example in row)
        start = length - used if side == "left" else 0
        label = 0
        for slot, example in enumerate(row):
            whole = example.prompt + example.response
            end = start + len(whole)
            arrays["tokens"][index, start:end] = whole
            arrays["positions"][index, start:end] = range(len(whole))
            arrays["segment_ids"][index, start:end] = slot + 1
            written = slice(label, label + len(example.response))
            arrays["labels"][index, written] = example.response
            arrays["label_positions"][index, written] = np.arange(end - len(example.response), end)
            arrays["label_positions"][index, written] -= 1
            arrays["label_weights"][index, written] = example.weight
            arrays["score_positions"][index, slot] = end - 2
            arrays["scores"][index, slot] = example.score
            arrays["weights"][index, slot] = example.weight
            arrays["record_ids"][index, slot] = record
            start, label, record = end, written.stop, record + 1
    return arrays


def on_device(arrays: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """What a model and an objective take: all but the record ids."""
    return {name: jnp.asarray(array) for name, array in arrays.items() if name != "record_ids"}


def log_softmax(logits: Any) -> np.ndarray:
    """In NumPy and float64."""
    logits = np.asarray(logits, np.float64)
    top = logits.max(-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
