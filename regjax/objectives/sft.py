"""Supervised fine-tuning: token cross-entropy."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp

from regjax import losses
from regjax.models import Apply
from regjax.objectives.objective import Sums
from regjax.token_grid import TokenGrid

CHUNK = 1024
"""How many rows of logits exist at once."""


@dataclasses.dataclass(frozen=True)
class Sft:
    """Token cross-entropy, averaged over tokens: `-log p(label | everything before it)`."""

    tokens: Literal["response", "all"] = "response"
    """Which tokens are labels: those of the response (the score among them), or every token of the text,
    which makes it a language model of the prompts too."""

    label_smoothing: float = 0.0
    """Share of the label's mass spread over the vocabulary."""

    def __call__(
        self,
        model: Apply,
        params,
        batch: Mapping[str, jax.Array],
        key: jax.Array,
        codec: TokenGrid,
    ) -> Sums:
        hidden = model.hidden(
            params, batch["tokens"], positions=batch["positions"], segment_ids=batch["segment_ids"]
        )
        if self.tokens == "response":
            labels, weights = batch["labels"], batch["label_weights"]
            rows = jnp.take_along_axis(hidden, batch["label_positions"][..., None], axis=1)
        else:
            labels, weights = next_tokens(batch)
            rows = hidden[:, :-1]
        loss, correct = self._sums(model, params, rows, labels, weights)
        total = weights.sum()
        return {"loss": (loss, total), "token_accuracy": (correct, total)}

    def _sums(
        self, model: Apply, params, rows: jax.Array, labels: jax.Array, weights: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Summed loss and number of right first guesses, `CHUNK` rows of logits at a time."""
        rows, labels, weights = rows.reshape(-1, rows.shape[-1]), labels.ravel(), weights.ravel()
        size = min(CHUNK, labels.size)
        extra = -labels.size % size
        chunks = (
            jnp.pad(rows, ((0, extra), (0, 0))).reshape(-1, size, rows.shape[-1]),
            jnp.pad(labels, (0, extra)).reshape(-1, size),
            jnp.pad(weights, (0, extra)).reshape(-1, size),
        )

        @jax.checkpoint
        def add(totals, chunk):
            rows, labels, weights = chunk
            logits = model.head(params, rows)
            loss = losses.token_cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
            right = (logits.argmax(-1) == labels).astype(jnp.float32)
            kept = weights > 0
            return (
                totals[0] + (loss * weights).sum(where=kept),
                totals[1] + (right * weights).sum(where=kept),
            ), None

        zero = jnp.zeros((), jnp.float32)
        totals, _ = jax.lax.scan(add, (zero, zero), chunks)
        return totals


def next_tokens(batch: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Labels `[B, L - 1]`, each position's next token, and weights: 1 where both are of one segment."""
    tokens, segment_ids = batch["tokens"], batch["segment_ids"]
    same = (segment_ids[:, 1:] == segment_ids[:, :-1]) & (segment_ids[:, 1:] > 0)
    return tokens[:, 1:], same.astype(jnp.float32)
