"""Uris of files and folders: a local path or `s3://bucket/key`."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from scalp_core.errors import UserError

_SCHEME = re.compile(r"([A-Za-z][\w+.-]*)://")
_S3_MISSPELLED = re.compile(r"s3[an]?:/+", re.IGNORECASE)


def is_s3(uri: str) -> bool:
    return uri.startswith("s3://")


def join(uri: str, *parts: str) -> str:
    return "/".join([uri.rstrip("/"), *parts])


def absolute(uri: str | os.PathLike[str]) -> str:
    """Make a local path absolute, for workers with another working directory; keep an `s3://` uri.

    Raises:
        UserError: as for `check_scheme`.
    """
    text = os.fspath(uri)
    check_scheme(text)
    return text.rstrip("/") if is_s3(text) else str(Path(text).expanduser().resolve())


def check_scheme(uri: str) -> None:
    """Refuse a uri that is neither a local path nor `s3://BUCKET`: it would be read as a relative path.

    Raises:
        UserError: another or a misspelled scheme, or no bucket.
    """
    if is_s3(uri):
        if not urlsplit(uri).netloc:
            raise UserError(f"{uri} has no bucket; write s3://BUCKET/PREFIX")
    elif misspelled := _S3_MISSPELLED.match(uri):
        right = f"s3://{uri[misspelled.end() :] or 'BUCKET/PREFIX'}"
        raise UserError(f"{uri} is neither a local path nor s3://; write {right}")
    elif scheme := _SCHEME.match(uri):
        fix = "write s3://BUCKET/PREFIX, or the path of a local folder: scalp reads no other storage"
        if scheme[1].lower() == "file":
            fix = f"write the path alone: {uri[scheme.end() :]}"
        raise UserError(f"{uri} is neither a local path nor s3://; {fix}")


def local_folder(uri: str | os.PathLike[str], argument: str) -> Path:
    """Return the absolute path of a folder that cannot be in S3.

    Args:
        uri: Path as the user gave it.
        argument: Name of the argument or option, for the message.

    Raises:
        UserError: it is in S3, or as for `check_scheme`.
    """
    path = absolute(uri)
    if is_s3(path):
        raise UserError(f"{argument} {uri} is not a local folder; choose one, then copy it")
    return Path(path)


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
