"""Which sources `POST /v1/bulk` takes: those below the prefixes that the operator names, and nothing else.

A source is refused unless it is written in the one plain way: whoever reads it later, and decodes or resolves
it once more, must not come to another place.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from scalp_core import inventory, storage
from serving.problems import Refusal

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
    if storage.is_s3(uri):
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
    """Whether one plain uri is another, or lies in it; `s3://b/scalp-other` does not lie in `s3://b/scalp`."""
    return uri == prefix or uri.startswith(f"{prefix}/")


def allowed_source(source: str, prefixes: Sequence[str]) -> str:
    """The source as it is graded.

    Args:
        source: as the client wrote it.
        prefixes: plain ones.

    Raises:
        Refusal: it lies elsewhere, may do so, or names photographs that do.
    """
    try:
        plain = plain_uri(source)
    except ValueError as error:
        raise _refused(str(error), prefixes) from None
    allowed = [prefix for prefix in prefixes if is_below(plain, prefix)]
    if not allowed:
        raise _refused("it lies elsewhere", prefixes)
    if inventory.is_table(plain):
        raise _refused("a table names photographs that may lie anywhere", prefixes)
    if not storage.is_s3(plain) and not any(_is_really_below(plain, prefix) for prefix in allowed):
        raise _refused("a link in it leads elsewhere", prefixes)
    return plain


def _is_really_below(path: str, prefix: str) -> bool:
    return Path(path).resolve().is_relative_to(Path(prefix).resolve())


def _refused(why: str, prefixes: Sequence[str]) -> Refusal:
    return Refusal(403, "source_not_allowed", f"{why}; sources lie below {' or '.join(prefixes)}")
