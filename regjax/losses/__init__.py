"""Losses as pure functions of arrays: one float32 number per example, never a mean."""

from regjax.losses.grid import expected_score, grid_log_probs, grid_mass
from regjax.losses.regression import expected_risk, number_token, raft
from regjax.losses.tokens import token_cross_entropy

__all__ = [
    "expected_risk",
    "expected_score",
    "grid_log_probs",
    "grid_mass",
    "number_token",
    "raft",
    "token_cross_entropy",
]
