"""Detect images of `scalp synth` by the `synth.json` that it leaves in their folder."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import islice

from scalp_core import storage
from scalp_core.datasets.locations import Location, read_images
from scalp_core.errors import ImageError, UserError

MARKS = ("synth.json", "synth.started.json")
"""Names of the files that `scalp synth` leaves: of a finished set, and of one that was stopped."""

_PREPARED = "data.json"
_MAX_BYTES = 2**20
_LEVELS = 8


def is_synthetic(folders: Iterable[str], marks: Iterable[Location]) -> bool:
    """Whether images were drawn by `scalp synth`, or taken from prepared data that were.

    Args:
        folders: of the images; these and the folders above them are searched.
        marks: files among the images that have one of the names in `MARKS`.

    Raises:
        UserError: storage did not answer.
    """
    places = dict.fromkeys(place for folder in folders for place in islice(_upwards(folder), _LEVELS))
    named = [storage.join(place, name) for place in places for name in (*MARKS, _PREPARED)]
    locations = [*marks, *map(Location, filter(_exists, named))]
    return any(map(_says_so, read_images(locations, _MAX_BYTES)))


def _upwards(folder: str) -> Iterator[str]:
    """A folder and those above it, up to the bucket or the root."""
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
        return False  # such as a folder above the source that may not be read


def _says_so(data: bytes | ImageError) -> bool:
    try:
        content = {} if isinstance(data, ImageError) else json.loads(data)
    except ValueError:
        return False
    if not isinstance(content, dict):
        return False
    return {"renderer", "options"} <= set(content) or content.get("synthetic") is True
