"""A model as pure functions of its parameters: what everything outside `models/` uses."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from regjax.errors import InputError

Params = dict[str, Any]


class HiddenFunction(Protocol):
    """`(params, tokens [B, L] or embeddings [B, L, D]) -> [B, L, D]`."""

    def __call__(
        self,
        params: Params,
        tokens: Array | None = None,
        *,
        embeddings: Array | None = None,
        positions: Array | None = None,
        segment_ids: Array | None = None,
    ) -> Array: ...


class Cache(NamedTuple):
    """Keys and values of the tokens that a model has read: S columns, the first `length` of them in use.

    What a column holds is told by its position and segment (0: padding), so that rows of different
    lengths share their columns.
    """

    keys: Array
    """`[N, B, S, K, C]`: layers, rows, columns, heads, size of a head."""
    values: Array
    """`[N, B, S, K, C]`."""
    positions: Array
    """`[B, S]` int32."""
    segment_ids: Array
    """`[B, S]` int32."""
    length: Array
    """int32 scalar."""


class PrefillFunction(Protocol):
    """As `HiddenFunction`, and returns a cache of the `L` columns with `room` for as many tokens more."""

    def __call__(
        self,
        params: Params,
        tokens: Array | None = None,
        *,
        room: int,
        embeddings: Array | None = None,
        positions: Array | None = None,
        segment_ids: Array | None = None,
    ) -> tuple[Array, Cache]: ...


Projection = tuple[Array, float | None]


@dataclasses.dataclass(frozen=True)
class ProjectingHead:
    """A head that is no more than a kernel and a soft cap, of factors in the kernel's type.

    head(params, hidden) = cap(hidden @ kernel),   cap(x) = soft_cap tanh(x / soft_cap), or x
    """

    logits: Callable[[Params, Array], Array]
    """`logits(params, hidden [..., D])`: float32 `[..., V]`."""
    projection: Callable[[Params], Projection]
    """`projection(params) -> (kernel [D, V], soft_cap)`, without a cap None."""

    def __call__(self, params: Params, hidden: Array) -> Array:
        return self.logits(params, hidden)


@dataclasses.dataclass(frozen=True)
class Apply:
    """A model without its parameters: pure functions, hashable, cheap to compare and to pass about.

    `dataclasses.replace(apply, hidden=...)` makes a changed model (soft prompts, adapters).
    """

    hidden: HiddenFunction
    """`hidden(params, tokens=None, *, embeddings=None, positions=None, segment_ids=None)`: the
    states `[B, L, D]` that `head` takes."""
    head: Callable[[Params, Array], Array]
    """`head(params, hidden [..., D])`: float32 logits `[..., V]`. A `ProjectingHead` where the model
    has one."""
    embed: Callable[[Params, Array], Array] | None = None
    """`embed(params, tokens [...])`: the `[..., D]` that `hidden` takes as `embeddings`; None where
    the model takes tokens only."""
    takes_segments: bool = True
    """Whether `positions` and `segment_ids` reach the model. Where they do not, rows must hold one
    example each, padded on the right only."""
    prefill: PrefillFunction | None = None
    """`prefill(params, tokens, *, room, ...) -> (hidden [B, L, D], cache)`; None: no cache."""
    step: Callable[[Params, Array, Cache], tuple[Array, Cache]] | None = None
    """`step(params, tokens [B], cache) -> (hidden [B, D], cache)`: one token more in every row, at the
    position after the row's last one, in the cache's next column."""
    takes_tasks: bool = False
    """Whether `hidden` and `prefill` take `task_ids` `[B]`, by which a row chooses its soft
    prompt; of a batch's `[B, S]` the first of each row."""

    def projection(self, params: Params) -> Projection | None:
        """`(kernel [D, V], soft_cap)` of a `ProjectingHead`; None of any other.

        With it the losses of `regjax.losses.linear` do without the logits.
        """
        return self.head.projection(params) if isinstance(self.head, ProjectingHead) else None

    def hidden_of(self, params: Params, batch: Mapping[str, Array]) -> Array:
        """`hidden` of a batch's `tokens`, `positions`, `segment_ids` and, where taken, `task_ids`."""
        return self.hidden(params, batch["tokens"], **self._places(batch))

    def prefill_of(
        self, params: Params, batch: Mapping[str, Array], room: int
    ) -> tuple[Array, Cache]:
        """`prefill` of a batch's rows, as `hidden_of`."""
        if self.prefill is None:
            raise ValueError("this model has no cache")
        return self.prefill(params, batch["tokens"], room=room, **self._places(batch))

    def _places(self, batch: Mapping[str, Array]) -> dict[str, Any]:
        places: dict[str, Any] = {name: batch.get(name) for name in ("positions", "segment_ids")}
        if self.takes_tasks:
            places["task_ids"] = jnp.asarray(batch["task_ids"])[:, 0]
        return places

    def __call__(
        self,
        params: Params,
        tokens: Array | None = None,
        *,
        embeddings: Array | None = None,
        positions: Array | None = None,
        segment_ids: Array | None = None,
    ) -> Array:
        """Float32 logits `[B, L, V]`: `head(params, hidden(params, ...))`."""
        states = self.hidden(
            params, tokens, embeddings=embeddings, positions=positions, segment_ids=segment_ids
        )
        return self.head(params, states)


@dataclasses.dataclass(frozen=True)
class ModuleMethod:
    """One method of an NNX module, as a function of its parameters."""

    structure: nnx.GraphDef[Any] = dataclasses.field(repr=False)
    name: str

    def __call__(self, params: Params, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.module(params), self.name)(*args, **kwargs)

    def module(self, params: Params) -> Any:
        """The module with these parameters."""
        return nnx.merge(self.structure, params)


