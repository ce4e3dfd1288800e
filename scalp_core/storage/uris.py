"""Uris of files and folders: a local path or `s3://bucket/key`."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from scalp_core.errors import UserError


def is_s3(uri: str) -> bool:
    return uri.startswith("s3://")


def join(uri: str, *parts: str) -> str:
    return "/".join([uri.rstrip("/"), *parts])


def absolute(uri: str | os.PathLike[str]) -> str:
    """Make a local path absolute, for workers with another working directory; keep an `s3://` uri."""
    text = os.fspath(uri)
    return text.rstrip("/") if is_s3(text) else str(Path(text).expanduser().resolve())


def check_scheme(uri: str) -> None:
    if is_s3(uri):
        if not urlsplit(uri).netloc:
            raise UserError(f"{uri} has no bucket; write s3://BUCKET/PREFIX")
    elif "://" in uri:
        raise UserError(f"{uri} is neither a local path nor s3://; copy the data to one of them")


def bucket_and_key(uri: str) -> tuple[str, str]:
    bucket, _, key = uri[len("s3://") :].partition("/")
    return bucket, key


def bucket_and_prefix(uri: str) -> tuple[str, str]:
    check_scheme(uri)
    bucket, key = bucket_and_key(uri)
    return bucket, f"{key}/" if key else ""


def check_disjoint(uris: Sequence[str]) -> None:
    """Refuse a source inside another: its images would be counted twice.

    Raises:
        UserError: two sources overlap; the message names both.
    """
    given: dict[str, str] = {}
    for uri in uris:
        place = absolute(uri).rstrip("/")
        if place in given:
            raise UserError(f"{given[place]} and {uri} are the same source; give it once")
        given[place] = uri
    for place, uri in given.items():
        for slash in re.finditer("/", place):
            if outer := given.get(place[: slash.start()]):
                raise UserError(f"{uri} is inside {outer}; give {outer} alone, or disjoint sources")
