"""Commands in fenced blocks are found like those in indented blocks."""

from __future__ import annotations

from tests.support.pages import indent_fenced


def test_a_fenced_block_becomes_an_indented_block_at_the_same_lines():
    page = "A\n\n```bash\nscalp a\n\nscalp b  # c\n```\n\n```mermaid\nflowchart\n```\n"
    read = indent_fenced(page)
    assert read == "A\n\n\n    scalp a\n\n    scalp b  # c\n\n\n```mermaid\nflowchart\n```\n"
    assert len(read.splitlines()) == len(page.splitlines())
