"""docs/losses.md is what docs/write_losses.py makes of the docstrings, and nothing is left out."""

import re
import runpy
from pathlib import Path

import pytest

from regjax import losses

DOCS = Path(__file__).resolve().parents[1] / "docs"
WRITER = runpy.run_path(str(DOCS / "write_losses.py"))
PUBLIC = [name for name in losses.__all__ if not isinstance(getattr(losses, name), type)]


def test_the_page_is_current():
    page = (DOCS / "losses.md").read_text()
    assert page == WRITER["page"](), "run `python docs/write_losses.py`"


@pytest.mark.parametrize("name", PUBLIC)
def test_every_loss_says_formula_use_and_source(name):
    missing = [part for part, text in WRITER["entry"](getattr(losses, name)).items() if not text]
    assert missing == [], f"the docstring of regjax.losses.{name} has no {missing}, see {DOCS}"


def test_every_loss_is_on_the_page_once_and_every_link_leads_somewhere():
    page = (DOCS / "losses.md").read_text()
    headings = re.findall(r"^#+ (.*)$", page, flags=re.MULTILINE)
    names = [found[1] for heading in headings if (found := re.match(r"\[`(\w+)`\]", heading))]
    assert sorted(names) == sorted(PUBLIC)
    titles = [heading for heading in headings if not heading.startswith("[")]
    anchors = names + [title.lower().replace(" ", "-") for title in titles]
    assert len(set(anchors)) == len(anchors)
    links = re.findall(r"\]\(([^)]+)\)", page)
    assert {link[1:] for link in links if link.startswith("#")} <= set(anchors)
    for file in {link for link in links if not link.startswith("#")}:
        assert (DOCS / file).is_file(), file


def test_entry_takes_the_four_parts_and_no_more():
    def loss():
        """What it is,
        in a line.

            first = 1

            second = 2

        A property, with another block:

            third = 3

        Use it
        here.

        Args:
            x: an argument.

        References:
            Author, *Title*, 2020,
            https://example.org.

            Differs from code.

        >>> 1
        1
        """

    assert WRITER["entry"](loss) == {
        "summary": "What it is, in a line.",
        "formula": "first = 1\n\nsecond = 2",
        "use": "Use it here.",
        "source": "Author, *Title*, 2020, https://example.org.",
    }


def test_entry_is_empty_where_the_docstring_says_nothing():
    def loss():
        """Only this.

        Args:
            x: Use it.

        >>> 1
        1
        """

    assert WRITER["entry"](loss) == {
        "summary": "Only this.", "formula": "", "use": "", "source": "",
    }  # fmt: skip


def test_names_that_are_modules_too_are_functions_and_their_modules_still_importable():
    from regjax.losses.distillation import hard_distillation
    from regjax.losses.early_learning import early_learning_targets

    assert losses.hard_distillation is hard_distillation
    assert losses.early_learning_targets is early_learning_targets
    assert callable(losses.distillation) and callable(losses.early_learning)
