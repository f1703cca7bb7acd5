"""Soft prompts: trained embeddings that stand beside a row's tokens (Lester et al., 2021; ProMoT)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from regjax.errors import InputError
from regjax.models.apply import (
    Apply,
    Cache,
    HiddenFunction,
    Params,
    PrefillFunction,
    ProjectingHead,
)
from regjax.models.attention import segment_positions

SOFT_PROMPT = "soft_prompt"
"""`params["soft_prompt"][name]` is a prompt `[P, D]`, float32; its path is `soft_prompt/NAME`."""

_OWN_FIELD = {"text": "text", "labels": "labels", "path": "file"}


@dataclasses.dataclass(frozen=True)
class SoftPrompt:
    """A soft prompt's length, place, and what it is before it is trained.

    Raises:
        InputError: for values that contradict each other; the message names the field.
    """

    length: int = 100
    """P, how many embeddings it has. ProMoT and Lester et al. use 100 (PaLM 8b: 50)."""

    init: Literal["vocabulary", "uniform", "text", "labels", "file"] = "vocabulary"
    """Rows of the embedding table, drawn; `low` to `high`; the tokens of `text`; of each of `labels`; or
    what `path` holds. ProMoT does not say which it used."""

    low: float = -0.5
    """uniform: the range begins here (Lester et al.; their released code draws from [0, 0.5))."""

    high: float = 0.5
    """uniform: and ends here."""

    text: str = ""
    """text: the embeddings of its tokens, special ones not added, cut or repeated to `length`."""

    labels: tuple[str, ...] = ()
    """labels: position i is the mean embedding of the tokens of label i; the others are drawn as for
    `vocabulary` (Lester et al., class label)."""

    most_common: int = 5000
    """vocabulary, labels: drawn from the first so many ids that are no special tokens, which are the most
    common ones in most vocabularies; each at most once, unless `length` is larger."""

    path: str = ""
    """file: a folder as `prompt_files.save_prompt` or PEFT writes."""

    after_bos: bool = False
    """The prompt stands after a row's first token, the begin-of-sequence one, rather than before it."""

    def __post_init__(self) -> None:
        if self.length < 1:
            raise InputError(f"SoftPrompt.length is {self.length}; expected at least 1.")
        known = ("vocabulary", "uniform", "text", "labels", "file")
        if self.init not in known:
            raise InputError(f"SoftPrompt.init is {self.init!r}; expected one of {known}.")
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise InputError(
                f"SoftPrompt.low is {self.low} and high is {self.high}; expected low below high."
            )
        if self.most_common < 1:
            raise InputError(f"SoftPrompt.most_common is {self.most_common}; expected at least 1.")
        for name, init in _OWN_FIELD.items():
            value = getattr(self, name)
            if (self.init == init) != bool(value):
                raise InputError(
                    f"SoftPrompt.{name} is {value!r}, but init is {self.init!r}: {name} is given "
                    f"with init={init!r}, and only with it."
                )
        if isinstance(self.labels, str) or not all(self.labels):
            raise InputError(
                f"SoftPrompt.labels is {self.labels!r}; expected a tuple of strings, none empty."
            )
        if len(self.labels) > self.length:
            raise InputError(
                f"SoftPrompt.labels has {len(self.labels)} labels for length {self.length}; each "
                "takes one position: raise length or name fewer."
            )


