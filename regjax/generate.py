"""Greedy decoding: the most likely token each time, in arrays of static shape; and answers as text."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from regjax.data.batches import ordered_batches
from regjax.data.config import Data
from regjax.data.encode import Example, Examples
from regjax.data.rows import round_up
from regjax.data.tokenization import leading_ids
from regjax.errors import InputError
from regjax.models import Apply
from regjax.models.cache import is_known, require_unpacked

Greedy = Callable[[Any, Mapping[str, Any]], jax.Array]
"""`(params, batch) -> [B, M]` int32, as `greedy` returns them."""

# The states `[B, D]` at the rows' last tokens, what was read so far, and the function that reads a
# token `[B]` more: `(token, read) -> (states [B, D], read)`.
_Reader = tuple[jax.Array, Any, Callable[[jax.Array, Any], tuple[jax.Array, Any]]]


def greedy(
    model: Apply,
    params,
    batch: Mapping[str, jax.Array],
    *,
    max_new_tokens: int,
    end_token: int,
) -> jax.Array:
    """The most likely token each time, `[B, max_new_tokens]` int32, from a row's last token on.

        y_t = argmax_v p(v | x, y_1 .. y_{t-1}),    y_t = end_token after the first end token

    Stops when every row has ended. With `model.step` the rows are read once and every token costs one
    column; without, the whole rows are read for every token. Logits are of one position a row.
    To be compiled as a whole: `make_greedy` does that, once per shape.

    Args:
        model: the pure functions of a model, see `regjax.models.split`.
        params: its parameters.
        batch: `tokens` `[B, L]`, one example a row; `segment_ids` `[B, L]`, 1 for its tokens and 0 for
            padding on either side (by default all 1); `positions` `[B, L]` (by default from 0 on);
            `task_ids` `[B, S]` where the model takes them. A row of padding gives end tokens.
        max_new_tokens: M, at least 1.
        end_token: that ends a row, and fills what follows; it is part of the result.

    Raises:
        InputError: no end token, `max_new_tokens` below 1; where their values are known, which they
            are not inside `jax.jit`: packed rows, and rows padded on the left if the model takes no
            segments.

    >>> table = jnp.array([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])
    >>> cycle = Apply(lambda params, tokens, **places: params[tokens], lambda params, states: states)
    >>> greedy(cycle, table, {"tokens": jnp.array([[0, 1], [1, 2]])}, max_new_tokens=3, end_token=0)
    Array([[2, 0, 0],
           [0, 0, 0]], dtype=int32)
    """
    _check(max_new_tokens, end_token)
    _check_rows(model, batch)
    tokens = jnp.asarray(batch["tokens"])
    segment_ids = batch.get("segment_ids")
    segment_ids = jnp.ones_like(tokens) if segment_ids is None else jnp.asarray(segment_ids)
    last = jnp.where(segment_ids > 0, jnp.arange(tokens.shape[1]), -1).max(axis=1)
    cached = model.prefill is not None and model.step is not None
    start = _read_cached if cached else _read_again
    rows = {**batch, "tokens": tokens, "segment_ids": segment_ids}
    states, read, step = start(model, params, rows, last, max_new_tokens - 1)

    def choose(index, states, ended, written):
        token = jnp.argmax(model.head(params, states), axis=-1).astype(jnp.int32)
        token = jnp.where(ended, end_token, token)
        return token, ended | (token == end_token), written.at[:, index].set(token)

    def goes_on(carried):
        index, _, ended, _, _ = carried
        return (index < max_new_tokens) & ~ended.all()

    def another(carried):
        index, token, ended, written, read = carried
        states, read = step(token, read)
        return (index + 1, *choose(index, states, ended, written), read)

    written = jnp.full((tokens.shape[0], max_new_tokens), end_token, jnp.int32)
    first = choose(0, states, last < 0, written)
    return jax.lax.while_loop(goes_on, another, (jnp.int32(1), *first, read))[3]


def _read_cached(model: Apply, params, batch: Mapping[str, jax.Array], last, room: int) -> _Reader:
    hidden, cache = model.prefill_of(params, batch, room)
    return _at(hidden, last), cache, functools.partial(model.step, params)  # type: ignore[arg-type, misc]


def _read_again(model: Apply, params, batch: Mapping[str, jax.Array], last, room: int) -> _Reader:
    """Without a cache: rows with room, into which new tokens are written right after the last."""
    index = jnp.arange(len(last))
    names = ("tokens", "positions", "segment_ids")
    given = {name: jnp.asarray(batch[name]) for name in names if batch.get(name) is not None}
    rows = {name: jnp.pad(array, ((0, 0), (0, room))) for name, array in given.items()}

    def step(token, read):
        rows, last = read
        new = {"tokens": token, "segment_ids": 1}
        if "positions" in rows:
            new["positions"] = rows["positions"][index, last] + 1
        rows = {name: array.at[index, last + 1].set(new[name]) for name, array in rows.items()}
        return _at(model.hidden_of(params, {**batch, **rows}), last + 1), (rows, last + 1)

    return _at(model.hidden_of(params, {**batch, **rows}), last), (rows, last), step


def _at(hidden: jax.Array, columns: jax.Array) -> jax.Array:
    """`[B, D]` of `hidden [B, L, D]`: one column `[B]` of each row."""
    return jnp.take_along_axis(hidden, jnp.maximum(columns, 0)[:, None, None], axis=1)[:, 0]


_compiled = jax.jit(greedy, static_argnames=("model", "max_new_tokens"))


def make_greedy(model: Apply, max_new_tokens: int, end_token: int) -> Greedy:
    """The compiled `(params, batch) -> [B, max_new_tokens]` of `greedy`, once per shape of a batch.

    Of the batch it takes what decoding needs. Equal models share what is compiled.

    Raises:
        InputError: as `greedy`, of every batch whose arrays are whole on this host.
    """
    _check(max_new_tokens, end_token)
    names = ("tokens", "positions", "segment_ids", *(("task_ids",) if model.takes_tasks else ()))

    def decode(params, batch: Mapping[str, Any]) -> jax.Array:
        _check_rows(model, batch)
        rows = {name: batch[name] for name in names if name in batch}
        return _compiled(model, params, rows, max_new_tokens=max_new_tokens, end_token=end_token)

    return decode


def answers(
    model: Apply,
    params,
    tokenizer: Any,
    examples: Examples,
    *,
    batch_size: int,
    max_new_tokens: int,
    stop: Sequence[str] = (),
    data: Data = Data(),  # noqa: B008  (frozen)
    greedy: Greedy | None = None,
) -> list[str]:
    """What the model writes after each prompt, in the order of `examples.examples`, stripped.

    Args:
        model: as in `greedy`, and so are `params` and `max_new_tokens`.
        tokenizer: of the model; its end token ends an answer.
        examples: made with `prompts_only=True`.
        batch_size: rows decoded at once.
        stop: an answer ends before the first occurrence of any of these; white space that it begins
            with is not looked at.
        data: row lengths.
        greedy: of `make_greedy`, or any other function like it; then `model` and `max_new_tokens` are
            not used.

    Raises:
        InputError: a tokenizer without an end token, packing, examples with a response, an empty text
            in `stop`; as `greedy`.
    """
    if data.packing:
        raise InputError("data.packing is on, and an answer is written after one example a row")
    if isinstance(stop, str) or not all(stop):
        raise InputError(f"stop is {stop!r}: expected a tuple of texts, none empty")
    for example in examples.examples:
        if example.response_start < len(example.tokens):
            raise InputError(
                f"{examples.places[example.record]}: the tokens go on after the prompt; make the "
                "examples with prompts_only=True"
            )
    end_token = tokenizer.eos_token_id
    _check(max_new_tokens, end_token)
    decode = make_greedy(model, max_new_tokens, end_token) if greedy is None else greedy
    by_record: dict[int, str] = {}
    for batch in ordered_batches(examples, batch_size, data):
        written = np.asarray(decode(params, batch))
        for record, ids in zip(batch["record_ids"][:, 0].tolist(), written, strict=True):
            if record >= 0:
                by_record[record] = _text(tokenizer, ids, end_token, stop)
    return [by_record[example.record] for example in examples.examples]


def texts(
    model: Apply,
    params,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    stop: Sequence[str] = (),
    batch_size: int = 32,
) -> list[str]:
    """What the model writes after each of some plain texts, as `answers`.

    The special tokens that the tokenizer begins a text with are put before it, and those that the
    text spells out count as such.

    Raises:
        InputError: one text in place of several, a text without tokens; as `answers`.
    """
    if isinstance(prompts, str):
        raise InputError(f"prompts is one text, {prompts!r}: expected a list of texts")
    if not prompts:
        return []
    leading = leading_ids(tokenizer)
    plain = tokenizer(list(prompts), add_special_tokens=False)["input_ids"]
    rows = [np.array([*leading, *ids], np.int32) for ids in plain]
    empty = [index for index, row in enumerate(rows) if not row.size]
    if empty:
        raise InputError(f"prompts[{empty[0]}] is {prompts[empty[0]]!r}, which has no tokens")
    examples = Examples(
        examples=[
            Example(row, len(row), len(row), math.nan, 1.0, index) for index, row in enumerate(rows)
        ],
        records=[{} for _ in rows],
        places=[f"prompts[{index}]" for index in range(len(rows))],
        ids=[str(index) for index in range(len(rows))],
        bad=[],
        truncated=0,
    )
    return answers(
        model,
        params,
        tokenizer,
        examples,
        batch_size=min(batch_size, len(rows)),
        max_new_tokens=max_new_tokens,
        stop=stop,
        data=Data(max_length=round_up(max(map(len, rows)), 8)),
    )


def _text(tokenizer: Any, ids: np.ndarray, end_token: int, stop: Sequence[str]) -> str:
    ended = np.flatnonzero(ids == end_token)
    kept = ids[: ended[0]] if ended.size else ids
    text = tokenizer.decode(kept.tolist(), skip_special_tokens=True).strip()
    ends = [text.find(one) for one in stop if one in text]
    return text[: min(ends, default=len(text))].strip()


def _check(max_new_tokens: int, end_token: int | None) -> None:
    if end_token is None:
        raise InputError(
            "there is no end token (the tokenizer's eos_token), without which decoding never stops: set "
            "one"
        )
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens is {max_new_tokens}: expected at least 1")


def _check_rows(model: Apply, batch: Mapping[str, Any]) -> None:
    segment_ids = batch.get("segment_ids")
    if segment_ids is None or not is_known(segment_ids):
        return
    require_unpacked(segment_ids)
    real = np.asarray(segment_ids) > 0
    left_padded = np.flatnonzero((real[:, 1:] > real[:, :-1]).any(axis=1))
    if left_padded.size and not model.takes_segments:
        raise InputError(
            f"segment_ids: row {left_padded[0]} is padded on the left, but the model takes no "
            "segment_ids: pad on the right"
        )
