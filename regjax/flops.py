"""Model flops of a step: what its products of matrices cost, counted from the traced loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

from regjax import paths

PRODUCTS = ("dot_general", "conv_general_dilated")


def training_flops(loss: Callable, trained: Any, *rest: Any) -> float:
    """Floating-point operations of `loss(trained, *rest)` and of its gradient by `trained`.

    Counted are the products of the forward pass, 2 a b c for `[a, b]` times `[b, c]`, and for each of
    their two factors that depends on `trained` one more of the same cost, which is what the backward
    pass needs: 6 for each parameter of a matrix and token where everything is trained, 4 where only
    something before it is. Not counted are what rematerialisation or a loss in chunks computes again,
    everything elementwise, and the optimizer; attention counts in full, causal or not. These are the
    flops of "model flops utilisation". A kernel that hides its products (cuDNN's attention) counts as 0,
    a loop of unknown length as one round.

    The arguments may be `jax.ShapeDtypeStruct`s; nothing but shapes is computed.

    >>> import jax.numpy as jnp
    >>> loss = lambda weights, x: jnp.tanh(x @ weights["a"]) @ weights["b"]
    >>> training_flops(loss, {"a": jnp.ones((4, 5)), "b": jnp.ones(5)}, jnp.ones((3, 4)))
    330.0

    (2 * 3 * 4 * 5 forward, once more for `a`; 2 * 3 * 5 forward, twice more for `b` and what it meets.)
    """
    traced = jax.make_jaxpr(loss)(trained, *rest)
    count = len(jax.tree.leaves(trained))
    depends = [place < count for place in range(len(traced.jaxpr.invars))]
    return _count(traced.jaxpr, depends)[0]


def update_flops(
    model: Callable, objective: Callable, codec: Any, params: Any, frozen: Any, batch: Any
) -> float:
    """`training_flops` of an update on a batch whose leaves are `[A, B / A, ...]`, see `make_update`."""

    def loss(params, frozen, batch, key):
        return objective(model, paths.unflatten({**frozen, **params}), batch, key, codec)["loss"][0]

    micro = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), batch)
    count = jax.tree.leaves(batch)[0].shape[0]
    return count * training_flops(loss, params, frozen, micro, jax.random.key(0))


def _count(jaxpr: Jaxpr, depends: Sequence[bool]) -> tuple[float, list[bool]]:
    """The flops, and which results depend on what is trained, given which inputs do."""
    known = dict(zip(jaxpr.invars, depends, strict=True))

    def of(variables: Sequence[Any]) -> list[bool]:
        return [not isinstance(v, Literal) and known.get(v, False) for v in variables]

    total = 0.0
    for equation in jaxpr.eqns:
        flops, results = _count_equation(equation, of(equation.invars))
        total += flops
        for variable, result in zip(equation.outvars, results, strict=True):
            known[variable] = result and jnp.issubdtype(_array(variable).dtype, jnp.inexact)
    return total, of(jaxpr.outvars)


def _count_equation(equation: JaxprEqn, depends: list[bool]) -> tuple[float, list[bool]]:
    name, params = equation.primitive.name, equation.params
    if name in PRODUCTS:
        return _product(equation) * (1 + sum(depends[:2])), [any(depends)]
    if name == "stop_gradient":
        return 0.0, [False]
    if name == "scan":
        return _count_scan(params, depends)
    if name == "cond":
        branches = [_count(_open(branch), depends[1:]) for branch in params["branches"]]
        results = [any(flags) for flags in zip(*(flags for _, flags in branches), strict=True)]
        return max(flops for flops, _ in branches), results
    if name == "while":
        rest = depends[params["cond_nconsts"] :]
        flops, _ = _count(_open(params["body_jaxpr"]), rest)
        return flops, [any(rest)] * len(equation.outvars)
    inner = params.get("jaxpr", params.get("call_jaxpr"))
    if inner is None:
        return 0.0, [any(depends)] * len(equation.outvars)
    inner = _open(inner)
    if name == "pallas_call":  # what is inside works on blocks in place
        flops, _ = _count(inner, [any(depends)] * len(inner.invars))
        results = [any(depends)] * len(equation.outvars)
        return flops * math.prod(params["grid_mapping"].grid), results
    if len(inner.invars) != len(depends) or len(inner.outvars) != len(equation.outvars):
        flops, _ = _count(inner, [any(depends)] * len(inner.invars))
        return flops, [any(depends)] * len(equation.outvars)
    flops, results = _count(inner, depends)
    if name == "shard_map":
        flops *= _shards(params)
    return flops, results


def _count_scan(params: dict[str, Any], depends: list[bool]) -> tuple[float, list[bool]]:
    inner, consts, carries = _open(params["jaxpr"]), params["num_consts"], params["num_carry"]
    before = list(depends)
    while True:  # until what is carried depends on no more than it did in the round before
        flops, results = _count(inner, before)
        carried = [
            a or b
            for a, b in zip(before[consts : consts + carries], results[:carries], strict=True)
        ]
        if carried == before[consts : consts + carries]:
            return flops * params["length"], carried + results[carries:]
        before[consts : consts + carries] = carried


def _product(equation: JaxprEqn) -> float:
    left, right = (_array(variable).shape for variable in equation.invars[:2])
    results = math.prod(_array(equation.outvars[0]).shape)
    if equation.primitive.name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        return 2.0 * results * math.prod(left[axis] for axis in contracted)
    features = right[equation.params["dimension_numbers"].rhs_spec[0]]
    return 2.0 * results * math.prod(right) / features


def _shards(params: dict[str, Any]) -> int:
    """Devices that work on different parts: over the mesh's axes that any input or result is cut along."""
    specs = jax.tree.leaves(
        (params["in_specs"], params["out_specs"]),
        is_leaf=lambda leaf: isinstance(leaf, jax.sharding.PartitionSpec),
    )
    axes = {axis for spec in specs for part in spec if part for axis in _tuple(part)}
    return math.prod(params["mesh"].shape[axis] for axis in axes)


def _tuple(part: str | tuple[str, ...]) -> tuple[str, ...]:
    return (part,) if isinstance(part, str) else part


def _array(variable: Any) -> Any:
    return variable.aval


def _open(jaxpr: Jaxpr | ClosedJaxpr) -> Jaxpr:
    return jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr
