"""The page at `/` and its files below `/page/`; there is no build step, and it asks no other host."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter, HTTPException
from fastapi.responses import FileResponse

router = APIRouter(include_in_schema=False)

_WEB = Path(__file__).parents[1] / "web"
_TYPES = {".css": "text/css", ".js": "text/javascript"}
# Listed once: what is asked for is looked up here and never becomes a path.
_FILES = {path.name: path for path in _WEB.iterdir() if path.suffix in _TYPES}


@router.get("/")
async def page() -> FileResponse:
    """Choose, drop or take images, see their grades, compare two."""
    return FileResponse(_WEB / "page.html")


@router.get("/page/{name}")
async def file(name: str) -> FileResponse:
    """A style sheet or script of the page."""
    if name not in _FILES:
        raise HTTPException(404)
    return FileResponse(_FILES[name], media_type=_TYPES[_FILES[name].suffix])
