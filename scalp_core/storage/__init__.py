"""Read, write, list and remove files by uri: a local path or `s3://bucket/key`.

Writes are atomic and durable. Requests are retried after transient errors, until `retry_timeout`. A failure
that a user can fix (a wrong key, a missing folder, a full disk) raises a `UserError` of one line.
"""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.fs as pafs

from scalp_core.errors import UserError
from scalp_core.storage import s3
from scalp_core.storage.errors import advice, explain_errors, is_missing, is_transient, rename_errors
from scalp_core.storage.listing import (
    TEMPORARY,
    StoredFile,
    folders_in,
    has_keys,
    is_empty,
    is_within,
    list_children,
    list_files,
    names_in,
    not_found,
    pages,
    walk,
)
from scalp_core.storage.retry import call_with_retries, retry_timeout
from scalp_core.storage.uris import (
    absolute,
    bucket_and_key,
    bucket_and_prefix,
    check_scheme,
    is_s3,
    join,
    local_folder,
)

__all__ = [
    "RangedFile", "StoredFile", "absolute", "advice", "call_with_retries", "create", "exists",
    "explain_errors", "filesystem", "folders_in", "is_empty", "is_file", "is_missing", "is_s3",
    "is_transient", "is_within", "join", "list_children", "list_files", "local_folder", "mutation",
    "names_in", "new_file", "open_file", "open_raw", "read", "read_json", "read_range", "remove_file",
    "remove_folder", "remove_temporary", "rename_errors", "retry_timeout", "walk", "write",
]  # fmt: skip

logger = logging.getLogger(__name__)


@contextmanager
def mutation(kind: str, uri: str) -> Iterator[None]:
    """Surround one step that changes storage: write, create, rename, upload or remove.

    All changes pass through here, so that tests can end the process before or after each.
    """
    logger.debug("%s %s", kind, uri)
    yield


def filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    """Return the pyarrow filesystem of a uri and the path inside it."""
    check_scheme(uri)
    if is_s3(uri):
        return s3.filesystem(), uri[len("s3://") :]
    return pafs.LocalFileSystem(), uri


# --- read --------------------------------------------------------------------------------------------------


def exists(uri: str) -> bool:
    """Whether a uri is an existing file or folder, or a prefix of objects."""
    check_scheme(uri)
    with explain_errors(uri):
        if not is_s3(uri):
            return Path(uri).exists()
        bucket, key = bucket_and_key(uri)
        return call_with_retries(uri, s3.head, bucket, key) is not None or has_keys(uri)


def is_file(uri: str) -> bool:
    """Whether a uri is a file; False for a folder or prefix.

    Raises:
        UserError: the uri does not exist, or storage failed.
    """
    check_scheme(uri)
    with explain_errors(uri):
        if not is_s3(uri):
            return not Path(uri).is_dir() and bool(Path(uri).stat())
        bucket, key = bucket_and_key(uri)
        if key and call_with_retries(uri, s3.head, bucket, key) is not None:
            return True
        if not has_keys(uri):
            raise not_found(uri)
    return False


def read(uri: str) -> bytes:
    """Read all bytes of a file.

    Raises:
        UserError: the file is missing, or storage failed.
    """
    check_scheme(uri)
    with explain_errors(uri):
        return call_with_retries(uri, _read, uri)


def read_json(uri: str) -> dict[str, Any] | None:
    """Read the content of a JSON file; None if the file does not exist.

    Raises:
        UserError: storage failed.
    """
    try:
        content: dict[str, Any] = json.loads(read(uri))
        return content
    except UserError as error:
        if error.__cause__ and is_missing(error.__cause__):
            return None
        raise


def _read(uri: str, byte_range: tuple[int, int] | None = None) -> bytes:
    if is_s3(uri):
        return s3.get(*bucket_and_key(uri), byte_range)
    with Path(uri).open("rb") as file:
        if byte_range is None:
            return file.read()
        file.seek(byte_range[0])
        return file.read(byte_range[1] - byte_range[0])


def read_range(uri: str, start: int, length: int) -> bytes:
    """Read `length` bytes of a file from `start` by one request; fewer where the file ends.

    Raises:
        OSError: the file is missing, or storage failed.
    """
    check_scheme(uri)
    return call_with_retries(uri, _read, uri, (start, start + length)) if length else b""


class RangedFile(io.RawIOBase):
    """Random-access file, read by range.

    Args:
        read: Returns `length` bytes from `start`.
        size: Size of the file in bytes.
    """

    def __init__(self, read: Callable[[int, int], bytes], size: int) -> None:
        self._read = read
        self.size = size
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        at = offset + (0, self._at, self.size)[whence]
        if at < 0:
            raise OSError(errno.EINVAL, f"a place before the file: {at}")
        self._at = at
        return at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        size = min(len(buffer), self.size - self._at)
        data = self._read(self._at, size) if size > 0 else b""
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def open_file(uri: str) -> pa.NativeFile:
    """Open a file for random access; S3 objects are read by range.

    Raises:
        OSError: the file is missing, or storage failed.
    """
    fs, path = filesystem(uri)
    return fs.open_input_file(path) if not is_s3(uri) else call_with_retries(uri, _open_s3, fs, path)


def _open_s3(fs: pafs.FileSystem, path: str) -> pa.NativeFile:
    """Open by pyarrow's client, else by boto3, which accepts keys such as `a//b` and returns error codes."""
    try:
        return fs.open_input_file(path)
    except (OSError, pa.ArrowInvalid):
        return pa.PythonFile(open_raw(f"s3://{path}"), mode="r")