def split(model: nnx.Module) -> tuple[Apply, Params]:
    """`(apply, params)` of an NNX module with the methods `hidden` and `head`.

    `embed`, `prefill` and `step` are taken over where the module has them; with a method
    `projection`, the head is a `ProjectingHead`.

    `params` is a plain nested dict of arrays, such as `params["embedding"]["table"]`; two models
    of one configuration give equal `apply`.

    Raises:
        TypeError: the module lacks a method, or has state that is not a parameter.
    """
    missing = [name for name in ("hidden", "head") if not callable(getattr(model, name, None))]
    if missing:
        raise TypeError(
            f"{type(model).__name__} has no method {' and no method '.join(missing)}; a bare "
            "function (params, tokens) -> logits goes through from_function"
        )
    structure, state, *rest = nnx.split(model, nnx.Param, ...)
    if jax.tree.leaves(rest):
        paths = ", ".join(
            jax.tree_util.keystr(path[1:]) for path, _ in jax.tree.leaves_with_path(rest)
        )
        raise TypeError(
            f"{type(model).__name__} has state that is not nnx.Param: {paths}; a model here is a "
            "pure function of its parameters"
        )
    methods: dict[str, Any] = {
        name: ModuleMethod(structure, name)
        for name in ("hidden", "head", "embed", "prefill", "step")
        if callable(getattr(model, name, None))
    }
    if callable(getattr(model, "projection", None)):
        methods["head"] = ProjectingHead(methods["head"], ModuleMethod(structure, "projection"))
    apply = Apply(**methods)
    return apply, nnx.to_pure_dict(state)


def from_function(
    function: Callable[..., Array] | None = None,
    *,
    hidden: Callable[..., Array] | None = None,
    head: Callable[[Params, Array], Array] | None = None,
) -> Apply:
    """Wraps `function(params, tokens [B, L]) -> logits [B, L, V]`, say a Linen `module.apply`.

    Of `embeddings`, `positions` and `segment_ids`, those that are named in the function's
    signature (for `module.apply`, in that of `module.__call__`) are passed on. A function that does
    not name `segment_ids` cannot tell examples or padding apart: `takes_segments` is False, and
    segment ids of rows that are packed or padded on the left raise where their values are known,
    which they are not inside `jax.jit`.

    Args:
        function: gives logits at once; its logits then are the hidden states, and `head` makes
            them float32.
        hidden: in place of `function`: gives `[B, L, D]`; `head` then gives logits `[..., V]`.
        head: `(params, hidden [..., D]) -> logits [..., V]`.

    >>> table = jnp.arange(6.0).reshape(3, 2)
    >>> apply = from_function(lambda params, tokens: params["table"][tokens])
    >>> apply({"table": table}, jnp.array([[2, 0]]))
    Array([[[4., 5.],
            [0., 1.]]], dtype=float32)
    >>> apply.takes_segments
    False

    Raises:
        TypeError: neither `function` nor both `hidden` and `head` were given.
    """
    if function is not None and hidden is None and head is None:
        hidden, head = function, _identity
    elif function is not None or hidden is None or head is None:
        raise TypeError("from_function takes either one function, or both hidden and head")
    keywords = _keywords(hidden)
    return Apply(
        _Hidden(hidden, keywords), _Float32(head), takes_segments="segment_ids" in keywords
    )


def _identity(params: Params, hidden: Array) -> Array:
    return hidden


def _keywords(function: Callable[..., Array]) -> frozenset[str]:
    owner = getattr(function, "__self__", None)
    is_linen_apply = owner is not None and getattr(function, "__name__", "") == "apply"
    parameters = inspect.signature(type(owner).__call__ if is_linen_apply else function).parameters
    return frozenset({"embeddings", "positions", "segment_ids"} & parameters.keys())


@dataclasses.dataclass(frozen=True)
class _Float32:
    """A head whose logits are float32."""

    function: Callable[[Params, Array], Array]

    def __call__(self, params: Params, hidden: Array) -> Array:
        return self.function(params, hidden).astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class _Hidden:
    """Calls a function with those of the keywords that it names."""

    function: Callable[..., Array]
    keywords: frozenset[str]

    def __call__(self, params: Params, tokens: Array | None = None, **given: Array | None) -> Array:
        if given.get("embeddings") is not None and "embeddings" not in self.keywords:
            raise ValueError(f"{self.function} takes tokens only, not embeddings")
        if given.get("segment_ids") is not None and "segment_ids" not in self.keywords:
            _require_one_segment(given["segment_ids"])
        passed = {name: given[name] for name in self.keywords if given.get(name) is not None}
        return self.function(params, tokens, **passed)


def _require_one_segment(segment_ids: Any) -> None:
    if isinstance(segment_ids, jax.core.Tracer):
        return
    ids = np.asarray(segment_ids)
    first = ids[:, :1]
    packed = ~np.isin(ids, (0, 1)).all(axis=-1)
    empty = (ids == 0).all(axis=-1)
    left_padded = (np.diff(ids, axis=-1) > 0).any(axis=-1) | ((first == 0).any(axis=-1) & ~empty)
    bad = np.flatnonzero(packed | left_padded)
    if bad.size:
        raise InputError(
            f"segment_ids: row {bad[0]} is packed or padded on the left, but the model's function "
            "takes no segment_ids. Give it that keyword, or use unpacked rows padded on the right."
        )
