"""How many operations a step of a decoder needs at least: what model flops utilisation is measured by."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from regjax.models import DecoderConfig
from regjax.objectives import Sft
from regjax.token_grid import TokenGrid


@dataclasses.dataclass(frozen=True)
class Forward:
    """Floating-point operations of one row's forward pass, by what they belong to."""

    kernels: float
    """Products of the layers with their kernels."""
    attention: float
    """Scores, and the sum of values they weigh; of the pairs that a causal mask or window leaves."""
    head: float
    """Logits."""

    @property
    def total(self) -> float:
        return self.kernels + self.attention + self.head


def forward(config: DecoderConfig, length: int, head_rows: int) -> Forward:
    """A row of L tokens, of which `head_rows` go through the head; two operations a multiplication.

    The layers' kernels take `2 L N P` operations, with P entries in the kernels of one layer, attention
    `4 C H` for each pair of a query and a key that it sees, the head `2 D V` a row. Norms, rotations,
    softmax and the embedding's look-up count for nothing, as is usual (Chowdhery et al., 2022, *PaLM*,
    appendix B). A packed row counts as if its examples saw each other.
    """
    heads = config.head_dim * config.heads
    keys = config.head_dim * config.key_value_heads
    kernels = config.width * (2 * heads + 2 * keys + 3 * config.mlp_width)
    seen = {"global": length * (length + 1) / 2}
    if config.sliding_window is not None:
        window = min(config.sliding_window, length)
        seen["local"] = window * (window + 1) / 2 + (length - window) * window
    pairs = sum(seen[kind] for kind in config.layer_kinds)
    return Forward(
        kernels=2.0 * length * config.layers * kernels,
        attention=4.0 * heads * pairs,
        head=2.0 * head_rows * config.width * config.vocabulary_size,
    )


def training(config: DecoderConfig, length: int, head_rows: int, trained: Iterable[str]) -> float:
    """Operations of one row's forward and backward pass, where the parameters `trained` (paths) learn.

    The backward pass goes through everything after the first trained parameter (once the forward
    pass, twice for attention, both of whose factors are computed), and once more for the gradients of
    the kernels that are trained. With all parameters trained that is three times the forward pass; with
    a frozen model under a soft prompt or adapters about two thirds of it. What is computed again to save
    memory counts for nothing, nor do an adapter's own products.

    >>> config = DecoderConfig()
    >>> everything = training(config, 64, 1, ["embedding/table", "layers/mlp/up/kernel", "head/kernel"])
    >>> everything == 3 * forward(config, 64, 1).total
    True
    """
    paths = list(trained)
    once = forward(config, length, head_rows)
    if not paths:
        return once.total
    in_head = [path for path in paths if path.startswith(("head/", "final_norm/"))]
    if len(in_head) == len(paths):
        return once.total + once.head * (1 + ("head/kernel" in paths))
    tied = config.tied_embeddings and "embedding/table" in paths
    layers = any(path.startswith("layers/") and path.endswith("/kernel") for path in paths)
    gradient = once.kernels * layers + once.head * ("head/kernel" in paths or tied)
    return once.total + (once.kernels + 2 * once.attention + once.head) + gradient


def of_row(
    config: DecoderConfig,
    objective: Any,
    codec: TokenGrid | None,
    batch: Mapping[str, Any],
    trained: Iterable[str],
) -> float:
    """Operations of one row of a training step, of arrays or shapes `[..., L]` and `[..., S]`.

    An objective that is not known here counts as one that reads the scores, or the labels where there
    is no codec.
    """
    length, labels, slots = (
        batch[key].shape[-1] for key in ("tokens", "labels", "score_positions")
    )
    if isinstance(objective, Sft) or codec is None:
        rows = length if getattr(objective, "tokens", "") == "all" else labels
        return training(config, length, rows, trained)
    if codec.single_token:
        return training(config, length, slots, trained)
    candidates, most = codec.tokens.shape
    return candidates * training(config, length + most, most, trained)