def create_prompt(
    config: SoftPrompt, model: Apply, params: Params, tokenizer: Any, key: Array
) -> Array:
    """The untrained prompt `[P, D]`, float32, a function of the arguments; traceable in `params`, `key`.

    Embeddings are those of `model.embed`, what the first layer takes. A Gemma prompt drawn from the
    vocabulary therefore has the factor `sqrt(D)` in it, as with PEFT on transformers 5, whose
    embedding layers multiply by it; the range of `uniform` is never scaled.

    Text and labels are tokenized without special tokens (PEFT keeps the one its tokenizer puts first).

    Raises:
        InputError: `init="file"`; a text or label without tokens.
        ValueError: a model that takes tokens only.
    """
    embed_ids = _require_embed(model)
    if config.init == "file":
        raise InputError(
            f"SoftPrompt.path is {config.path!r}: a prompt from a file is read, not made; call "
            "prompt_files.load_prompt."
        )

    def embed(ids: Any) -> Array:
        return embed_ids(without_prompts(params), jnp.asarray(ids)).astype(jnp.float32)

    if config.init == "uniform":
        width = jax.eval_shape(embed, np.zeros(1, np.int32)).shape[-1]
        return jax.random.uniform(
            key, (config.length, width), jnp.float32, minval=config.low, maxval=config.high
        )
    if config.init == "text":
        return embed(np.resize(_token_ids(tokenizer, "text", config.text), config.length))
    of_labels = [
        embed(_token_ids(tokenizer, f"labels[{index}]", label)).mean(0, keepdims=True)
        for index, label in enumerate(config.labels)
    ]
    common = common_ids(tokenizer, config.most_common)
    drawn = config.length - len(of_labels)
    ids = jax.random.choice(key, common, (drawn,), replace=drawn > len(common))
    return jnp.concatenate([*of_labels, embed(ids)])


def _token_ids(tokenizer: Any, field: str, text: str) -> np.ndarray:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise InputError(f"SoftPrompt.{field} is {text!r}, which has no tokens.")
    return np.asarray(ids, np.int32)


def special_ids(tokenizer: Any) -> set[int]:
    """The ids of a tokenizer's special tokens, named or not."""
    added = tokenizer.added_tokens_decoder
    return {*tokenizer.all_special_ids, *(id for id, token in added.items() if token.special)}


def common_ids(tokenizer: Any, count: int) -> np.ndarray:
    """The first `count` ids, int32 ascending, that are no special tokens; all, if there are fewer."""
    ids = np.array(sorted({*tokenizer.get_vocab().values()} - special_ids(tokenizer)), np.int32)
    return ids[:count]


def without_prompts(params: Mapping[str, Any]) -> Params:
    """`params` less all soft prompts: those of the model itself."""
    return {name: value for name, value in params.items() if name != SOFT_PROMPT}


def with_prompts(model: Apply, names: Sequence[str], *, after: int = 0) -> Apply:
    """The model with a soft prompt in every row, beside its first real token whatever the padding.

    `hidden` takes and returns arrays aligned with the tokens given, `[B, L, D]`: the prompt's P
    columns are put in before the layers and taken out after them, so that objectives and scorers
    work unchanged. Within, a row's tokens after the prompt have positions larger by P, the prompt has
    those in between, and it is of the row's segment. `prefill` does the same, with a cache that
    counts the prompt; `step` is the model's own. (PEFT puts the prompt before left padding; the
    two agree on rows padded on the right.)

    Prompts are read from `params["soft_prompt"]`, the model gets all other parameters. They are
    cast to the type of the embeddings row by row, so that their gradient is summed over the batch in
    their own type. A prompt `[0, D]` leaves the model's results bit-equal, gradients included.

    A row holds one example. A model that takes no segments can have a prompt where rows are padded on
    the right and its function takes embeddings.

    Args:
        model: with `embed`.
        names: of the prompts; with several, all of one shape, `hidden` and `prefill` need `task_ids`
            `[B]`, and row b has the prompt `names[task_ids[b]]`.
        after: how many of a row's tokens stand before the prompt; 1: the begin-of-sequence one.

    Raises:
        InputError: no name, or one that is empty, has a `/` or comes twice; a negative `after`.
            From the functions returned: prompts of different shapes, packed rows, task ids out of
            range. The last two only where their values are known, which they are not inside
            `jax.jit`: there a task id out of range gives NaN.
        ValueError: a model that takes tokens only. From the functions returned: no such prompt or one
            of another width, no task ids, both or neither of tokens and embeddings.

    >>> def hidden(params, tokens=None, *, embeddings=None, positions=None, segment_ids=None):
    ...     return jnp.cumsum(embeddings, axis=1)
    >>> model = Apply(hidden, lambda params, x: x, embed=lambda params, ids: params["table"][ids])
    >>> params = {"table": jnp.eye(2), "soft_prompt": {"task": jnp.array([[5.0, 0.0], [0.0, 7.0]])}}
    >>> with_prompts(model, ["task"])(params, jnp.array([[1, 0]]))
    Array([[[5., 8.],
            [6., 8.]]], dtype=float32)
    """
    embed = _require_embed(model)
    names = tuple(names)
    if not names or len(set(names)) < len(names) or any(not n or "/" in n for n in names):
        raise InputError(
            f"soft prompts are named {list(names)}; expected one or more names, each once, none "
            "empty or with a '/'."
        )
    if after < 0:
        raise InputError(f"after is {after}; expected the number of tokens before the prompt.")
    insert = _Insert(embed, names, after)
    return dataclasses.replace(
        model,
        hidden=_Hidden(model.hidden, insert),
        head=_head_without(model.head),
        embed=_Without(embed),
        prefill=None if model.prefill is None else _Prefill(model.prefill, insert),
        step=None if model.step is None else _Without(model.step),
        takes_tasks=len(names) > 1,
    )


