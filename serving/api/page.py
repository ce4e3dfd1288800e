"""Routes of the web page: `/` and its files below `/page/`; no build step, no other hosts."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter, HTTPException
from fastapi.responses import FileResponse

router = APIRouter(include_in_schema=False)

_WEB = Path(__file__).parents[1] / "web"
_TYPES = {".css": "text/css", ".js": "text/javascript"}
# A fixed list, so that a requested name never becomes a path.
_FILES = {path.name: path for path in _WEB.iterdir() if path.suffix in _TYPES}


@router.get("/")
async def page() -> FileResponse:
    """The web page to choose, drop or take photos, see their grades and compare two."""
    return FileResponse(_WEB / "page.html")


@router.get("/page/{name}")
async def file(name: str) -> FileResponse:
    """A style sheet or script of the page."""
    if name not in _FILES:
        raise HTTPException(404)
    return FileResponse(_FILES[name], media_type=_TYPES[_FILES[name].suffix])
