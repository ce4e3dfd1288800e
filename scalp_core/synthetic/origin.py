"""Detect images of `scalp synth` by `synth.json` in their folder."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import islice

from scalp_core import storage
from scalp_core.datasets.locations import Location, read_images
from scalp_core.errors import ImageError, UserError

MARKS = ("synth.json", "synth.started.json")
"""Names of the marker files of `scalp synth`: of a finished and of an interrupted set."""

_PREPARED = "data.json"
_MAX_BYTES = 2**20
_LEVELS = 8


def is_synthetic(folders: Iterable[str], marks: Iterable[Location]) -> bool:
    """Whether images are from `scalp synth`, directly or by way of prepared data.

    Args:
        folders: Folders of the images; these and the folders above them are searched.
        marks: Files of the source with one of the names in `MARKS`.

    Raises:
        UserError: storage is unavailable.
    """
    places = dict.fromkeys(place for folder in folders for place in islice(_upwards(folder), _LEVELS))
    named = [storage.join(place, name) for place in places for name in (*MARKS, _PREPARED)]
    locations = [*marks, *map(Location, filter(_exists, named))]
    return any(map(_is_mark, read_images(locations, _MAX_BYTES)))


def _upwards(folder: str) -> Iterator[str]:
    """Yield a folder and the folders above it, up to the bucket or the root."""
    scheme, separator, path = folder.rpartition("://")
    while path := path.rstrip("/"):
        yield f"{scheme}{separator}{path}"
        path = path.rpartition("/")[0]


def _exists(uri: str) -> bool:
    try:
        return storage.exists(uri)
    except UserError as error:
        if storage.is_transient(error):
            raise
        return False  # for example a folder above the source without read permission


def _is_mark(data: bytes | ImageError) -> bool:
    try:
        content = {} if isinstance(data, ImageError) else json.loads(data)
    except ValueError:
        return False
    if not isinstance(content, dict):
        return False
    return {"renderer", "options"} <= set(content) or content.get("synthetic") is True
