"""Markdown pages as the tests of their commands read them."""

from __future__ import annotations

import re

_FENCED = re.compile(r"^```(?!mermaid)\w*\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def indent_fenced(page: str) -> str:
    """`page` with fenced blocks as indented blocks at the same lines: one pattern finds both."""
    return _FENCED.sub(lambda block: f"\n{re.sub('^(?=.)', '    ', block[1], flags=re.MULTILINE)}", page)
