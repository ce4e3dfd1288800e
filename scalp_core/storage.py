"""Files by uri: a local path or `s3://bucket/key`.

A server that does not answer is asked again, for as long as `patience` says. Every failure that a user can
mend (a wrong key, a missing folder, a full disk) is a `UserError` that says so in one line.
"""

from __future__ import annotations

import os
import shutil
import tarfile
import uuid
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.fs as pafs
import tenacity

from scalp_core.errors import UserError
from scalp_core.storage_errors import advice, is_transient

if TYPE_CHECKING:
    pass

T = TypeVar("T")


class StoredFile(NamedTuple):
    """One file as a listing tells of it; `size` in bytes."""

    uri: str
    size: int


class _Patience:
    seconds = 3.0


@contextmanager
def patience(seconds: float) -> Iterator[None]:
    """For how long a server that does not answer is asked again, in this process, inside the block.

    A person who mistyped an address waits seconds; a job of hours outlives a server's restart.
    """
    before, _Patience.seconds = _Patience.seconds, seconds
    try:
        yield
    finally:
        _Patience.seconds = before


def retried(uri: str, request: Callable[..., T], *arguments: Any, **keywords: Any) -> T:
    """Calls `request`, again and again while the S3 server does not answer or asks for less haste.

    Raises:
        OSError: the last one, when patience is over; at once what no waiting mends.
    """
    if not is_s3(uri):
        return request(*arguments, **keywords)
    retrying = tenacity.Retrying(
        stop=tenacity.stop_after_delay(_Patience.seconds),
        wait=tenacity.wait_random_exponential(0.2, max=5),
        retry=tenacity.retry_if_exception(is_transient),
        reraise=True,
    )
    return retrying(request, *arguments, **keywords)


def is_s3(uri: str) -> bool:
    return uri.startswith("s3://")


def join(uri: str, *parts: str) -> str:
    return "/".join([uri.rstrip("/"), *parts])


def absolute(uri: str | os.PathLike[str]) -> str:
    """`s3://` uris as they are; local paths made absolute, so that workers elsewhere find the same file."""
    text = os.fspath(uri)
    return text.rstrip("/") if is_s3(text) else str(Path(text).expanduser().resolve())


def filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    """The pyarrow filesystem of a uri and the path inside it."""
    if is_s3(uri):
        if not urlsplit(uri).netloc:
            raise UserError(f"{uri} names no bucket: write s3://BUCKET/PREFIX")
        from scalp_core import s3  # boto3 takes a moment: only who uses S3 waits for it

        return s3.filesystem(), uri[len("s3://") :]
    if "://" in uri:
        raise UserError(f"{uri}: only local paths and s3:// are read; copy the data to one of them")
    return pafs.LocalFileSystem(), uri


@contextmanager
def explained(uri: str, doing: str = "read") -> Iterator[None]:
    """Turns the storage errors inside the block into one line that names `uri` and the way out."""
    try:
        yield
    except (OSError, EOFError, zipfile.BadZipFile, tarfile.TarError, zlib.error, pa.ArrowInvalid) as error:
        raise UserError(f"cannot {doing} {uri}: {advice(error)}") from error


def exists(uri: str) -> bool:
    fs, path = filesystem(uri)
    with explained(uri):
        return retried(uri, fs.get_file_info, path).type != pafs.FileType.NotFound


def is_file(uri: str) -> bool:
    """Whether it is one file; False for a folder or prefix.

    Raises:
        UserError: nothing is there, or storage refused.
    """
    fs, path = filesystem(uri)
    with explained(uri):
        kind = retried(uri, fs.get_file_info, path.rstrip("/")).type
        if kind == pafs.FileType.NotFound and not _has_keys(uri):
            raise FileNotFoundError(uri)
    return kind == pafs.FileType.File


def read(uri: str) -> bytes:
    """All bytes of one file.

    Raises:
        UserError: it is missing, or storage refused.
    """
    with explained(uri):
        return retried(uri, _read, uri)


def _read(uri: str) -> bytes:
    with open_file(uri) as file:
        return file.read()


def open_file(uri: str) -> pa.NativeFile:
    """A file to read from any place; in S3 by range.

    Raises:
        OSError: it is missing, or storage refused.
    """
    fs, path = filesystem(uri)
    return retried(uri, fs.open_input_file, path)


