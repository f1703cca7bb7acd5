"""Parameters by path: `{"layers": {"norm": {"scale": a}}}` is `{"layers/norm/scale": a}` here."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from flax import traverse_util

from regjax.errors import InputError

Flat = dict[str, Any]


def flatten(tree: Mapping[str, Any]) -> Flat:
    """The leaves of a nested dict by path, the keys joined by `/`.

    The integer keys of a list of NNX modules become strings, which NNX takes as well.

    >>> flatten({"layers": {0: {"scale": 1.0}}, "head": 2.0})
    {'layers/0/scale': 1.0, 'head': 2.0}
    """
    by_keys = traverse_util.flatten_dict(dict(tree))
    return {"/".join(map(str, keys)): leaf for keys, leaf in by_keys.items()}


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The nested dict of a flat one, its keys strings."""
    return traverse_util.unflatten_dict(dict(flat), sep="/")


def matches(path: str, patterns: Sequence[str]) -> bool:
    """Whether any of the regular expressions is found in `path` (anchor with `^` and `$`).

    Raises:
      InputError: for a pattern that is no regular expression.
    """
    return any(_is_found(pattern, path) for pattern in patterns)


def _is_found(pattern: str, path: str) -> bool:
    try:
        return re.search(pattern, path) is not None
    except re.error as error:
        raise InputError(f"{pattern!r} is not a regular expression: {error}") from None


def split_by_patterns(params: Mapping[str, Any], patterns: Sequence[str]) -> tuple[Flat, Flat]:
    """`(matching, others)`, both flat.

    Raises:
      InputError: for a pattern that is no regular expression or matches no parameter.
    """
    flat = flatten(params)
    for pattern in patterns:
        if not any(_is_found(pattern, path) for path in flat):
            raise InputError(
                f"the pattern {pattern!r} matches no parameter; the paths are: {', '.join(flat)}"
            )
    chosen = {path: leaf for path, leaf in flat.items() if matches(path, patterns)}
    return chosen, {path: leaf for path, leaf in flat.items() if path not in chosen}
