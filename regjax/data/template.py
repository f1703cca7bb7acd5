"""Prompt templates: text with fields, which may be cut, and where the answer goes."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from regjax.errors import InputError

if TYPE_CHECKING:
    from regjax.scores import ScoreGrid
    from regjax.token_grid import TokenGrid

# Private-use characters stand for fields while a chat template is rendered.
_OPEN, _CLOSE = "\ue000", "\ue001"
_PIECE = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]|[^{}]+")
_FIELD = re.compile(r"([^|\s](?:[^|]*[^|\s])?)(\|cut)?")


class Field(NamedTuple):
    """A place in a template that a record's field fills."""

    name: str
    cut: bool = False


class Rendered(NamedTuple):
    """The text before the score, or all of it if there is none, and spans of it in characters."""

    text: str
    response_start: int
    fields: tuple[tuple[Field, int, int], ...]


@dataclasses.dataclass(frozen=True)
class Skeleton:
    """A template rendered once for a tokenizer: literal text and fields, the score apart."""

    prompt: tuple[str | Field, ...]
    response: tuple[str | Field, ...]
    adds_special_tokens: bool  # False: a chat template wrote the special tokens into the text

    @property
    def pieces(self) -> tuple[str | Field, ...]:
        return self.prompt + self.response

    @property
    def score_prefix(self) -> str:
        """The literal text immediately before the score."""
        prefix = ""
        for piece in reversed(self.pieces):
            if isinstance(piece, Field):
                break
            prefix = piece + prefix
        return prefix

    def render(self, record: Mapping[str, str], *, response: bool = True) -> Rendered:
        """The text of one record up to the score, or up to the response."""
        parts: list[str] = []
        fields = []
        length = 0
        response_start = 0
        pieces = self.pieces if response else self.prompt
        for index, piece in enumerate(pieces):
            if index == len(self.prompt):
                response_start = length
            part = record[piece.name] if isinstance(piece, Field) else piece
            if isinstance(piece, Field):
                fields.append((piece, length, length + len(part)))
            parts.append(part)
            length += len(part)
        if len(pieces) == len(self.prompt):
            response_start = length
        return Rendered("".join(parts), response_start, tuple(fields))


