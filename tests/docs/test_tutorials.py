"""Each command of a tutorial is marked, so that tests/nightly/test_docs_tutorials.py runs it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.pages import blocks
from tests.support.tutorials import STEPS, tutorial_blocks

DOCS = Path(__file__).parents[2] / "docs"
VERBS = {
    "quickstart": ("synth", "prepare", "train", "evaluate", "grade", "results", "explain", "serve"),
    "tutorial-archive": ("grade", "results"),
    "tutorial-labels": (
        "review",
        "prepare",
        "train",
        "evaluate",
        "models promote",
        "serve",
        "compare",
        "models rollback",
    ),
}


def test_every_tutorial_is_tested():
    assert {page.stem for page in DOCS.glob("tutorial-*.md")} < VERBS.keys()


@pytest.mark.parametrize("page", VERBS)
def test_each_command_of_a_tutorial_is_run(page):
    path = DOCS / f"{page}.md"
    run = "".join(block.text for block in tutorial_blocks(path) if block.mark != "prints")
    for verb in VERBS[page]:
        assert re.search(rf"^scalp {verb} ", run, re.MULTILINE), verb
    for block in blocks(path.read_text()):
        # The set-up is that of the tests; an unmarked block may show what was printed.
        if not STEPS.fullmatch(block.mark) and "make setup" not in block.text:
            assert not re.search("^(scalp|curl|python|weed) ", block.text, re.MULTILINE), block.text
