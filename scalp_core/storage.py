"""Files by uri: a local path or `s3://bucket/key`, and members of zip archives in either.

S3 credentials come from the usual AWS chain; `AWS_ENDPOINT_URL` names another S3 server. Every failure
that a user can mend (a wrong key, a missing folder) is a `UserError` that says so in one line.
"""

from __future__ import annotations

import io
import os
import uuid
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from scalp_core.errors import ImageError, UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
ARCHIVE_SUFFIX = ".zip"

_CONNECT_TIMEOUT_S = 5
_REQUEST_TIMEOUT_S = 30
_MAX_ATTEMPTS = 5


@dataclass(frozen=True)
class Location:
    """Where the bytes of one photograph are: `member` names the entry when `uri` is an archive."""

    uri: str
    member: str | None = None

    def __str__(self) -> str:
        return f"{self.uri}!{self.member}" if self.member else self.uri


@dataclass
class Listing:
    """What a source holds: the photographs in it, and how many files were no photograph by their name."""

    photographs: list[Location]
    other_files: int = 0


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
        parts = urlsplit(uri)
        if not parts.netloc:
            raise UserError(f"{uri} names no bucket: write s3://BUCKET/PREFIX")
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        # The key id is part of the cache key, so that changed credentials are not answered with old ones.
        return _s3(endpoint, os.environ.get("AWS_ACCESS_KEY_ID")), uri[len("s3://") :]
    if "://" in uri:
        raise UserError(f"{uri}: only local paths and s3:// are read; copy the data to one of them")
    return pafs.LocalFileSystem(), uri


@lru_cache(maxsize=8)
def _s3(endpoint: str | None, _key_id: str | None) -> pafs.S3FileSystem:
    options = {
        "region": os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1",
        "connect_timeout": _CONNECT_TIMEOUT_S,
        "request_timeout": _REQUEST_TIMEOUT_S,
        "retry_strategy": pafs.AwsStandardS3RetryStrategy(max_attempts=_MAX_ATTEMPTS),
    }
    if endpoint:
        split = urlsplit(endpoint)
        options |= {"endpoint_override": split.netloc or split.path, "scheme": split.scheme or "https"}
    return pafs.S3FileSystem(**options)


@contextmanager
def explained(uri: str, doing: str = "read") -> Iterator[None]:
    """Turns the storage errors inside the block into one line that names `uri` and the way out."""
    try:
        yield
    except (OSError, zipfile.BadZipFile, pa.ArrowInvalid) as error:
        raise UserError(f"cannot {doing} {uri}: {_advice(error)}") from error


def _advice(error: Exception) -> str:
    text = str(error).replace("\n", " ")
    known = (
        (("INVALID_ACCESS_KEY_ID", "SIGNATURE_DOES_NOT_MATCH", "ACCESS_DENIED", "InvalidAccessKeyId", "403"),
         "the S3 server refused the key; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY to a valid one"),
        (("NETWORK_CONNECTION", "Couldn't connect", "curlCode: 7", "curlCode: 28"),
         "the S3 server did not answer; check AWS_ENDPOINT_URL and the network"),
        (("NO_SUCH_BUCKET", "NoSuchBucket"), "there is no such bucket; check the name after s3://"),
    )  # fmt: skip
    for marks, advice in known:
        if any(mark in text for mark in marks):
            return advice
    if isinstance(error, FileNotFoundError):
        return "it does not exist; check the path"
    if isinstance(error, zipfile.BadZipFile | pa.ArrowInvalid):  # Arrow refuses to seek before the start
        return "it is not a zip archive or it is damaged; fetch it again"
    return text


def exists(uri: str) -> bool:
    fs, path = filesystem(uri)
    with explained(uri):
        return fs.get_file_info(path).type != pafs.FileType.NotFound


def read(uri: str) -> bytes:
    """All bytes of one file.

    Raises:
        UserError: it is missing, or storage refused.
    """
    fs, path = filesystem(uri)
    with explained(uri), fs.open_input_file(path) as file:
        return file.read()


def write(uri: str, data: bytes) -> None:
    """Writes one file whole or not at all (S3 puts are atomic; local files are renamed into place)."""
    fs, path = filesystem(uri)
    with explained(uri, "write"):
        if is_s3(uri):
            with fs.open_output_stream(path) as file:
                file.write(data)
            return
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(path).with_name(f".{Path(path).name}.{uuid.uuid4().hex}.tmp")
        temporary.write_bytes(data)
        temporary.replace(path)


def list_files(uri: str) -> list[str]:
    """All files below a folder or prefix, sorted; the uri itself when it is one file.

    Raises:
        UserError: nothing is there, or storage refused.
    """
    fs, path = filesystem(uri)
    with explained(uri):
        info = fs.get_file_info(path.rstrip("/"))
        if info.type == pafs.FileType.File:
            return [uri]
        found = fs.get_file_info(pafs.FileSelector(path.rstrip("/"), recursive=True))
    scheme = "s3://" if is_s3(uri) else ""
    return sorted(scheme + item.path for item in found if item.type == pafs.FileType.File)


