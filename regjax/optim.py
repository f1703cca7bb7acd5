"""Optimizers and schedules by config, on optax."""

from __future__ import annotations

import dataclasses
import math
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
    """Factor on the learning rate. Adafactor's weight decay has no learning rate in it: a group at 0 still
    decays."""

    weight_decay: float | None = None
    """Weight decay of the group; None: the optimizer's."""

    factored: bool | None = None
    """Adafactor's second moment of the group's matrices as row and column means; None: the optimizer's."""


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """The rule that turns gradients into updates, all of them optax's.

    Adafactor (Shazeer & Stern, 2018, without momentum and with a rate of its own) at update t = 1, 2, ...
    of a parameter `p` with gradient `g`, at the learning rate `lr` of that update:

        d_t = 1 - t^-decay_exponent
        v_t = d_t v_{t-1} + (1 - d_t) g^2      (as the product of its row and column means if factored)
        y   = g / sqrt(v_t), divided by RMS(y) if that is above 1
        p  <- (1 - weight_decay) p - lr y      (lr max(RMS(p), 1e-3) with parameter_scale)

    Its first update, not factored, is `lr` against the gradient's sign at every entry whatever the size of
    the gradient (above some 1e-12: optax adds 1e-30 to its square; one of exactly 0 leaves its entry where
    it is), and the RMS of `lr y` is never above `lr`.

    Raises:
      InputError: for numbers out of range, and for weight decay or the parameter scale where it has no
        effect.
    """

    name: Literal["adamw", "adafactor", "sgd"] = "adamw"
    """Update rule."""

    learning_rate: float = 1e-3
    """Peak learning rate."""

    schedule: Literal["cosine", "linear", "constant", "steps"] = "cosine"
    """How the rate goes down after the warm-up, over the stage's steps."""

    milestones: tuple[float, ...] = (0.5, 0.75)
    """Of the schedule `steps`: the shares of the stage's steps at which the rate is multiplied by
    `milestone_scale`."""

    milestone_scale: float = 0.1
    """Factor on the rate at each milestone."""

    warmup: float = 0.1
    """Share of the stage's steps over which the rate rises linearly: the first update is at one step's
    worth of the rise, the last of these at the peak."""

    final_scale: float = 0.0
    """Where cosine and linear end, one step after the stage's last update, as a share of the peak."""

    clip_norm: float = 1.0
    """Gradients are scaled down to this global norm; 0: never."""

    weight_decay: float = 0.0
    """Weight decay, on everything but parameters named `scale` or `bias`. Decoupled: an update takes away
    this share of the parameter with adafactor, this times the learning rate with adamw. With sgd this times
    the parameter is added to the gradient, before the momentum, as torch does."""

    b1: float = 0.9
    """Decay of adamw's first moment; momentum of sgd (0: none)."""

    nesterov: bool = False
    """Nesterov's momentum, of sgd."""

    b2: float = 0.999
    """Decay of adamw's second moment."""

    epsilon: float = 1e-8
    """Added to adamw's denominator."""

    decay_exponent: float = 0.8
    """Adafactor's second moment forgets by `1 - t^-decay_exponent` at update t."""

    factored: bool = True
    """Adafactor's second moment of matrices as row and column means, where the two largest axes are 128 or
    longer; off for soft prompts."""

    parameter_scale: bool = False
    """Adafactor's rate times the RMS of the parameter."""

    groups: tuple[ParameterGroup, ...] = ()
    """Parameters with a rate or a weight decay of their own."""

    def __post_init__(self) -> None:
        _check(self)


