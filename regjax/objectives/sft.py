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
        hidden = model.hidden_of(params, batch)
        if self.tokens == "response":
            labels, weights = jnp.asarray(batch["labels"]), jnp.asarray(batch["label_weights"])
            positions = jnp.asarray(batch["label_positions"])
            rows = jnp.take_along_axis(hidden, positions[..., None], axis=1)
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
        # Zeros where nothing counts: 0 times a hidden state that is not finite would be NaN. Here and
        # not in the logits, where a mask would cost a copy of them.
        kept = weights > 0
        rows = jnp.where(kept[..., None], rows, 0).reshape(-1, rows.shape[-1])
        labels, weights = labels.ravel(), weights.ravel()
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
    """Labels `[B, L - 1]`, each position's next token, and weights: the example's where both are its own.

    The example of segment s is in slot s - 1 of `batch["weights"]` `[B, S]`.
    """
    tokens, segment_ids = jnp.asarray(batch["tokens"]), jnp.asarray(batch["segment_ids"])
    following = segment_ids[:, 1:]
    same = (following == segment_ids[:, :-1]) & (following > 0)
    slots = jnp.maximum(following - 1, 0)
    weights = jnp.take_along_axis(jnp.asarray(batch["weights"]), slots, axis=1)
    return tokens[:, 1:], jnp.where(same, weights, 0)