def write(uri: str, data: bytes) -> None:
    """Writes one file whole or not at all (S3 puts are atomic; local files are renamed into place)."""
    fs, path = filesystem(uri)

    def put() -> None:
        # Unasked, pyarrow would compress what is named .gz.
        with fs.open_output_stream(path, compression=None) as file:
            file.write(data)

    with explained(uri, "write"):
        if is_s3(uri):
            retried(uri, put)
            return
        with _beside(path) as temporary:
            temporary.write_bytes(data)
            temporary.replace(path)


def create(uri: str, data: bytes) -> bool:
    """Writes one file whole, unless there is one: of all who ask at once, exactly one is told True.

    In S3 by `If-None-Match: *`, on a disk by a hard link.

    Raises:
        UserError: storage refused, or the S3 server does not know the condition.
    """
    _, path = filesystem(uri)
    with explained(uri, "write"):
        if is_s3(uri):
            return _create_in_s3(uri, data)
        with _beside(path) as temporary:
            temporary.write_bytes(data)
            try:
                os.link(temporary, path)
            except FileExistsError:
                return False
    return True


@contextmanager
def _beside(path: str) -> Iterator[Path]:
    """A name in the folder of a local file, for its bytes until they are whole; a full disk leaves none."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(path).with_name(f".{Path(path).name}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _create_in_s3(uri: str, data: bytes) -> bool:
    from scalp_core import s3

    bucket, _, key = uri[len("s3://") :].partition("/")
    mark = uuid.uuid4().hex

    def put() -> bool:
        try:
            retried(uri, s3.answer, "put_object", Bucket=bucket, Key=key, Body=data, IfNoneMatch="*",
                    Metadata={"created-by": mark})  # fmt: skip
        except OSError as error:
            if "PreconditionFailed" not in str(error):
                raise
            return False
        return True

    if not put():
        # Perhaps it was ours: an answer that got lost, and the same request sent again.
        found = retried(uri, s3.answer, "head_object", Bucket=bucket, Key=key)
        return bool(found["Metadata"].get("created-by") == mark)
    if put():  # the same bytes, so nothing is lost
        raise UserError(
            f"cannot write {uri} safely: the S3 server overwrites what `If-None-Match: *` protects; "
            "use a folder, or a server that knows it, as Amazon's and SeaweedFS do"
        )
    return True


def remove_file(uri: str) -> None:
    """Removes one file; no matter if there is none."""
    fs, path = filesystem(uri)
    with explained(uri, "remove"), suppress(FileNotFoundError):
        retried(uri, fs.delete_file, path)


def remove_folder(uri: str) -> None:
    """Removes a folder or prefix with all that is in it; no matter if there is none."""
    with explained(uri, "remove"):
        if not is_s3(uri):
            shutil.rmtree(uri, ignore_errors=True)
            return
        from scalp_core import s3

        bucket, prefix = _bucket_and_prefix(uri)
        for page in _pages(uri, Prefix=prefix):
            if keys := [{"Key": item["Key"]} for item in page.get("Contents", ())]:
                retried(uri, s3.answer, "delete_objects", Bucket=bucket, Delete={"Objects": keys})


def list_files(uri: str) -> list[str]:
    """All files below a folder or prefix, sorted; the uri itself when it is one file.

    Raises:
        UserError: nothing is there, or storage refused.
    """
    return sorted(file.uri for file in walk(uri))


def walk(uri: str) -> Iterator[StoredFile]:
    """All files below a folder or prefix, as they are found, in constant memory; one file as itself.

    Raises:
        UserError: nothing is there, or storage refused.
    """
    if is_s3(uri):
        yield from _walk_s3(uri)
        return
    filesystem(uri)  # refuses other schemes
    with explained(uri):
        path = Path(uri)
        if path.is_file():
            yield StoredFile(uri, path.stat().st_size)
            return
        folders = [os.fspath(uri)]
        seen = set()  # links may lead round in a circle
        while folders:
            folder = folders.pop()
            status = Path(folder).stat()
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(folder) as entries:
                for entry in entries:
                    if _is_folder(entry):
                        folders.append(entry.path)
                    elif entry.is_file():
                        yield StoredFile(entry.path, entry.stat().st_size)


def is_empty(uri: str) -> bool:
    """Whether nothing is in a folder or prefix, or there is none."""
    if is_s3(uri):
        return not _has_keys(uri)
    return not Path(uri).exists() or not any(Path(uri).iterdir())


def names_in(uri: str) -> set[str]:
    """Names of the files directly in a folder or prefix; none where there is no such folder yet."""
    if not is_s3(uri) and not Path(uri).is_dir():
        return set()
    return {file.uri.rsplit("/", 1)[-1] for files, _ in children(uri) for file in files}


def folders_in(uri: str) -> set[str]:
    """Names of the folders directly in a folder or prefix; none where there is no such folder yet."""
    if not is_s3(uri) and not Path(uri).is_dir():
        return set()
    return {folder.rsplit("/", 1)[-1] for _, folders in children(uri) for folder in folders}


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """A folder, or a link to one that does not lead back to where it lies or above."""
    if not entry.is_symlink():
        return entry.is_dir()
    return entry.is_dir() and not Path(entry.path).parent.resolve().is_relative_to(Path(entry.path).resolve())


def children(uri: str) -> Iterator[tuple[list[StoredFile], list[str]]]:
    """Files directly in a folder or prefix, and the folders in it, a thousand at a time."""
    if is_s3(uri):
        bucket, prefix = _bucket_and_prefix(uri)
        for page in _pages(uri, Prefix=prefix, Delimiter="/"):
            prefixes = (item["Prefix"].rstrip("/") for item in page.get("CommonPrefixes", ()))
            yield _stored(bucket, page), [f"s3://{bucket}/{name}" for name in prefixes]
        return
    with explained(uri), os.scandir(uri) as entries:
        while some := list(islice(entries, 1000)):
            files = [StoredFile(entry.path, entry.stat().st_size) for entry in some if entry.is_file()]
            yield files, [entry.path for entry in some if _is_folder(entry)]


def _walk_s3(uri: str) -> Iterator[StoredFile]:
    bucket, prefix = _bucket_and_prefix(uri)
    if prefix and is_file(uri):
        with explained(uri), open_file(uri) as file:
            yield StoredFile(uri, file.size())
        return
    empty = True
    for page in _pages(uri, Prefix=prefix):
        empty = empty and not page.get("KeyCount")
        yield from _stored(bucket, page)
    if empty:
        with explained(uri):
            raise FileNotFoundError(uri)


def _stored(bucket: str, page: dict[str, Any]) -> list[StoredFile]:
    # A key that ends in a slash is how some tools write a folder.
    items = (item for item in page.get("Contents", ()) if not item["Key"].endswith("/"))
    return [StoredFile(f"s3://{bucket}/{item['Key']}", item["Size"]) for item in items]


def _has_keys(uri: str) -> bool:
    if not is_s3(uri):
        return False
    _, prefix = _bucket_and_prefix(uri)
    return bool(next(_pages(uri, Prefix=prefix, MaxKeys=1)).get("KeyCount"))


def _bucket_and_prefix(uri: str) -> tuple[str, str]:
    _, path = filesystem(uri)
    bucket, _, key = path.partition("/")
    return bucket, f"{key.rstrip('/')}/" if key else ""


def _pages(uri: str, **query: Any) -> Iterator[dict[str, Any]]:
    """Pages of a listing, each asked for again while the server does not answer."""
    from scalp_core import s3

    bucket, _ = _bucket_and_prefix(uri)
    token: dict[str, str] = {}
    while True:
        with explained(uri):
            page = retried(uri, s3.answer, "list_objects_v2", Bucket=bucket, **query, **token)
        yield page
        following = page.get("NextContinuationToken")
        if not following or "MaxKeys" in query:
            return
        token = {"ContinuationToken": following}


@contextmanager
def new_file(uri: str) -> Iterator[pa.NativeFile]:
    """A file to write piece by piece. It is there once the block ends well; until then an older one stays."""
    fs, path = filesystem(uri)
    folder, _, name = path.rpartition("/")
    temporary = f"{folder}/.{name}.{uuid.uuid4().hex}.tmp"
    with explained(uri, "write"):
        if not is_s3(uri):
            Path(folder).mkdir(parents=True, exist_ok=True)
        try:
            with fs.open_output_stream(temporary, compression=None) as file:
                yield file
            retried(uri, _rename, uri, temporary, path)
        except BaseException:  # closing the file has made it a sound one, of fewer rows
            with suppress(OSError):
                fs.delete_file(temporary)
            raise


def _rename(uri: str, temporary: str, path: str) -> None:
    if not is_s3(uri):
        Path(temporary).replace(path)
        return
    from scalp_core import s3

    bucket, _, key = path.partition("/")
    source = {"Bucket": bucket, "Key": temporary.partition("/")[2]}
    # In parts where it must be: pyarrow's move is one request, which takes 5 GiB at most.
    s3.answer("copy", CopySource=source, Bucket=bucket, Key=key)
    s3.answer("delete_object", **source)
