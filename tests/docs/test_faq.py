"""docs/faq.md quotes messages as the code makes them, with values filled in."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache

import pytest

from jobs.common.errors import format_error
from tests.docs.references import ROOT
from tests.support.pages import blocks

PACKAGES = ("cluster", "jobs", "scalp_core", "serving")
QUOTES = [
    block.text.strip() for block in blocks((ROOT / "docs/faq.md").read_text()) if "error:" in block.text
]
# Of storage errors: what was done with which place, before the advice of storage/errors.py.
_DOING = re.compile(r"cannot (?:read|write) \S+: ")
_MIN_SHARE = 0.4  # of a message that is literal text of its template: values alone prove nothing


def templates(tree: ast.AST) -> Iterator[tuple[re.Pattern[str], int]]:
    """Patterns of the strings and f-strings of a module, with the number of their literal characters."""
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.Constant) else None for part in node.values]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            parts = [node.value]
        else:
            continue
        literal = sum(len(part) for part in parts if part)
        if literal > 10:
            pattern = "".join(".*" if part is None else re.escape(part) for part in parts)
            yield re.compile(pattern), literal


@cache
def all_templates() -> list[tuple[re.Pattern[str], int]]:
    return [
        template
        for name in PACKAGES
        for path in (ROOT / name).rglob("*.py")
        for template in templates(ast.parse(path.read_text(encoding="utf-8")))
    ]


def is_made_by_code(message: str) -> bool:
    text = _DOING.sub("", message)
    return any(
        literal >= _MIN_SHARE * len(text) and pattern.fullmatch(text) for pattern, literal in all_templates()
    )


@pytest.mark.parametrize("quote", QUOTES, ids=lambda quote: quote[7:50])
def test_a_quoted_message_is_one_of_the_code(quote):
    problem, _, fix = quote.partition("\n")
    message = "; ".join(filter(None, [problem.removeprefix("error: "), fix.removeprefix("hint:  ")]))
    assert format_error(message) == quote
    assert is_made_by_code(message)


def test_a_changed_message_is_detected():
    assert is_made_by_code("port 80 of 127.0.0.1 is in use; choose another one with --port")
    assert not is_made_by_code("port 80 of 127.0.0.1 is in use; choose another with --port")


def test_the_page_has_the_errors_that_users_meet_most():
    assert 15 <= len(QUOTES) <= 30
