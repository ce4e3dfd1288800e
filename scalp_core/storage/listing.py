"""Listings of folders and S3 prefixes."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from scalp_core.errors import UserError
from scalp_core.storage import s3
from scalp_core.storage.errors import explain_errors
from scalp_core.storage.retry import call_with_retries
from scalp_core.storage.uris import bucket_and_key, bucket_and_prefix, check_scheme, is_s3

TEMPORARY = re.compile(r"^\..+\.[0-9a-f]{32}\.scalp-tmp$")


class StoredFile(NamedTuple):
    """One file of a listing."""

    uri: str  # its uri
    size: int | None  # size in bytes; None for a name without a readable file, such as a dangling link
    version: str = ""  # text that changes with the content: the etag in S3, time and size on a disk
    is_outside: bool = False  # whether it is a link out of the folder that bounds the listing


def list_files(uri: str) -> list[str]:
    """List all files below a folder or prefix, sorted; the uri itself when it is one file.

    Raises:
        UserError: the uri does not exist, or storage failed.
    """
    return sorted(file.uri for file in walk(uri))


def walk(uri: str, within: str | None = None) -> Iterator[StoredFile]:
    """Yield all files below a folder or prefix, unsorted, in constant memory; a file yields itself.

    Args:
        uri: Folder, prefix or file.
        within: Real path of a local folder; a link out of it is yielded as `is_outside`, and not followed.

    Raises:
        UserError: the uri does not exist, or storage failed.
    """
    if is_s3(uri):
        yield from _walk_s3(uri)
        return
    check_scheme(uri)
    with explain_errors(uri):
        path = Path(uri)
        if not path.is_dir():
            status = path.stat()
            yield StoredFile(uri, status.st_size, _version(status), not is_within(uri, within))
            return
        folders = [os.fspath(uri)]
        seen = set()  # links may form a loop
        while folders:
            folder = folders.pop()
            status = Path(folder).stat()
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(folder) as entries:
                for entry in entries:
                    if _leads_out(entry, within):
                        yield StoredFile(entry.path, None, is_outside=True)
                    elif _is_folder(entry):
                        folders.append(entry.path)
                    elif file := _stored_file(entry):
                        yield file


def is_empty(uri: str) -> bool:
    """Whether a folder or prefix is missing, or holds nothing but leftover temporary files."""
    check_scheme(uri)
    with explain_errors(uri):
        if is_s3(uri):
            _, prefix = bucket_and_prefix(uri)
            page = next(pages(uri, Prefix=prefix, MaxKeys=2))
            # S3 consoles create a folder as an empty object of its name.
            return all(item["Key"] == prefix for item in page.get("Contents", ()))
        return not Path(uri).exists() or all(TEMPORARY.match(entry.name) for entry in os.scandir(uri))


def names_in(uri: str) -> set[str]:
    """Names of the files directly in a folder or prefix, without leftover temporary files."""
    if not is_s3(uri) and not Path(uri).is_dir():
        return set()
    names = {file.uri.rsplit("/", 1)[-1] for files, _ in list_children(uri) for file in files}
    return {name for name in names if not TEMPORARY.match(name)}


def folders_in(uri: str) -> set[str]:
    """Names of the folders directly in a folder or prefix; empty for a missing folder."""
    if not is_s3(uri) and not Path(uri).is_dir():
        return set()
    return {folder.rsplit("/", 1)[-1] for _, folders in list_children(uri) for folder in folders}


def is_within(path: str, within: str | None) -> bool:
    """Whether a local path, with links resolved, is in the folder `within`; True for None."""
    # Path.resolve raises on a link to itself.
    return within is None or Path(os.path.realpath(path)).is_relative_to(within)


def _leads_out(entry: os.DirEntry[str], within: str | None) -> bool:
    return entry.is_symlink() and not is_within(entry.path, within)


def list_children(uri: str, within: str | None = None) -> Iterator[tuple[list[StoredFile], list[str]]]:
    """Yield the files and folders directly in a folder or prefix, a thousand at a time.

    Args:
        uri: Folder or prefix.
        within: Bound for links, as for `walk`.
    """
    if is_s3(uri):
        bucket, prefix = bucket_and_prefix(uri)
        for page in pages(uri, Prefix=prefix, Delimiter="/"):
            # One slash, not all: `a//` is a folder without a name in `a`.
            prefixes = (item["Prefix"].removesuffix("/") for item in page.get("CommonPrefixes", ()))
            yield _stored(bucket, page), [f"s3://{bucket}/{name}" for name in prefixes]
        return
    with explain_errors(uri), os.scandir(uri) as entries:
        while chunk := list(islice(entries, 1000)):
            outside = [entry for entry in chunk if _leads_out(entry, within)]
            inside = [entry for entry in chunk if entry not in outside] if outside else chunk
            files = [StoredFile(entry.path, None, is_outside=True) for entry in outside]
            files += filter(None, map(_stored_file, inside))
            yield files, [entry.path for entry in inside if _is_folder(entry)]


def _stored_file(entry: os.DirEntry[str]) -> StoredFile | None:
    """A file of a local folder, without a size for a dangling link or a pipe; None for a folder."""
    try:
        if entry.is_dir():
            return None
        if not entry.is_file():
            return StoredFile(entry.path, None)
        status = entry.stat()
    except FileNotFoundError:  # removed or renamed since the folder was read
        return None
    except OSError:  # a link to itself, or to a place that this user may not read
        return StoredFile(entry.path, None)
    return StoredFile(entry.path, status.st_size, _version(status))


def _version(status: os.stat_result) -> str:
    return f"{status.st_mtime_ns}-{status.st_size}"


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder, or a link to one that does not contain the link."""
    if not entry.is_symlink():
        return entry.is_dir()
    try:
        return entry.is_dir() and not Path(entry.path).parent.resolve().is_relative_to(
            Path(entry.path).resolve()
        )
    except OSError:
        return False


