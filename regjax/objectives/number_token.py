"""Cross-entropy on the score with the number token loss beside it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp

from regjax import losses, scoring
from regjax.models import Apply
from regjax.objectives.objective import Sums, targets_and_weights, weighted
from regjax.objectives.raft import nearest_value_cross_entropy
from regjax.token_grid import TokenGrid


@dataclasses.dataclass(frozen=True)
class NumberToken:
    """`-log p(str(y) | x) + weight * number_token(y)`, averaged over examples.

    Zausinger et al., 2025, *Regress, don't guess*. Both terms are taken at the score, over the whole
    grid (the authors' code works digit by digit).
    """

    kind: Literal["wasserstein", "mse"] = "wasserstein"
    """Distance between the distribution over the grid and the target."""

    weight: float = 0.3
    """Weight of the number token loss beside the cross-entropy."""

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
        cross_entropy = nearest_value_cross_entropy(log_probs, targets, codec)
        distance = losses.number_token(log_probs, targets, codec.values, kind=self.kind)
        mass = jnp.exp(jax.nn.logsumexp(log_probs, axis=-1))
        return {
            "loss": weighted(cross_entropy + self.weight * distance, weights),
            "cross_entropy": weighted(cross_entropy, weights),
            "number_token": weighted(distance, weights),
            "grid_mass": weighted(mass, weights),
        }
