"""Drafts of records -> token ids: with a number of a grid as the answer, or with free text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from regjax.data.bad_records import Unusable
from regjax.data.drafts import Draft
from regjax.data.template import Field, Rendered, Skeleton
from regjax.data.tokenization import Ids, Offsets, Tokenization, cut
from regjax.errors import InputError
from regjax.scores import ScoreGrid
from regjax.token_grid import TokenGrid

TAIL = 32  # characters before the score that decide whether it stays apart from them


class Encoded(NamedTuple):
    """The tokens of one draft."""

    tokens: np.ndarray  # [n] int32
    response_start: int
    score_start: int
    was_cut: bool


class GridEncoder:
    """Context, the score's number as the grid writes it, end token."""

    def __init__(
        self,
        skeleton: Skeleton,
        tokenizer: Any,
        grid: ScoreGrid,
        codec: TokenGrid,
        max_length: int,
        prompts_only: bool,
    ):
        self.skeleton, self.grid = skeleton, grid
        self.max_length, self.prompts_only = max_length, prompts_only
        self.names = _names(skeleton.prompt if prompts_only else skeleton.pieces)
        self.tokenization = Tokenization(skeleton, tokenizer)
        eos = tokenizer.eos_token_id
        self.end = [eos] if codec.terminator is None and eos is not None else []
        self.numbers = codec.ids
        leading = self.tokenization.leading
        self.room = max_length - len(leading) - max(map(len, self.numbers)) - len(self.end)

    def __call__(self, drafts: Sequence[Draft]) -> list[Encoded | Unusable]:
        """For each draft its tokens, or why there are none."""
        rendered = [self.skeleton.render(d.fields, response=not self.prompts_only) for d in drafts]
        contexts = self.tokenization.ids_and_offsets(rendered, self.prompts_only)
        apart = [True] * len(drafts) if self.prompts_only else self._apart(drafts, rendered)
        results: list[Encoded | Unusable] = []
        for draft, text, (ids, offsets), is_apart in zip(
            drafts, rendered, contexts, apart, strict=True
        ):
            try:
                if not is_apart:
                    reason = (
                        "the text before the score merges with it into one token: end it otherwise"
                    )
                    raise Unusable("", None, reason)
                results.append(self._encode(draft, text, ids, offsets))
            except Unusable as error:
                results.append(error)
        return results

    def _encode(self, draft: Draft, text: Rendered, ids: Ids, offsets: Offsets) -> Encoded:
        keep = np.ones(len(ids), bool)
        if len(ids) > self.room:
            keep = cut(offsets, text, len(ids) - self.room)
            if keep.sum() > self.room:
                raise _too_long(len(ids) + self.max_length - self.room, self.max_length)
        response = len(ids)
        if text.response_start < len(text.text):
            response = next(i for i, (_, end) in enumerate(offsets) if end > text.response_start)
        leading = self.tokenization.leading
        context = np.asarray(ids, np.int64)[keep]
        score_start = len(leading) + len(context)
        response_start = len(leading) + int(keep[:response].sum())
        if response_start == 0:
            raise _no_prompt()
        number = []
        if draft.score is not None and not self.prompts_only:
            number = [*self.numbers[int(self.grid.nearest(draft.score))], *self.end]
        tokens = np.concatenate([leading, context, number]).astype(np.int32)
        return Encoded(tokens, response_start, score_start, not keep.all())

    def _apart(self, drafts: Sequence[Draft], rendered: Sequence[Rendered]) -> list[bool]:
        """Whether each score's tokens follow its text as they follow the template's score prefix.

        With a literal prefix as long as the tail they do, the codec was made so; a shorter one may
        merge with the end of a record's own text.
        """
        prefix = self.skeleton.score_prefix
        if len(prefix) >= TAIL:
            return [True] * len(drafts)
        words = [
            self.grid.texts[0 if d.score is None else int(self.grid.nearest(d.score))]
            for d in drafts
        ]
        tails = [item.text[-TAIL:] for item in rendered]
        plain = self.tokenization.plain
        pairs = dict.fromkeys(zip(tails, words, strict=True))
        before = plain([tail for tail, _ in pairs])
        joint = plain([tail + word for tail, word in pairs])
        known = len(plain([prefix])[0])
        numbers = {word: plain([prefix + word])[0][known:] for word in set(words)}
        result = {
            (tail, word): both == ids + numbers[word]
            for (tail, word), ids, both in zip(pairs, before, joint, strict=True)
        }
        return [result[pair] for pair in zip(tails, words, strict=True)]


