"""Canonical form and comparison of source prefixes: `s3://BUCKET[/KEY]` or absolute folders.

Sources in another form are refused: a program that decodes or resolves one again must not reach another
place.
"""

from __future__ import annotations

import re

from scalp_core.storage.uris import is_s3

_MAX_LENGTH = 1024  # of a key in S3
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_FORBIDDEN = re.compile(r"[?#@%\\]")  # queries, fragments, users, escapes, another system's slashes


def canonical_uri(uri: str) -> str:
    """Canonical form of a prefix or source, without a trailing slash.

    Raises:
        ValueError: It is not `s3://BUCKET[/KEY]` or an absolute path in canonical form.
    """
    if len(uri) > _MAX_LENGTH or _FORBIDDEN.search(uri) or not uri.isprintable():
        raise ValueError("it is too long, or contains one of ? # @ % \\ or a character that is not printable")
    if is_s3(uri):
        bucket, _, path = uri[len("s3://") :].partition("/")
        if not _BUCKET.fullmatch(bucket) or ".." in bucket:
            raise ValueError("the name of the bucket is invalid")
    elif uri.startswith("/") and len(uri) > 1:
        path = uri[1:]
    else:
        raise ValueError("write s3://BUCKET/PREFIX, or an absolute path of a folder")
    path = path.removesuffix("/")
    if path and any(part in ("", ".", "..") for part in path.split("/")):
        raise ValueError("it has an empty part, . or .. between its slashes")
    return uri.removesuffix("/")


def is_below(uri: str, prefix: str) -> bool:
    """Whether `uri` is `prefix` or below it, both canonical; `s3://b/x-y` is not below `s3://b/x`."""
    return uri == prefix or uri.startswith(f"{prefix}/")