def open_raw(uri: str) -> io.RawIOBase:
    """Open a file for random access without a buffer; each read from S3 is one request, with retries.

    Raises:
        OSError: the file is missing, or storage failed; opening it is not retried.
    """
    check_scheme(uri)
    if not is_s3(uri):
        return Path(uri).open("rb", buffering=0)
    head = s3.head(*bucket_and_key(uri))
    if head is None:
        raise FileNotFoundError(uri)
    return RangedFile(partial(read_range, uri), head["ContentLength"])


# --- write -------------------------------------------------------------------------------------------------


def write(uri: str, data: bytes, durable: bool = True) -> None:
    """Atomically write `data` to `uri`.

    Args:
        uri: File to write; missing folders are created.
        data: Content of the file.
        durable: Wait until the bytes are on the disk, so that they survive a power cut.
    """
    check_scheme(uri)
    with explain_errors(uri, "write"):
        if is_s3(uri):
            with mutation("upload", uri):
                call_with_retries(uri, s3.put, *bucket_and_key(uri), data)
        else:
            with _replacement(uri, durable) as file:
                file.write(data)


def create(uri: str, data: bytes) -> bool:
    """Atomically write `data` unless the file exists; of concurrent callers exactly one gets True.

    Uses `If-None-Match: *` in S3 and a hard link on a disk.

    Raises:
        UserError: storage failed, or the S3 server ignores the condition.
    """
    check_scheme(uri)
    with explain_errors(uri, "write"):
        if is_s3(uri):
            with mutation("create", uri):
                return s3.create(*bucket_and_key(uri), data)
        with _temporary(uri) as temporary:
            with _opened(temporary) as file:
                file.write(data)
            with mutation("create", uri):
                try:
                    os.link(temporary, uri)
                except FileExistsError:
                    return False
                _sync_folder(uri)
    return True


@contextmanager
def new_file(uri: str) -> Iterator[IO[bytes]]:
    """Open a file to write piece by piece; it atomically replaces an older one if the block succeeds.

    For S3 the pieces are collected on the local disk and uploaded in one atomic step.
    """
    check_scheme(uri)
    with explain_errors(uri, "write"):
        if is_s3(uri):
            with tempfile.TemporaryFile() as spool:
                yield spool
                with mutation("upload", uri):
                    call_with_retries(uri, s3.upload, *bucket_and_key(uri), spool)
        else:
            with _replacement(uri) as file:
                yield file


@contextmanager
def _replacement(uri: str, durable: bool = True) -> Iterator[IO[bytes]]:
    """Open a temporary file, which replaces a local file if the block succeeds."""
    with _temporary(uri) as temporary:
        with _opened(temporary, durable) as file:
            yield file
        with mutation("rename", uri):
            temporary.replace(uri)
            if durable:
                _sync_folder(uri)


@contextmanager
def _temporary(uri: str) -> Iterator[Path]:
    """Temporary path in the folder of a local file, removed at the end."""
    path = Path(uri)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.scalp-tmp")
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _opened(temporary: Path, durable: bool = True) -> Iterator[IO[bytes]]:
    with mutation("write", str(temporary)), temporary.open("wb") as file:
        yield file
        if durable:
            file.flush()
            os.fsync(file.fileno())


def _sync_folder(uri: str) -> None:
    """Flush a folder, which makes a rename durable; some network disks do not support it."""
    with suppress(OSError):
        folder = os.open(Path(uri).parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


# --- remove ------------------------------------------------------------------------------------------------


def remove_file(uri: str) -> None:
    """Remove a file; no error if it is missing."""
    check_scheme(uri)
    with explain_errors(uri, "remove"), mutation("remove", uri):
        if is_s3(uri):
            bucket, key = bucket_and_key(uri)
            call_with_retries(uri, s3.answer, "delete_object", Bucket=bucket, Key=key)
        else:
            Path(uri).unlink(missing_ok=True)


def remove_folder(uri: str, last: str | None = None) -> None:
    """Remove a folder or prefix with its content; no error if it is missing.

    Args:
        uri: Folder that scalp made; `outputs.remove_scratch` checks that.
        last: Name of a file directly in it that is removed after all others.

    Raises:
        UserError: a file could not be removed.
    """
    check_scheme(uri)
    kept = join(uri, last) if last else None
    with explain_errors(uri, "remove"):
        if is_s3(uri):
            bucket, prefix = bucket_and_prefix(uri)
            for page in pages(uri, Prefix=prefix):
                keys = [item["Key"] for item in page.get("Contents", ())]
                keys = [key for key in keys if f"s3://{bucket}/{key}" != kept]
                if keys:
                    with mutation("remove", uri):
                        call_with_retries(uri, s3.delete, bucket, keys)
        elif Path(uri).is_dir():
            for path in Path(uri).iterdir():
                if str(path) != kept:
                    with mutation("remove", str(path)):
                        if path.is_dir() and not path.is_symlink():
                            shutil.rmtree(path)
                        else:
                            path.unlink(missing_ok=True)
    if kept:
        remove_file(kept)
    if not is_s3(uri) and Path(uri).is_dir():
        with explain_errors(uri, "remove"):
            Path(uri).rmdir()


def remove_temporary(folder: str) -> None:
    """Remove temporary files that killed writers left directly in a local folder.

    The caller holds the `lease` on the folder, so that no other writer's file is removed.
    """
    if is_s3(folder) or not Path(folder).is_dir():
        return
    for entry in os.scandir(folder):
        if TEMPORARY.match(entry.name):
            remove_file(entry.path)