class TextEncoder:
    """Prompt, response, end token; or the prompt alone."""

    def __init__(self, skeleton: Skeleton, tokenizer: Any, max_length: int, prompts_only: bool):
        if tokenizer.eos_token_id is None:
            raise InputError(
                "the tokenizer has no end token (eos_token), without which free text never stops: "
                "set one"
            )
        self.skeleton = skeleton
        self.max_length, self.prompts_only = max_length, prompts_only
        self.names = _names(skeleton.prompt if prompts_only else skeleton.pieces)
        self.tokenization = Tokenization(skeleton, tokenizer)
        self.end = [tokenizer.eos_token_id]
        self.room = max_length - len(self.tokenization.leading) - len(self.end)

    def __call__(self, drafts: Sequence[Draft]) -> list[Encoded | Unusable]:
        """For each draft its tokens, or why there are none."""
        asked = [self.skeleton.render(draft.fields, response=False) for draft in drafts]
        prompts = self.tokenization.ids(asked, True)
        wholes = prompts
        if not self.prompts_only:
            answered = [self.skeleton.render(draft.fields) for draft in drafts]
            wholes = self.tokenization.ids(answered, False)
        kept = self._kept(asked, prompts, [len(ids) for ids in wholes])
        results: list[Encoded | Unusable] = []
        for prompt, whole, keep in zip(prompts, wholes, kept, strict=True):
            try:
                results.append(self._encode(prompt, whole, keep))
            except Unusable as error:
                results.append(error)
        return results

    def _kept(
        self, asked: Sequence[Rendered], prompts: Sequence[Ids], lengths: Sequence[int]
    ) -> list[np.ndarray]:
        """Masks of the prompts' tokens that stay. Offsets are asked for only where some have to go."""
        kept = [np.ones(len(ids), bool) for ids in prompts]
        long = [index for index, length in enumerate(lengths) if length > self.room]
        if long:
            pairs = self.tokenization.ids_and_offsets([asked[index] for index in long], True)
            for index, (_, offsets) in zip(long, pairs, strict=True):
                kept[index] = cut(offsets, asked[index], lengths[index] - self.room)
        return kept

    def _encode(self, prompt: Ids, whole: Ids, keep: np.ndarray) -> Encoded:
        if whole[: len(prompt)] != prompt:
            reason = (
                "prompt and response merge: the prompt's tokens are others when the response follows "
                "it; let the response begin with a space, or the prompt end with a new line"
            )
            raise Unusable("", None, reason)
        if len(whole) == len(prompt) and not self.prompts_only:
            raise Unusable("", None, "the tokenizer writes the response with no token")
        excess = len(whole) - int((~keep).sum()) - self.room
        if excess > 0:
            raise _too_long(len(whole) + self.max_length - self.room, self.max_length)
        leading = self.tokenization.leading
        start = len(leading) + int(keep.sum())
        if start == 0:
            raise _no_prompt()
        end = [] if self.prompts_only else self.end
        cut_prompt = np.asarray(prompt, np.int64)[keep]
        tokens = np.concatenate([leading, cut_prompt, whole[len(prompt) :], end])
        return Encoded(tokens.astype(np.int32), start, start, not keep.all())


def _names(pieces: Sequence[str | Field]) -> list[str]:
    return list(dict.fromkeys(piece.name for piece in pieces if isinstance(piece, Field)))


def _too_long(tokens: int, max_length: int) -> Unusable:
    reason = (
        f"takes {tokens} tokens, more than max_length={max_length}, and its cuttable fields cannot "
        "make up for it: raise max_length or mark a field as {name|cut}"
    )
    return Unusable("", None, reason)


def _no_prompt() -> Unusable:
    return Unusable("", None, "the prompt has no token of its own")
