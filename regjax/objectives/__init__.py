"""Objectives: what a stage minimises, as sums and weights."""

from regjax.objectives.number_token import NumberToken
from regjax.objectives.objective import Objective, Sums
from regjax.objectives.raft import Raft
from regjax.objectives.sft import Sft

__all__ = ["NumberToken", "Objective", "Raft", "Sft", "Sums"]
