"""Regression-aware fine-tuning: the squared error of the expected score."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp

from regjax import losses, scoring
from regjax.models import Apply
from regjax.objectives.objective import Sums, targets_and_weights, weighted
from regjax.token_grid import TokenGrid


@dataclasses.dataclass(frozen=True)
class Raft:
    """RAFT: `(y - sum_k p(str(y_k) | x) y_k)^2`, averaged over examples.

    Lukasik et al., 2025, *Better autoregressive regression with LLMs*. The paper's loss has no
    cross-entropy term; from a model whose probabilities are nearly one-hot the gradient vanishes, and a
    little cross-entropy cures that.
    """

    normalize: bool = False
    """Renormalise the probabilities over the grid (the paper does not); the read-out that goes with it is
    `normalized_mean`."""

    loss: Literal["squared", "absolute", "huber"] = "squared"
    """Loss of the expected score."""

    cross_entropy: float = 0.0
    """Weight of `-log p(str(y) | x)` of the grid value nearest to the target, added per example."""

    def __call__(
        self,
        model: Apply,
        params,
        batch: Mapping[str, jax.Array],
        key: jax.Array,
        codec: TokenGrid,
    ) -> Sums:
        targets, weights = targets_and_weights(batch)
        log_probs = scoring.score_log_probs(model, params, batch, codec, where=weights > 0)
        loss = losses.raft(
            log_probs, targets, codec.values, normalize=self.normalize, loss=self.loss
        )
        if self.cross_entropy:
            loss += self.cross_entropy * nearest_value_cross_entropy(log_probs, targets, codec)
        mass = jnp.exp(jax.nn.logsumexp(log_probs, axis=-1))
        return {"loss": weighted(loss, weights), "grid_mass": weighted(mass, weights)}


def nearest_value_cross_entropy(
    log_probs: jax.Array, targets: jax.Array, codec: TokenGrid
) -> jax.Array:
    """`-log p(str(y_k) | x)` `[...]` for the grid value `y_k` nearest to each target (ties: the lower)."""
    nearest = jnp.argmin(jnp.abs(jnp.asarray(codec.values) - targets[..., None]), axis=-1)
    return -jnp.take_along_axis(log_probs, nearest[..., None], axis=-1)[..., 0]