def _require_embed(model: Apply) -> Callable[[Params, Array], Array]:
    if model.embed is None:
        raise ValueError(
            "the model takes tokens only, and a soft prompt is made of embeddings: give it an embed "
            "function, dataclasses.replace(model, embed=...), and a hidden that takes embeddings"
        )
    return model.embed


@dataclasses.dataclass(frozen=True)
class _Without:
    """A function of the model's own parameters, given all of them."""

    function: Callable[..., Any]

    def __call__(self, params: Params, *args: Any) -> Any:
        return self.function(without_prompts(params), *args)


def _head_without(head: Callable[[Params, Array], Array]) -> Callable[[Params, Array], Array]:
    if isinstance(head, ProjectingHead):
        return ProjectingHead(_Without(head.logits), _Without(head.projection))
    return _Without(head)


class _Place(NamedTuple):
    """Where the prompts stand: `offset [B, L + P]` of each column from the first of its row's prompt."""

    offset: Array
    length: int

    def widen(self, array: Array) -> Array:
        """`[B, L, ...]` to `[B, L + P, ...]`; the prompt's columns hold anything."""
        sides = [(0, 0)] * (array.ndim - 2)
        ahead = jnp.pad(array, [(0, 0), (0, self.length), *sides])
        behind = jnp.pad(array, [(0, 0), (self.length, 0), *sides])
        return self._where_before(ahead, behind)

    def narrow(self, array: Array) -> Array:
        """`[B, L + P, ...]` to `[B, L, ...]`: the prompt's columns are dropped."""
        if not self.length:
            return array
        return self._where_before(array[:, : -self.length], array[:, self.length :])

    def _where_before(self, ahead: Array, behind: Array) -> Array:
        before = self.offset[:, : ahead.shape[1]] < 0
        return jnp.where(before.reshape(*before.shape, *[1] * (ahead.ndim - 2)), ahead, behind)


