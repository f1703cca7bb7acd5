"""Class counts that fall from the first class to the last."""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np

from regjax.errors import InputError


@dataclasses.dataclass(frozen=True)
class LongTail:
    """How many examples of each class are kept, of C classes with n examples each.

    - `exponential`: class k keeps floor(n ratio^(-k / (C - 1))).
    - `step`: the first half of the classes keep n, the others floor(n / ratio); of an odd number of
      classes the larger half is rare.

    A ratio of 100 leaves 12,406 examples of CIFAR-10 and 10,847 of CIFAR-100 in the exponential
    form.

    Raises:
        InputError: an unknown kind, a ratio below 1 or not finite.

    References:
        Cao, Wei, Gaidon, Arechiga, Ma, *Learning Imbalanced Datasets with Label-Distribution-Aware
        Margin Loss*, NeurIPS 2019, https://arxiv.org/abs/1906.07413.
    """

    kind: Literal["exponential", "step"] = "exponential"
    ratio: float = 100.0
    """Examples of the largest class for each of the smallest one."""

    def __post_init__(self) -> None:
        if self.kind not in ("exponential", "step"):
            raise InputError(f"the long tail is {self.kind!r}: expected exponential or step")
        if not 1.0 <= self.ratio < np.inf:
            raise InputError(f"the long tail's ratio is {self.ratio}: expected 1 or more")


def tail_counts(tail: LongTail, largest: int, num_classes: int) -> np.ndarray:
    """The number of examples that each class keeps, int64 `[C]`, from n = `largest`.

    >>> tail_counts(LongTail("exponential", 100), 5000, 10)
    array([5000, 2997, 1796, 1077,  645,  387,  232,  139,   83,   50])
    >>> tail_counts(LongTail("step", 100), 5000, 4)
    array([5000, 5000,   50,   50])
    """
    rank = np.arange(num_classes)
    if tail.kind == "exponential":
        exponent = rank / max(num_classes - 1, 1)
    else:
        exponent = (rank >= num_classes // 2).astype(np.float64)
    # The margin is for a power that is a whole number, and comes out a rounding error below it.
    return np.floor(largest * tail.ratio**-exponent * (1 + 1e-12)).astype(np.int64)
