"""Writes docs/losses.md, the index of `regjax.losses`, from the docstrings.

    python docs/write_losses.py            writes the page
    python docs/write_losses.py --check    fails where the page is not what it would write

Of a function's docstring it takes the first line; the first indented block, its formula; the
paragraph that begins with "Use", when to use it; and the first paragraph under "References", its
source: what comes after it there, on other code, is left out. Of a module's it takes the first
line, and the paragraph that begins with "Everywhere", the notation, with the block after it.
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from regjax import losses

PAGE = Path(__file__).with_name("losses.md")

# In the order of the page.
TITLES = {
    "grid": "Probabilities of scores",
    "regression": "Scores written as tokens",
    "soft_labels": "Soft labels over a grid",
    "ordinal": "Ordered labels",
    "numeric": "Predicted numbers and quantiles",
    "aggregate": "Mean responses of bags",
    "ranking": "Ranking",
    "policy": "Policy gradients",
    "tokens": "Tokens and classes",
    "linear": "Large vocabularies",
    "linear_teachers": "Teachers of large vocabularies",
    "smoothing": "Label smoothing and noise correction",
    "noise": "Estimates of label noise",
    "noise_robust": "Losses that are robust to label noise",
    "early_learning": "Early learning",
    "label_distribution": "Label-distributional robustness",
    "long_tail": "Rare classes",
    "worst_case": "The worst class",
    "example_weights": "The worst groups and examples",
    "distillation": "Distillation of classes or tokens",
    "standardization": "Standardised logits",
    "top_k_teacher": "Teachers cut to their top k",
    "adaptive_distillation": "Teachers trusted by class",
    "sequence_distillation": "Distillation of sequences",
    "feature_distillation": "Distillation of features",
    "relational_distillation": "Distillation of relations",
}

HEAD = """# The losses

Written by `python docs/write_losses.py` from the docstrings of `regjax.losses`, which also say shapes, units
and errors and have an example each: change those, then run it again. What ends in a mean over examples
in a paper is here one number per example; means and masks belong to the objective.
"""


def sections() -> dict[ModuleType, list[Callable]]:
    """The public functions of every module, both in the order of the page."""
    found: dict[str, list[Callable]] = {}
    for name in losses.__all__:
        function = getattr(losses, name)
        if not isinstance(function, type):
            found.setdefault(function.__module__.removeprefix("regjax.losses."), []).append(
                function
            )
    if untitled := found.keys() - TITLES.keys():
        raise SystemExit(f"{__file__}: give {sorted(untitled)} a place and a title in TITLES")
    return {
        sys.modules[f"regjax.losses.{module}"]: sorted(
            found[module], key=lambda function: inspect.getsourcelines(function)[1]
        )
        for module in TITLES
        if module in found
    }


def entry(function: Callable) -> dict[str, str]:
    """`summary`, `formula`, `use` and `source` of a function, empty where its docstring has none."""
    text, _, references = (inspect.getdoc(function) or "").partition("\nReferences:\n")
    paragraphs = re.split(r"\nArgs:|\nReturns:", text)[0].strip("\n").split("\n\n")
    references = references.split("\n>>>")[0]
    return {
        "summary": _joined(paragraphs[0]),
        "formula": _block(paragraphs[1:]),
        "use": next((_joined(part) for part in paragraphs if part.startswith("Use ")), ""),
        "source": _joined(references.split("\n\n")[0]),
    }


def page() -> str:
    contents, body = [], []
    for module, functions in sections().items():
        title = TITLES[module.__name__.split(".")[-1]]
        names = ", ".join(f"[`{name}`](#{name})" for name in (f.__name__ for f in functions))
        contents.append(f"* [{title}](#{_anchor(title)}): {names}")
        body += [f"## {title}", *_introduction(module)]
        for function in functions:
            body += _entry_lines(module, function)
    return "\n".join([HEAD, *contents, "", "\n\n".join(body)]) + "\n"


def _introduction(module: ModuleType) -> list[str]:
    paragraphs = (module.__doc__ or "").strip().split("\n\n")
    lines = [_linked(paragraphs[0])]
    for position, part in enumerate(paragraphs):
        if part.startswith("Everywhere"):
            lines.append(_linked(part))
            if position + 1 < len(paragraphs) and paragraphs[position + 1].startswith("    "):
                lines.append(_fenced(_block(paragraphs[position + 1 :])))
    return lines


def _entry_lines(module: ModuleType, function: Callable) -> list[str]:
    found = entry(function)
    file = module.__name__.replace(".", "/") + ".py"
    lines = [
        f"### [`{function.__name__}`](../{file})",
        _linked(found["summary"]),
        _fenced(found["formula"]),
        _linked(found["use"]),
        _linked("Source: " + found["source"]),
    ]
    return [line for line in lines if line]


def _block(paragraphs: list[str]) -> str:
    """The first run of indented paragraphs, without the indent."""
    block: list[str] = []
    for part in paragraphs:
        if part.startswith("    "):
            block.append(part)
        elif block:
            break
    return textwrap.dedent("\n\n".join(block))


def _fenced(formula: str) -> str:
    return f"```text\n{formula}\n```" if formula else ""


def _linked(text: str) -> str:
    """In one line, since a line that begins with a minus sign would begin a list."""
    return re.sub(
        r"`(\w+)`",
        lambda found: f"[{found[0]}](#{found[1]})" if found[1] in losses.__all__ else found[0],
        _joined(text),
    )


def _joined(text: str) -> str:
    return " ".join(text.split())


def _anchor(title: str) -> str:
    return re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true")
    new = page()
    if not parser.parse_args().check:
        PAGE.write_text(new)
    elif not PAGE.exists() or PAGE.read_text() != new:
        raise SystemExit(f"{PAGE} is not current: run `python docs/write_losses.py`")


if __name__ == "__main__":
    main()