def _walk_s3(uri: str) -> Iterator[StoredFile]:
    bucket, prefix = bucket_and_prefix(uri)
    with explain_errors(uri):
        head = call_with_retries(uri, s3.head, *bucket_and_key(uri)) if prefix else None
    if head:
        yield StoredFile(uri, head["ContentLength"], head["ETag"])
        return
    empty = True
    for page in pages(uri, Prefix=prefix):
        empty = empty and not page.get("KeyCount")
        yield from _stored(bucket, page)
    if empty:
        with explain_errors(uri):
            raise not_found(uri)


def not_found(uri: str) -> FileNotFoundError | UserError:
    """Make the error of an `s3://` uri with which no object begins, in a bucket that exists."""
    if bucket_and_key(uri)[1]:
        return FileNotFoundError(uri)
    return UserError(f"the bucket {uri} is empty; give another one, or upload files first")


def _stored(bucket: str, page: dict[str, Any]) -> list[StoredFile]:
    # Some tools write a folder as a key that ends in a slash.
    items = (item for item in page.get("Contents", ()) if not item["Key"].endswith("/"))
    return [StoredFile(f"s3://{bucket}/{item['Key']}", item["Size"], item.get("ETag", "")) for item in items]


def has_keys(uri: str) -> bool:
    _, prefix = bucket_and_prefix(uri)
    return bool(next(pages(uri, Prefix=prefix, MaxKeys=1)).get("KeyCount"))


def pages(uri: str, **query: Any) -> Iterator[dict[str, Any]]:
    """Yield the pages of an S3 listing, with retries of each request."""
    bucket, _ = bucket_and_prefix(uri)
    token: dict[str, str] = {}
    while True:
        with explain_errors(uri):
            page = call_with_retries(uri, s3.answer, "list_objects_v2", Bucket=bucket, **query, **token)
        yield page
        following = page.get("NextContinuationToken")
        if not following or "MaxKeys" in query:
            return
        token = {"ContinuationToken": following}
