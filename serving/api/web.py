"""Files of the web pages, which have no build step and load nothing from other hosts."""

from __future__ import annotations

from pathlib import Path

_WEB = Path(__file__).parents[1] / "web"
_REVIEW = _WEB / "review"

PAGE = _WEB / "page.html"
PAGE_OF_REVIEW = _REVIEW / "review.html"
TYPES = {".css": "text/css", ".js": "text/javascript"}
"""Media types of the files below `/page/`, by suffix."""

FILES = {path.name: path for folder in (_WEB, _REVIEW) for path in folder.iterdir() if path.suffix in TYPES}
"""Files below `/page/`: a fixed list, so that a requested name never becomes a path."""
