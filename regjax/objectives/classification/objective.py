"""What an objective of image classification is, and what these objectives share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from regjax.errors import InputError

if TYPE_CHECKING:
    from regjax.models.vision import Outputs

Batch = Mapping[str, jax.Array]
"""`labels [B]`, those trained on, and `targets [B, C]`, where labels are mixed (without it: one-hot
labels). `teacher_logits [T, B, C]` of the stage's T teachers, where it has any."""

Given = Mapping[str, jax.Array]
"""What the objective made of the facts of its run."""

Extras = Mapping[str, jax.Array]
"""State of an objective: part of the training state, saved and restored with it."""

Sums = dict[str, tuple[jax.Array, jax.Array]]
"""Name -> (sum, weight), float32 scalars; `sum / weight` is the average, `"loss"` what is optimised."""

STATIC = {"static": True}
"""Metadata of a field that is part of the compiled program: no leaf of the pytree."""


class Facts(NamedTuple):
    """What is known of a run's data and teachers before a stage. NumPy arrays, on the host."""

    num_classes: int
    """C."""

    counts: np.ndarray
    """`[C]`, training examples of every class, by the labels trained on."""

    noise_matrix: np.ndarray
    """`[C, C]`, the noise that was put in: row i the distribution of the label of true class i."""

    labels: np.ndarray
    """`[N]`, the labels trained on."""

    held_out_labels: np.ndarray | None = None
    """`[M]`, true labels; `None` without held-out examples."""

    teacher_logits: np.ndarray | None = None
    """`[T, N, C]`, of the training images as they are; `None` without cached teachers."""

    held_out_teacher_logits: np.ndarray | None = None
    """`[T, M, C]`."""

    seed: int = 0
    """Of the run."""


class Objective(Protocol):
    """A pure function of one run's outputs and batch; its hyper-parameters are fields.

    It may also have

        given(facts) -> Given
            NumPy, once per run before the stage; refuses what it cannot be trained with.
            Without it, `given` is empty.

        initial(given) -> Extras
        adjust_every: int
        adjust(extras, outputs, batch, given) -> Extras
            State of its own: every `adjust_every` steps (0: never) `adjust`, traced, is given the
            outputs on the held-out examples and their batch. An objective with `initial` is
            called as `objective(outputs, batch, given, extras)`.
    """

    def __call__(self, outputs: Outputs, batch: Batch, given: Given) -> Sums: ...


def of_targets(loss: Callable[[jax.Array], jax.Array], batch: Batch) -> jax.Array:
    """`sum_k t_k loss(k)` `[B]`, the mean loss under the batch's targets t, without all C losses.

    Targets have weight on the label and at most one class more, as mixup makes them. `loss` is a
    function of integer labels `[B]`.
    """
    labels = batch["labels"]
    if "targets" not in batch:
        return loss(labels)
    targets = batch["targets"]
    is_label = jnp.arange(targets.shape[-1]) == labels[..., None]
    others = jnp.where(is_label, 0.0, targets)
    rest = others.max(axis=-1)
    # Not an arbitrary class where there is no second one: its loss may be infinite, and 0 * inf.
    partner = jnp.where(rest > 0.0, jnp.argmax(others, axis=-1), labels)
    share = jnp.sum(targets, axis=-1, where=is_label)
    return share * loss(labels) + rest * loss(partner)


def sums(
    losses: jax.Array, outputs: Outputs, batch: Batch, *, weights: jax.Array | None = None
) -> Sums:
    """`loss`, the losses `[B]` over the batch, or over the sum of `weights [B]` which they are to be
    multiplied by; and `accuracy` on the labels trained on."""
    count = jnp.asarray(losses.size, jnp.float32)
    hits = jnp.argmax(outputs.logits, axis=-1) == batch["labels"]
    loss = (losses.sum(), count) if weights is None else ((weights * losses).sum(), weights.sum())
    return {"loss": loss, "accuracy": (hits.sum().astype(jnp.float32), count)}


def number(value: object, name: str, low: float, high: float = np.inf, *, above: bool = False):
    """Raises `InputError` unless a Python number lies in [low, high], or in (low, high] if `above`.

    What a compiled step makes of the field, an array or a tracer, is not checked again.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    if not low <= value <= high or (above and value == low):
        interval = f"{'(' if above else '['}{low:g}, {high:g}]"
        raise InputError(f"{name} is {value}, expected a number in {interval}")


def training_counts(facts: Facts, name: str) -> np.ndarray:
    """`counts [C]` float32; `InputError` where a class has no training example."""
    counts = np.asarray(facts.counts, np.float32)
    if not np.all(counts > 0):
        raise InputError(
            f"{name}: class {int(np.argmin(counts))} has no training example, and its frequency is "
            "needed; take more data or leave the class out"
        )
    return counts


def held_out_labels(facts: Facts, name: str) -> np.ndarray:
    """`held_out_labels [M]`; `InputError` where there are none, or a class has none."""
    if facts.held_out_labels is None:
        raise InputError(
            f"{name} needs held-out examples: set held_out of the data to a share of the training set"
        )
    labels = np.asarray(facts.held_out_labels)
    counts = np.bincount(labels, minlength=facts.num_classes)
    if not np.all(counts > 0):
        raise InputError(
            f"{name}: class {int(np.argmin(counts))} has no held-out example; raise held_out of the "
            "data"
        )
    return labels
