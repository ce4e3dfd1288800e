"""Code blocks of Markdown pages, and the commands in them."""

from __future__ import annotations

import re
from typing import NamedTuple

from markdown_it import MarkdownIt


class Block(NamedTuple):
    """Fenced or indented code block.

    `mark` is the HTML comment before it, such as `run`, or empty; `line` its first line, from 1.
    """

    text: str
    mark: str
    line: int


def blocks(page: str) -> list[Block]:
    """Code blocks of a page, in order."""
    found, mark = [], ""
    for token in MarkdownIt().parse(page):
        if token.type in ("fence", "code_block"):
            found.append(Block(token.content, mark, token.map[0] + 1))
        comment = re.fullmatch(r"<!-- (.+) -->\s*", token.content) if token.type == "html_block" else None
        mark = comment[1] if comment else ""
    return found


def commands(block: str) -> list[str]:
    """Commands of scalp in a block, without comments; shortened ones (`…`) are left out."""
    lines = re.finditer(r"^(?:\$ )?(scalp [^…#\n]+)(?:#.*)?$", block, re.MULTILINE)
    return [line[1].strip() for line in lines]


def page_commands(page: str) -> list[str]:
    """Commands of scalp in all blocks of a page."""
    return [command for block in blocks(page) for command in commands(block.text)]
