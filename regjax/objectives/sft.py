"""Supervised fine-tuning: token cross-entropy."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp

from regjax import losses, sharding
from regjax.models import Apply
from regjax.objectives.objective import Sums
from regjax.token_grid import TokenGrid

CHUNK = 1024
"""How many rows of logits exist at once, of a head that is no projection."""


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
        loss, hits = self._losses(model, params, rows, labels, weights)
        total = weights.sum()
        return {
            "loss": (loss.sum(), total),
            "token_accuracy": (weights.sum(where=hits), total),
        }

    def _losses(
        self, model: Apply, params, rows: jax.Array, labels: jax.Array, weights: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Weighted losses, and whether the label is the first guess, false where the weight is 0."""
        kept = weights > 0
        projection = model.projection(params)
        if projection is not None:
            kernel, soft_cap = projection
            return losses.linear_cross_entropy_and_hits(
                rows,
                kernel,
                labels,
                label_smoothing=self.label_smoothing,
                soft_cap=soft_cap,
                weights=weights,
                where=kept,
                mesh=sharding.current_mesh(kernel.shape[1]),
            )

        @jax.checkpoint
        def of_row(row: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            hidden, label = row
            logits = model.head(params, hidden)
            loss = losses.token_cross_entropy(logits, label, label_smoothing=self.label_smoothing)
            return loss, (logits >= logits[label]).sum() == 1

        # Zeros where nothing counts: 0 times a hidden state that is not finite would be NaN.
        rows = jnp.where(kept[..., None], rows, 0).reshape(-1, rows.shape[-1])
        found = jax.lax.map(of_row, (rows, labels.ravel()), batch_size=CHUNK)
        loss, hits = (array.reshape(labels.shape) for array in found)
        return jnp.where(kept, loss * weights, 0), hits & kept


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