def schedule(config: Optimizer, steps: int) -> optax.Schedule:
    """Learning rate of update t = 0, 1, ..., steps - 1, with `W = round(warmup * steps)`:

        t < W:   peak (t + 1) / W
        t >= W:  peak (f + (1 - f) d(u)),   u = (t - W) / (steps - W),   f = final_scale

    where `d(u)` is `(1 + cos(pi u)) / 2` (cosine), `1 - u` (linear) or 1 (constant). With `steps` the rate
    is `peak milestone_scale^m` with m the number of milestones s with `t >= round(s steps)`. No update is
    at a rate of 0: the rise begins one step in, and the decay ends one step after the last update.

    >>> rate = schedule(Optimizer(learning_rate=1.0, schedule="linear", warmup=0.5), 8)
    >>> [float(rate(t)) for t in range(8)]
    [0.25, 0.5, 0.75, 1.0, 1.0, 0.75, 0.5, 0.25]
    """
    warmup = round(config.warmup * steps)
    peak, rest = config.learning_rate, max(steps - warmup, 1)
    if config.schedule == "cosine":
        decay = optax.cosine_decay_schedule(peak, rest, alpha=config.final_scale)
    elif config.schedule == "linear":
        decay = optax.linear_schedule(peak, peak * config.final_scale, rest)
    elif config.schedule == "steps":
        places = [round(share * steps) - warmup for share in config.milestones]
        decay = optax.piecewise_constant_schedule(
            peak, dict.fromkeys(places, config.milestone_scale)
        )
    else:
        decay = optax.constant_schedule(peak)
    if warmup == 0:
        return decay
    rise = optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1))
    return optax.join_schedules([rise, decay], [warmup])


def build(config: Optimizer, steps: int, params: Mapping[str, Any]) -> optax.GradientTransformation:
    """The optax transformation for flat parameters `{path: array}`: clipping, rule, schedule, groups.

    Raises:
      InputError: for a group whose pattern matches no parameter.
    """
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
        return optax.adafactor(
            rate,
            decay_rate=config.decay_exponent,
            multiply_by_parameter_scale=config.parameter_scale,
            factored=config.factored if group.factored is None else group.factored,
            weight_decay_rate=decay or None,
            weight_decay_mask=decays,
        )
    if config.name == "sgd":
        rule = optax.sgd(rate, momentum=config.b1 or None, nesterov=config.nesterov)
        return optax.chain(optax.add_decayed_weights(decay, decays), rule) if decay else rule
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
    """Which parameters weight decay touches: all but those named `scale` (of norms) or `bias`."""
    return {path: path.rpartition("/")[2] not in ("scale", "bias") for path in params}


def _check(config: Optimizer) -> None:
    numbers = [
        ("learning_rate", config.learning_rate, "above 0", config.learning_rate > 0),
        ("warmup", config.warmup, "in 0..1", 0 <= config.warmup <= 1),
        ("final_scale", config.final_scale, "in 0..1", 0 <= config.final_scale <= 1),
        ("milestone_scale", config.milestone_scale, "above 0", config.milestone_scale > 0),
        ("clip_norm", config.clip_norm, "0 or above", config.clip_norm >= 0),
        ("weight_decay", config.weight_decay, "0 or above", config.weight_decay >= 0),
        ("b1", config.b1, "from 0 to below 1", 0 <= config.b1 < 1),
        ("b2", config.b2, "from 0 to below 1", 0 <= config.b2 < 1),
        ("epsilon", config.epsilon, "above 0", config.epsilon > 0),
        ("decay_exponent", config.decay_exponent, "above 0", config.decay_exponent > 0),
    ]
    for index, group in enumerate(config.groups):
        scale, decay = group.learning_rate_scale, group.weight_decay or 0.0
        place = f"groups[{index}]"
        numbers += [
            (f"{place}.learning_rate_scale", scale, "0 or above", scale >= 0),
            (f"{place}.weight_decay", decay, "0 or above", decay >= 0),
        ]
    for name, value, expected, right in numbers:
        if not (right and math.isfinite(value)):
            raise InputError(f"optimizer.{name} is {value}; it has to be {expected}")
    shares = [round(share, 9) for share in config.milestones]
    if shares != sorted(set(shares)) or not all(0 < share < 1 for share in shares):
        raise InputError(
            f"optimizer.milestones are {config.milestones}; expected rising shares in 0..1"
        )
    if config.schedule == "steps" and config.milestones and config.milestones[0] < config.warmup:
        raise InputError(
            f"optimizer.milestones begin at {config.milestones[0]}, in the warm-up "
            f"({config.warmup}); they have to come after it"
        )
    if config.nesterov and (config.name != "sgd" or not config.b1):
        raise InputError("optimizer.nesterov has an effect with sgd and b1 above 0 alone")
    if config.parameter_scale and config.name != "adafactor":
        raise InputError(
            f"optimizer.parameter_scale is True, which has no effect with {config.name}; set it to "
            "False or use adafactor"
        )
