"""Prefixes of sources, `s3://BUCKET[/KEY]` or absolute folders, in one plain way and compared by part.

A source is refused unless it is written in the plain way: a program that reads it later, and decodes or
resolves it once more, must not reach another place.
"""

from __future__ import annotations

import re

from scalp_core.storage.uris import is_s3

_MAX_LENGTH = 1024  # of a key in S3
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_ODD = re.compile(r"[?#@%\\]")  # queries, fragments, users, escapes, another system's slashes


def plain_uri(uri: str) -> str:
    """A prefix or source as it is compared: without a slash at its end.

    Raises:
        ValueError: it is not `s3://BUCKET[/KEY]` or an absolute path, in the plain way.
    """
    if len(uri) > _MAX_LENGTH or _ODD.search(uri) or not uri.isprintable():
        raise ValueError("it is too long, or has one of ? # @ % \\ or a sign that is not printed")
    if is_s3(uri):
        bucket, _, path = uri[len("s3://") :].partition("/")
        if not _BUCKET.fullmatch(bucket) or ".." in bucket:
            raise ValueError("it names no bucket")
    elif uri.startswith("/") and len(uri) > 1:
        path = uri[1:]
    else:
        raise ValueError("write s3://BUCKET/PREFIX, or an absolute path of a folder")
    path = path.removesuffix("/")
    if path and any(part in ("", ".", "..") for part in path.split("/")):
        raise ValueError("it has an empty part, . or .. between its slashes")
    return uri.removesuffix("/")


def is_below(uri: str, prefix: str) -> bool:
    """Whether one plain uri is another, or is below it; `s3://b/scalp-other` is not below `s3://b/scalp`."""
    return uri == prefix or uri.startswith(f"{prefix}/")
