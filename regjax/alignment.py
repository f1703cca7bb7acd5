"""How alike the gradients of two labellings are: what a model learns of a task's format alone.

The same inputs once with their true labels and once with labels shuffled among them: the shuffled
ones keep the format and lose the meaning. As long as the two gradients point the same way, what is
learned is the format (Wang et al., 2024, *Two-stage LLM fine-tuning with less specialization and
more generalization*, section 3 and C.8).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from regjax import paths
from regjax.errors import InputError
from regjax.models import Apply
from regjax.objectives import Objective
from regjax.token_grid import TokenGrid

LAST_LAYER_GROUPS = {
    "mlp": r"^layers/mlp/(gate|up|down)/kernel$",
    "query": r"^layers/attention/query/kernel$",
    "key": r"^layers/attention/key/kernel$",
    "value": r"^layers/attention/value/kernel$",
}
"""The paper's groups, in a decoder: kernels of all layers, of which the last is looked at."""

_STACKED = re.compile(r"(^|/)layers/(?!\d+/)")


class Gradients(NamedTuple):
    """Gradients of a summed loss, group by group; a pytree, added by `add`."""

    sums: dict[str, jax.Array]
    """`[n]` float32 by group: the gradients of all its entries, one after the other."""
    weight: jax.Array
    """The summed weight of the loss, float32; `sums / weight` are the gradients of the average."""


def make_gradients(
    model: Apply,
    objective: Objective,
    codec: TokenGrid | None = None,
    *,
    groups: Mapping[str, str] = LAST_LAYER_GROUPS,
    layer: int | None = -1,
) -> Callable[[Any, Mapping[str, jax.Array]], Gradients]:
    """The compiled `(params, batch) -> Gradients` of an objective's loss, with respect to the groups'
    parameters alone.

    Args:
      model: as everywhere.
      objective: its `loss` is differentiated; what is random in it is the same in every call.
      codec: what the objective needs of a grid; None where it needs none.
      groups: a short name and a regular expression of parameter paths, see `regjax.paths`. A soft
        prompt is `soft_prompt/NAME`, a parameter like any other.
      layer: of parameters that hold a stack of layers, `layers/NAME...` `[N, ...]`, this layer's
        alone, counted from the end where negative; None: all layers'. The backward pass of scanned
        layers goes through all of them either way.

    Raises (when called):
      InputError: for a pattern that matches no parameter, and for a layer that is not there.
    """

    def gradients(params, batch: Mapping[str, jax.Array]) -> Gradients:
        flat = paths.flatten(params)
        members = {
            name: list(paths.split_by_patterns(flat, [pattern])[0])
            for name, pattern in groups.items()
        }
        chosen = {
            path: _part(path, flat[path], layer) for group in members.values() for path in group
        }

        def loss(chosen):
            whole = {path: _whole(path, flat[path], part, layer) for path, part in chosen.items()}
            tree = paths.unflatten({**flat, **whole})
            return objective(model, tree, batch, jax.random.key(0), codec)["loss"]  # type: ignore[arg-type]

        found, weight = jax.grad(loss, has_aux=True)(chosen)
        rows = {path: leaf.astype(jnp.float32).ravel() for path, leaf in found.items()}
        sums = {name: jnp.concatenate([rows[p] for p in group]) for name, group in members.items()}
        return Gradients(sums, jnp.asarray(weight, jnp.float32))

    return jax.jit(gradients)


def add(first: Gradients, second: Gradients) -> Gradients:
    """The gradients of both batches together: sums and weights are added, nothing is averaged.

    >>> one = Gradients({"mlp": jnp.array([1.0, 2.0])}, jnp.float32(3))
    >>> add(one, one).sums["mlp"]
    Array([2., 4.], dtype=float32)
    """
    return jax.tree.map(jnp.add, first, second)


def cosines(first: Gradients, second: Gradients) -> dict[str, float]:
    """`<g, h> / (|g| |h|)` by group, over all its entries, in float32; in [-1, 1] up to rounding.

    Exactly 1 where the gradients are bit-equal; nan where one is zero or not finite.

    >>> g = Gradients({"key": jnp.array([3.0, 4.0])}, jnp.float32(1))
    >>> h = Gradients({"key": jnp.array([0.0, 2.0])}, jnp.float32(1))
    >>> round(cosines(g, h)["key"], 6)
    0.8
    """
    found = {}
    for name, sums in first.sums.items():
        both, one, other = map(float, _products(sums, second.sums[name]))
        # Two float32 multiply exactly in Python's floats: equal numbers give exactly 1.
        norms = math.sqrt(one * other)
        found[name] = both / norms if norms > 0 else math.nan
    return found


def gradient_alignment(
    model: Apply,
    objective: Objective,
    params: Any,
    batch: Mapping[str, jax.Array],
    shuffled: Mapping[str, jax.Array],
    codec: TokenGrid | None = None,
    *,
    groups: Mapping[str, str] = LAST_LAYER_GROUPS,
    layer: int | None = -1,
) -> dict[str, float]:
    """Cosine by group of the gradients of one batch with its true and with shuffled labels.

    Over several batches, or steps of training: `make_gradients` once, `add` over the batches of each
    labelling, then `cosines`.

    Args:
      model: as everywhere.
      objective: its `loss` is differentiated.
      params: of the model, soft prompts among them.
      batch: with the true labels.
      shuffled: the same inputs with the labels shuffled among them.
      codec: what the objective needs of a grid.
      groups: see `make_gradients`.
      layer: see `make_gradients`.
    """
    gradients = make_gradients(model, objective, codec, groups=groups, layer=layer)
    return cosines(gradients(params, batch), gradients(params, shuffled))


@jax.jit
def _products(g: jax.Array, h: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    # Scaled to 1 at the largest entry: the squares of small gradients would be 0 in float32. Products
    # and sums, not a dot, which a TPU rounds to bfloat16.
    g, h = (x / jnp.max(jnp.abs(x)) for x in (g, h))
    return jnp.sum(g * h), jnp.sum(g * g), jnp.sum(h * h)


def _part(path: str, leaf: jax.Array, layer: int | None) -> jax.Array:
    if layer is None or not _STACKED.search(path):
        return leaf
    if not -len(leaf) <= layer < len(leaf):
        raise InputError(f"layer is {layer}, but {path} holds a stack of {len(leaf)} layers")
    return leaf[layer]


def _whole(path: str, leaf: jax.Array, part: jax.Array, layer: int | None) -> jax.Array:
    return part if part.shape == leaf.shape else leaf.at[layer].set(part)
