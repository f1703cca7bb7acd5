"""What an objective is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import jax
import jax.numpy as jnp

from regjax.models import Apply
from regjax.token_grid import TokenGrid

Sums = dict[str, tuple[jax.Array, jax.Array]]
"""Name -> (sum, weight), both float32 scalars; the average is `sum / weight`, formed once, after the
sums and the weights have been added over micro-batches, devices and hosts."""


class Objective(Protocol):
    """A pure function of a model, its parameters and a batch.

    The entry `"loss"` is minimised; all others are reported. An objective is usually a frozen dataclass
    whose fields are its hyper-parameters, so that a config and the command line can set them, but any
    function of this signature serves.
    """

    def __call__(
        self,
        model: Apply,
        params,
        batch: Mapping[str, jax.Array],
        key: jax.Array,
        codec: TokenGrid,
    ) -> Sums: ...


def targets_and_weights(batch: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """`scores` and `weights` `[B, S]`, the scores 0 where the weight is 0.

    A score that is no number would otherwise reach the gradient of the whole batch as 0 * NaN.
    """
    weights = jnp.asarray(batch["weights"])
    return jnp.where(weights > 0, batch["scores"], 0), weights


def weighted(per_example: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`(sum_i w_i x_i, sum_i w_i)`; entries of weight 0 count for nothing even where they are not finite."""
    kept = (per_example * weights).sum(where=weights > 0)
    return kept, weights.sum()
