"""The page at `/` and its two files; it needs no build step and asks no other host for anything."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import FileResponse

router = APIRouter(include_in_schema=False)

_HERE = Path(__file__).parent


@router.get("/")
async def page() -> FileResponse:
    """Choose or drop a photograph, see its grade."""
    return FileResponse(_HERE / "page.html")


@router.get("/page.css")
async def style() -> FileResponse:
    """How the page looks."""
    return FileResponse(_HERE / "page.css")


@router.get("/page.js")
async def script() -> FileResponse:
    """What the page does."""
    return FileResponse(_HERE / "page.js", media_type="text/javascript")