@dataclasses.dataclass(frozen=True)
class _Insert:
    """Rows of tokens to rows of embeddings with a prompt in each, and where it stands."""

    embed: Callable[[Params, Array], Array]
    names: tuple[str, ...]
    after: int

    def __call__(
        self,
        params: Params,
        tokens: Array | None = None,
        *,
        embeddings: Array | None = None,
        positions: Array | None = None,
        segment_ids: Array | None = None,
        task_ids: Array | None = None,
    ) -> tuple[dict[str, Any], _Place]:
        if (tokens is None) == (embeddings is None):
            raise ValueError("give either tokens [B, L] or embeddings [B, L, D], not both")
        length = self._length(params)
        if not length:
            # The model's own arguments: other ones would be compiled to other roundings.
            given = {"embeddings": embeddings, "positions": positions, "segment_ids": segment_ids}
            return {"tokens": tokens, **given}, _Place(jnp.zeros((1, 1)), 0)
        if embeddings is None:
            embeddings = self.embed(without_prompts(params), jnp.asarray(tokens))
        embeddings = jnp.asarray(embeddings)
        if segment_ids is None:
            segment_ids = jnp.ones(embeddings.shape[:2], jnp.int32)
        _require_one_example_a_row(segment_ids)
        segment_ids = jnp.asarray(segment_ids)
        positions = segment_positions(segment_ids) if positions is None else jnp.asarray(positions)

        real = segment_ids > 0
        first = real.argmax(axis=1)
        skipped = jnp.minimum(self.after, real.sum(axis=1))
        at = first + skipped
        start = jnp.take_along_axis(positions, first[:, None], axis=1) + skipped[:, None]
        place = _Place(jnp.arange(embeddings.shape[1] + length) - at[:, None], length)
        moved = place.widen(positions) + jnp.where(place.offset < 0, 0, length)
        inside = (place.offset >= 0) & (place.offset < length)
        own_segment = segment_ids.max(axis=1, keepdims=True)
        prompts = self._prompts(params, task_ids, embeddings).astype(embeddings.dtype)
        put = jax.vmap(jax.lax.dynamic_update_slice_in_dim, (0, 0, 0, None))
        return {
            "embeddings": put(place.widen(embeddings), prompts, at, 0),
            "positions": jnp.where(inside, start + place.offset, moved),
            "segment_ids": jnp.where(inside, own_segment, place.widen(segment_ids)),
        }, place

    def _length(self, params: Params) -> int:
        given = params.get(SOFT_PROMPT, {})
        for name in self.names:
            if name not in given:
                raise ValueError(
                    f"the parameters have no {SOFT_PROMPT}/{name}; the prompts there are: "
                    f"{', '.join(given) or 'none'}"
                )
            shape, first = given[name].shape, given[self.names[0]].shape
            if shape != first:
                raise InputError(
                    f"the soft prompt {name!r} has shape {shape} and {self.names[0]!r} has {first}; "
                    "the prompts of one model are of one length."
                )
        return first[0]

    def _prompts(self, params: Params, task_ids: Array | None, embeddings: Array) -> Array:
        """`[B, P, D]`, of the prompts' own type, so that so is the sum of their gradient over rows."""
        prompts = [jnp.asarray(params[SOFT_PROMPT][name]) for name in self.names]
        rows, _, width = embeddings.shape
        if prompts[0].shape[1:] != (width,):
            raise ValueError(
                f"the soft prompt {self.names[0]!r} has shape {prompts[0].shape}; expected "
                f"[P, {width}], the width of the model's embeddings"
            )
        if len(prompts) == 1:
            return jnp.broadcast_to(prompts[0], (rows, *prompts[0].shape))
        if task_ids is None:
            raise ValueError(
                f"task_ids [B] are needed: they choose among the soft prompts {self.names}"
            )
        _require_known_tasks(task_ids, self.names)
        return (
            jnp.stack(prompts)
            .at[jnp.asarray(task_ids)]
            .get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
        )


@dataclasses.dataclass(frozen=True)
class _Hidden:
    """A model's `hidden`, with prompts."""

    hidden: HiddenFunction
    insert: _Insert

    def __call__(self, params: Params, tokens: Array | None = None, **given: Array | None) -> Array:
        rows, place = self.insert(params, tokens, **given)
        return place.narrow(self.hidden(without_prompts(params), **rows))


@dataclasses.dataclass(frozen=True)
class _Prefill:
    """A model's `prefill`, with prompts."""

    prefill: PrefillFunction
    insert: _Insert

    def __call__(
        self, params: Params, tokens: Array | None = None, *, room: int, **given: Array | None
    ) -> tuple[Array, Cache]:
        rows, place = self.insert(params, tokens, **given)
        states, cache = self.prefill(without_prompts(params), room=room, **rows)
        return place.narrow(states), cache


def _require_one_example_a_row(segment_ids: Array) -> None:
    if isinstance(segment_ids, jax.core.Tracer):
        return
    ids = np.asarray(segment_ids)
    packed = np.flatnonzero(((ids > 0) & (ids != ids.max(axis=1, keepdims=True))).any(axis=1))
    if packed.size:
        raise InputError(
            f"segment_ids: row {packed[0]} is packed, and a soft prompt stands beside the one "
            "example of a row: turn packing off."
        )


def _require_known_tasks(task_ids: Array, names: tuple[str, ...]) -> None:
    if isinstance(task_ids, jax.core.Tracer):
        return
    ids = np.asarray(task_ids)
    unknown = np.flatnonzero((ids < 0) | (ids >= len(names)))
    if unknown.size:
        raise InputError(
            f"task_ids: row {unknown[0]} has {ids[unknown[0]]}; expected 0 to {len(names) - 1}, an "
            f"index into the soft prompts {', '.join(names)}."
        )
