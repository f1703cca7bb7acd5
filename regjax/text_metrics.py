"""What is reported of written answers: how many are right, and how many have the format of a task.

Plain functions of lists of strings, one number in [0, 1] out. Of no answers at all they are
`metrics.Undefined`.
"""

from __future__ import annotations

import math
import re
import string
from collections.abc import Callable, Sequence

from regjax.metrics import Undefined

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def exact_match(
    answers: Sequence[str],
    expected: Sequence[str],
    normalize: Callable[[str], str] = str.strip,
) -> float:
    """The share of answers that equal what was expected, both normalised.

    Args:
      answers: as written.
      expected: the right answer of each.
      normalize: by default nothing but white space at the ends is overlooked; `question_answering`
        overlooks what question answering does.

    >>> exact_match([" True", "true"], ["True", "True"])
    0.5
    >>> exact_match(["The Beatles.", "Paris"], ["beatles", "London"], question_answering)
    0.5

    Raises:
      ValueError: for lists of different lengths.
    """
    pairs = _pairs(answers, expected)
    return _share([normalize(answer) == normalize(right) for answer, right in pairs])


def question_answering(text: str) -> str:
    """Lower case without punctuation, articles and superfluous white space (as SQuAD is scored).

    >>> question_answering("  The  Rolling Stones! ")
    'rolling stones'
    """
    words = text.lower().translate(_PUNCTUATION)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", words).split())


def first_word_accuracy(answers: Sequence[str], expected: Sequence[str]) -> float:
    """The share of answers whose first word is the expected label's first word.

    What follows the first word is overlooked, and so are the marks `.,;:!?` at its end; its case is
    not. An answer without a word is wrong (Wang et al., 2024, compare the first token of the output
    in RTE, CB and WiC).

    >>> first_word_accuracy(["True. It follows.", "true", ""], ["True", "True", "False"])
    0.3333333333333333

    Raises:
      ValueError: for lists of different lengths.
    """
    pairs = _pairs(answers, expected)
    return _share([_first_word(answer) == _first_word(right) != "" for answer, right in pairs])


def format_ratio(answers: Sequence[str], labels: Sequence[str]) -> float:
    """The share of answers that are one of the labels and nothing else, up to white space at the ends.

    On a task of another format it tells how far a model has specialised (Wang et al., 2024, section
    3): 1 where every answer is a label, 0 where none is.

    >>> format_ratio(["True", " False\\n", "True or False", "Paris"], ["True", "False"])
    0.5
    """
    known = {label.strip() for label in labels}
    return _share([answer.strip() in known for answer in answers])


def normalized_average(scores: Sequence[float]) -> float:
    """The plain mean of the scores of several tasks, in their unit.

    Wang et al., 2024, call it normalised, but their printed averages of eight tasks are plain means:
    no score at chance level is taken off.

    >>> normalized_average([50.0, 10.0, 0.0])
    20.0
    """
    if not len(scores):
        return Undefined("there are no scores")
    lost = sum(not math.isfinite(score) for score in scores)
    if lost:
        return Undefined(f"{lost} of {len(scores)} scores are not finite")
    return math.fsum(scores) / len(scores)


def _first_word(text: str) -> str:
    words = text.split(maxsplit=1)
    return words[0].rstrip(".,;:!?") if words else ""


def _pairs(answers: Sequence[str], expected: Sequence[str]) -> list[tuple[str, str]]:
    if len(answers) != len(expected):
        raise ValueError(f"{len(answers)} answers, but {len(expected)} expected ones")
    return list(zip(answers, expected, strict=True))


def _share(hits: Sequence[bool]) -> float:
    return sum(hits) / len(hits) if hits else Undefined("there are no answers")
