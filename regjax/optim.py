"""Optimizers and schedules by config, on optax."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax.numpy as jnp
import optax

from regjax import paths
from regjax.errors import InputError


@dataclasses.dataclass(frozen=True)
class ParameterGroup:
    """Parameters whose path matches `pattern` learn at their own rate; the first match counts."""

    pattern: str
    """Regular expression searched in the parameter's path, e.g. `^embedding/`."""

    learning_rate_scale: float = 1.0
    """Factor on the learning rate."""

    weight_decay: float | None = None
    """Weight decay of the group; None: the optimizer's."""


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """The rule that turns gradients into updates."""

    name: Literal["adamw", "adafactor", "sgd"] = "adamw"
    """Update rule. adafactor has no weight decay here: optax multiplies it by nothing."""

    learning_rate: float = 1e-3
    """Peak learning rate."""

    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the rate goes down after the warm-up, over the stage's steps."""

    warmup: float = 0.1
    """Share of the stage's steps over which the rate rises linearly from 0."""

    final_scale: float = 0.0
    """The rate at the last step, as a share of the peak (cosine and linear)."""

    clip_norm: float = 1.0
    """Gradients are scaled down to this global norm; 0: never."""

    weight_decay: float = 0.0
    """Decoupled weight decay of adamw, on everything but norm scales and biases."""

    b1: float = 0.9
    """Decay of adamw's first moment; momentum of sgd (0: none)."""

    b2: float = 0.999
    """Decay of adamw's second moment."""

    epsilon: float = 1e-8
    """Added to adamw's denominator."""

    groups: tuple[ParameterGroup, ...] = ()
    """Parameters with a rate or a weight decay of their own."""


def schedule(config: Optimizer, steps: int) -> optax.Schedule:
    """Learning rate by step: linear warm-up over `warmup * steps`, then the decay to the last step."""
    warmup = round(config.warmup * steps)
    peak, rest = config.learning_rate, max(steps - warmup, 1)
    if config.schedule == "cosine":
        decay = optax.cosine_decay_schedule(peak, rest, alpha=config.final_scale)
    elif config.schedule == "linear":
        decay = optax.linear_schedule(peak, peak * config.final_scale, rest)
    else:
        decay = optax.constant_schedule(peak)
    if warmup == 0:
        return decay
    # The first update is at 1/warmup of the peak: a rate of exactly 0 would waste the step.
    rise = optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1))
    return optax.join_schedules([rise, decay], [warmup])


def build(config: Optimizer, steps: int, params: Mapping[str, Any]) -> optax.GradientTransformation:
    """The optax transformation for flat parameters `{path: array}`: clipping, rule, schedule, groups.

    Raises:
      InputError: for numbers out of range and for a group whose pattern matches no parameter.
    """
    _check(config)
    everything = ParameterGroup(".*")
    groups = (*config.groups, everything)
    for group in config.groups:
        paths.split_by_patterns(params, [group.pattern])
    labels = {
        path: next(i for i, group in enumerate(groups) if paths.matches(path, [group.pattern]))
        for path in params
    }
    rules = {i: _rule(config, group, steps) for i, group in enumerate(groups)}
    rule = rules[0] if len(rules) == 1 else optax.partition(rules, labels)
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    return optax.chain(clip, rule)


def _rule(config: Optimizer, group: ParameterGroup, steps: int) -> optax.GradientTransformation:
    base = schedule(config, steps)

    def rate(count):
        return base(count) * group.learning_rate_scale

    decay = config.weight_decay if group.weight_decay is None else group.weight_decay
    if config.name == "adafactor":
        return optax.adafactor(rate, multiply_by_parameter_scale=False)
    if config.name == "sgd":
        return optax.sgd(rate, momentum=config.b1 or None)
    return optax.adamw(
        rate,
        b1=config.b1,
        b2=config.b2,
        eps=config.epsilon,
        weight_decay=decay,
        mask=decays,
        mu_dtype=jnp.float32,
    )


def decays(params: Mapping[str, Any]) -> dict[str, bool]:
    """Which parameters weight decay touches: all but norm scales and biases."""
    return {path: not path.endswith(("scale", "bias")) for path in params}


def _check(config: Optimizer) -> None:
    wrong = [
        ("learning_rate", config.learning_rate, "above 0", config.learning_rate > 0),
        ("warmup", config.warmup, "in 0..1", 0 <= config.warmup <= 1),
        ("final_scale", config.final_scale, "in 0..1", 0 <= config.final_scale <= 1),
        ("clip_norm", config.clip_norm, "0 or above", config.clip_norm >= 0),
        ("weight_decay", config.weight_decay, "0 or above", config.weight_decay >= 0),
        ("b1", config.b1, "in 0..1", 0 <= config.b1 < 1),
        ("b2", config.b2, "in 0..1", 0 <= config.b2 < 1),
    ]
    for name, value, expected, right in wrong:
        if not right:
            raise InputError(f"optimizer.{name} is {value}; it has to be {expected}")
    if config.name == "adafactor" and config.weight_decay:
        raise InputError(
            "optimizer.weight_decay has no effect with adafactor; set it to 0 or use adamw"
        )
