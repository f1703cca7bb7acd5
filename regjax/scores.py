"""Numbers as strings: grids of numeric targets and how a tokenizer writes them."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class TokenGrid:
    tokens: np.ndarray  # [K, T] int32, padded with 0
    mask: np.ndarray  # [K, T] bool, True on real tokens
    values: np.ndarray  # [K] float32, ascending
    terminator: int | None = None

    @property
    def single_token(self) -> bool:
        return self.tokens.shape[1] == 1


jax.tree_util.register_dataclass(
    TokenGrid, data_fields=["tokens", "mask", "values"], meta_fields=["terminator"]
)