@dataclasses.dataclass(frozen=True)
class Template:
    """How a record is written as text: `prompt` is given to the model, `response` is learnt.

    `{field}` is replaced by the record's field, `{field|cut}` may be shortened at its end when the
    text is too long, `{{` and `}}` are braces. `{score}` ends the response: its tokens are those of
    the grid's nearest value, then the sequence ends. A response without `{score}` is free text, which
    is never cut. With `chat`, `system` and `prompt` are the messages of the tokenizer's own chat
    template.

    Raises:
        InputError: unbalanced braces, an unknown option after `|`, an empty prompt or response,
            more than one `{score}`, text after it, a field or nothing immediately before it,
            `|cut` in a free-text response, `system` without `chat`.

    >>> template = Template("Review: {text|cut}\\nStars (1-5):", response=" {score}")
    >>> template.fields, template.has_score
    (('text',), True)
    >>> Template("Q: {question}\\nA:", response=" {answer}").has_score
    False
    """

    prompt: str
    """Text before the response, with fields in braces; {text|cut} may be shortened."""
    response: str = "{score}"
    """Text the model learns to write: it ends with {score}, or is free text."""
    system: str = ""
    """System message of a chat template."""
    chat: bool = False
    """Render with the tokenizer's chat template."""

    def __post_init__(self) -> None:
        for name in ("prompt", "response", "system"):
            text = getattr(self, name)
            if not isinstance(text, str):
                raise InputError(f"template {name} is {type(text).__name__}: expected text")
            scores = sum(piece == Field("score") for piece in _parse(name, text))
            if scores > (name == "response"):
                raise InputError(
                    f"template {name} {text!r} holds {{score}} {scores} times: expected it at most "
                    "once, at the end of the response, and nowhere else"
                )
        response = _parse("response", self.response)
        if not self.response.strip():
            raise InputError(
                "template response is empty: expected {score}, or the field that holds the answer"
            )
        if not self.has_score and any(isinstance(p, Field) and p.cut for p in response):
            raise InputError(
                f"template response {self.response!r} holds |cut: free text is what the model learns "
                "and is never cut; mark fields of the prompt"
            )
        if self.has_score and response[-1] != Field("score"):
            raise InputError(
                f"template response {self.response!r} goes on after {{score}}: expected it to end "
                "with the score, because the end of the sequence tells where a number stops"
            )
        if not self.prompt.strip():
            raise InputError("template prompt is empty: expected text that asks for the response")
        if self.system and not self.chat:
            raise InputError("template system needs chat=True; otherwise put it into the prompt")
        if not self.chat:
            self._check_prefix(self.skeleton())

    def _check_prefix(self, skeleton: Skeleton) -> None:
        if self.has_score and not skeleton.score_prefix:
            raise InputError(
                f"template prompt {self.prompt!r} and response {self.response!r} put a field "
                "immediately before {score}: expected literal text between them, because it "
                "decides how the number is split into tokens"
            )

    @property
    def has_score(self) -> bool:
        """Whether the response ends with a number of the grid; otherwise it is free text."""
        return Field("score") in _parse("response", self.response)

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the fields a record must have, the score apart, in order of appearance."""
        return self._names("system", "prompt", "response")

    @property
    def prompt_fields(self) -> tuple[str, ...]:
        """Those of them that the prompt needs."""
        return self._names("system", "prompt")

    @property
    def response_fields(self) -> tuple[str, ...]:
        """Those of them that the response needs."""
        return self._names("response")

    def _names(self, *parts: str) -> tuple[str, ...]:
        pieces = [piece for part in parts for piece in _parse(part, getattr(self, part))]
        names = (piece.name for piece in pieces if isinstance(piece, Field))
        return tuple(dict.fromkeys(name for name in names if name != "score"))

    def render_response(self, record: Mapping[str, str], score: str = "") -> str:
        """The response of one record, with `score` for `{score}`.

        >>> Template("{text}:", response=" so {why}: {score}").render_response({"why": "good"}, "4")
        ' so good: 4'
        """
        pieces = _parse("response", self.response)
        known = {**record, "score": score}
        return "".join(known[p.name] if isinstance(p, Field) else p for p in pieces)

    def with_shots(self, shots: Sequence[tuple[str, str]], separator: str = "\n\n") -> Template:
        """The template with worked examples before its prompt, each (prompt, response) as it reads.

        Raises:
            InputError: with `chat`, where a prompt is one message.

        >>> Template("{a}=", "{b}").with_shots([("{1}=", "one")], separator="; ").prompt
        '{{1}}=one; {a}='
        """
        if self.chat:
            raise InputError(
                "worked examples are plain text before the prompt: with chat=True they would all be "
                "in one message; use chat=False, or no worked examples"
            )
        worked = "".join(prompt + response + separator for prompt, response in shots)
        escaped = worked.replace("{", "{{").replace("}", "}}")
        return dataclasses.replace(self, prompt=escaped + self.prompt)

    def skeleton(self, tokenizer: Any = None) -> Skeleton:
        """The template's pieces less the score; with `chat`, in the tokenizer's chat template.

        The chat template is rendered once, with a mark in place of every field, so a field's text
        never passes through it. White space at a field's edges therefore stays as it is.

        Raises:
            InputError: the tokenizer has no chat template, or its template refuses, drops, repeats
                or rewrites a message.
        """
        response = [p for p in _parse("response", self.response) if p != Field("score")]
        if not self.chat:
            return Skeleton(tuple(_parse("prompt", self.prompt)), tuple(response), True)
        if not getattr(tokenizer, "chat_template", None):
            raise InputError("the tokenizer has no chat template: use chat=False")
        messages = [("system", self.system)] * bool(self.system) + [("user", self.prompt)]
        marked: list[Field] = []
        chat = []
        for name, text in messages:
            parts = []
            for piece in _parse(name, text):
                if isinstance(piece, Field):
                    parts.append(f"{_OPEN}{len(marked)}{_CLOSE}")
                    marked.append(piece)
                else:
                    parts.append(piece)
            chat.append({"role": name, "content": "".join(parts)})
        try:
            text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template is a program: it may raise anything
            raise InputError(f"the chat template refuses these messages: {error}") from error
        for message in chat:
            for literal in re.split(f"{_OPEN}[0-9]+{_CLOSE}", message["content"]):
                if literal.strip() not in text:
                    raise InputError(
                        f"the chat template drops or rewrites the {message['role']} message "
                        f"{literal.strip()!r}: put it into the prompt, or use chat=False"
                    )
        parts = re.split(f"{_OPEN}([0-9]+){_CLOSE}", text)
        if sorted(map(int, parts[1::2])) != list(range(len(marked))):
            raise InputError("the chat template drops or repeats a message: use chat=False")
        pieces = [marked[int(p)] if i % 2 else p for i, p in enumerate(parts)]
        skeleton = Skeleton(tuple(p for p in pieces if p), tuple(response), False)
        self._check_prefix(skeleton)
        return skeleton

    def score_prefix(self, tokenizer: Any = None) -> str:
        """The literal text immediately before the score, which decides how numbers are tokenized.

        Raises:
            InputError: the response is free text.

        >>> Template("{text}\\nStars:", response=" {score}").score_prefix()
        '\\nStars: '
        """
        if not self.has_score:
            raise InputError(
                f"template response {self.response!r} is free text, which no grid describes: let it "
                "end with {score}, or leave the grid out"
            )
        return self.skeleton(tokenizer).score_prefix

    def codec(self, grid: ScoreGrid, tokenizer: Any) -> TokenGrid:
        """The tokens of every value of `grid` where this template puts the score.

        Raises:
            InputError: the response is free text, or see `ScoreGrid.tokenize`.
        """
        return grid.tokenize(tokenizer, prefix=self.score_prefix(tokenizer))


def _parse(name: str, text: str) -> Sequence[str | Field]:
    """Literal text and fields, in order; neighbouring literals joined."""
    pieces: list[str | Field] = []
    for piece in _tokens(name, text):
        if isinstance(piece, str) and pieces and isinstance(pieces[-1], str):
            pieces[-1] += piece
        else:
            pieces.append(piece)
    return pieces


def _tokens(name: str, text: str) -> Iterator[str | Field]:
    if _OPEN in text or _CLOSE in text:
        raise InputError(f"template {name} {text!r} holds the reserved characters U+E000 or U+E001")
    for match in _PIECE.finditer(text):
        piece = match[0]
        place = f"template {name}, character {match.start()}"
        if piece in ("{{", "}}"):
            yield piece[0]
        elif piece in ("{", "}"):
            raise InputError(f"{place}: a lone {piece!r}; write {piece * 2!r} for a brace")
        elif match[1] is not None:
            field = _FIELD.fullmatch(match[1])
            if field is None or (field[1] == "score" and field[2]):
                raise InputError(
                    f"{place}: {piece!r} is not a field: expected {{name}}, {{name|cut}}"
                )
            yield Field(field[1], cut=bool(field[2]))
        else:
            yield piece