def list_photographs(source: str) -> Listing:
    """Photographs in a folder, a prefix or a zip (zips inside a folder too), by their file suffix.

    Raises:
        UserError: the source is missing, unreadable, or holds no photograph.
    """
    source = absolute(source)
    listing = Listing([])
    for uri in list_files(source):
        if uri.lower().endswith(ARCHIVE_SUFFIX):
            _list_archive(uri, listing)
        else:
            _add(Location(uri), uri, listing)
    if not listing.photographs:
        raise UserError(f"{source} holds no photograph ({', '.join(IMAGE_SUFFIXES)}); check the path")
    return listing


def _list_archive(uri: str, listing: Listing) -> None:
    with open_archive(uri) as archive:
        for member in archive.infolist():
            if not member.is_dir():
                _add(Location(uri, member.filename), member.filename, listing)


def _add(location: Location, name: str, listing: Listing) -> None:
    # Files that the operating system leaves behind (._a.jpg, .DS_Store) are no photographs.
    hidden = name.rsplit("/", 1)[-1].startswith(".")
    if name.lower().endswith(IMAGE_SUFFIXES) and not hidden:
        listing.photographs.append(location)
    else:
        listing.other_files += 1


@contextmanager
def open_archive(uri: str) -> Iterator[zipfile.ZipFile]:
    """A zip read in place; in S3 by range, so one member costs its own bytes only.

    Names without the UTF-8 flag are read as cp949: that is what Korean Windows writes.
    """
    fs, path = filesystem(uri)
    with explained(uri):
        file = fs.open_input_file(path)
    with file:
        with explained(uri):
            try:
                archive = zipfile.ZipFile(file, metadata_encoding="cp949")
            except UnicodeDecodeError:
                archive = zipfile.ZipFile(file)
        with archive:
            yield archive


def read_photographs(locations: list[Location], max_bytes: int) -> Iterator[bytes | ImageError]:
    """The bytes of each photograph, in order, or why they cannot be had. One bad one stops nothing."""
    archives: dict[str, zipfile.ZipFile | ImageError] = {}
    stack = []
    try:
        for location in locations:
            if location.member is None:
                yield _read_file(location.uri, max_bytes)
                continue
            if location.uri not in archives:
                context = open_archive(location.uri)
                try:
                    archives[location.uri] = context.__enter__()
                    stack.append(context)
                except UserError as error:
                    archives[location.uri] = ImageError("fetch_failed", str(error))
            archive = archives[location.uri]
            yield archive if isinstance(archive, ImageError) else _read_member(archive, location, max_bytes)
    finally:
        for context in stack:
            context.__exit__(None, None, None)


def _too_many_bytes(size: int, max_bytes: int) -> ImageError:
    return ImageError("too_many_bytes", f"{size:,} bytes; the limit is {max_bytes:,}")


def _read_file(uri: str, max_bytes: int) -> bytes | ImageError:
    try:
        fs, path = filesystem(uri)
        with fs.open_input_file(path) as file:
            size = file.size()
            return _too_many_bytes(size, max_bytes) if size > max_bytes else file.read()
    except FileNotFoundError:
        return ImageError("not_found", "the file was listed but is not there")
    except OSError as error:
        return ImageError("fetch_failed", _advice(error))


def _read_member(archive: zipfile.ZipFile, location: Location, max_bytes: int) -> bytes | ImageError:
    try:
        info = archive.getinfo(location.member or "")
        if info.file_size > max_bytes:
            return _too_many_bytes(info.file_size, max_bytes)
        with archive.open(info) as file:
            data = file.read(max_bytes + 1)  # the declared size is not trusted
        return _too_many_bytes(len(data), max_bytes) if len(data) > max_bytes else data
    except KeyError:
        return ImageError("not_found", "the archive has no such member")
    except Exception as error:  # zipfile raises many kinds for a damaged or encrypted member
        return ImageError("fetch_failed", f"the archive member cannot be read: {error}")


def write_parquet(uri: str, table: pa.Table) -> None:
    """Writes a table as one Parquet file, whole or not at all."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    write(uri, buffer.getvalue())


def read_parquet(uri: str, columns: list[str] | None = None) -> pa.Table:
    """One Parquet file as a table.

    Raises:
        UserError: it is missing or no Parquet file.
    """
    try:
        return pq.read_table(io.BytesIO(read(uri)), columns=columns)
    except pa.ArrowInvalid as error:
        raise UserError(f"{uri} is no Parquet file or damaged ({error}); make it again") from error
