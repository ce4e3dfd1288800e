"""S3 clients and requests: keys, region and address by the usual AWS chain, one for pyarrow and boto3 alike.

`AWS_ENDPOINT_URL`, or `endpoint_url` of a profile, names another server than Amazon's.

Objects are read, written, listed and removed by boto3, whose errors carry codes. pyarrow's client reads
images and data sets: an object of 60 KB takes it 1.2 ms of a core, boto3 2.1 ms (SeaweedFS on loopback, 2
cores, 2026-11-28). A key that it refuses and every failure are left to boto3.
"""

from __future__ import annotations

import io
import os
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from http import HTTPStatus
from typing import IO, Any, NamedTuple
from urllib.parse import urlsplit

import boto3
import pyarrow.fs as pafs
from boto3.exceptions import S3UploadFailedError
from botocore import UNSIGNED
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from botocore.session import get_session

from scalp_core.errors import UserError
from scalp_core.storage.errors import StorageError
from scalp_core.storage.retry import call_with_retries

_CONNECT_TIMEOUT_S = 5
_REQUEST_TIMEOUT_S = 30
_MAX_ATTEMPTS = 3  # by the S3 client itself, within seconds
_PATIENT_ATTEMPTS = 12  # within a minute or two
_POOL = 32  # connections of one process: as many as its threads ask at once

_making = threading.Lock()  # boto3's default session is not safe where two threads make clients


def filesystem(patient: bool = False) -> pafs.S3FileSystem:
    """For bytes: reads by range, writes in parts. A patient one itself waits for a server that is away."""
    return _filesystem(_access(), _PATIENT_ATTEMPTS if patient else _MAX_ATTEMPTS)


def answer(operation: str, **query: Any) -> dict[str, Any]:
    """Call an operation of boto3's client.

    Raises:
        StorageError: with S3's code and the HTTP status.
    """
    with coded():
        return getattr(client(), operation)(**query)


@contextmanager
def coded() -> Iterator[None]:
    """Turn boto3's errors inside the block into `StorageError`, so that all storage fails in one way."""
    try:
        yield
    except ClientError as error:
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        raise StorageError(str(error), error.response.get("Error", {}).get("Code", ""), status) from error
    except (BotoCoreError, S3UploadFailedError) as error:
        cause = error.__context__
        if isinstance(cause, ClientError):  # s3transfer wraps it
            raise StorageError(
                str(cause),
                cause.response.get("Error", {}).get("Code", ""),
                cause.response.get("ResponseMetadata", {}).get("HTTPStatusCode"),
            ) from error
        raise StorageError(str(error), type(error).__name__) from error


def client() -> Any:
    """The boto3 client for the credentials in force."""
    access = _access()
    with _making:
        return _client(access)


def head(bucket: str, key: str) -> dict[str, Any] | None:
    """Size, etag and metadata of one object; None if there is none."""
    if not key or key.endswith("/"):  # how some tools write a folder
        return None
    try:
        return answer("head_object", Bucket=bucket, Key=key)
    except StorageError as error:
        if error.status == HTTPStatus.NOT_FOUND:
            return None
        # The answer to HEAD has no body, so no code: the same server names it where there is one.
        answer("list_objects_v2", Bucket=bucket, Prefix=key, MaxKeys=1)
        raise


def get(bucket: str, key: str, byte_range: tuple[int, int] | None = None) -> bytes:
    """The bytes of one object, or those in [start, end) of it."""
    query = {"Range": f"bytes={byte_range[0]}-{byte_range[1] - 1}"} if byte_range else {}
    with coded():
        try:
            return client().get_object(Bucket=bucket, Key=key, **query)["Body"].read()
        except ClientError as error:
            if byte_range and error.response.get("Error", {}).get("Code") == "InvalidRange":
                return b""  # beyond the end
            raise


def put(bucket: str, key: str, data: bytes) -> None:
    answer("put_object", Bucket=bucket, Key=key, Body=data)


def upload(bucket: str, key: str, file: IO[bytes]) -> None:
    """Upload a file from its start, atomically; a large one in parts."""
    file.seek(0)
    # s3transfer closes what it is given.
    with coded(), open(file.fileno(), "rb", closefd=False) as unclosed:
        client().upload_fileobj(unclosed, bucket, key)


def create(bucket: str, key: str, data: bytes) -> bool:
    """Write an object unless there is one; True for exactly one of concurrent callers."""
    uri, mark = f"s3://{bucket}/{key}", uuid.uuid4().hex

    def put_new() -> bool:
        try:
            call_with_retries(uri, answer, "put_object", Bucket=bucket, Key=key, Body=data, IfNoneMatch="*",
                    Metadata={"created-by": mark})  # fmt: skip
        except StorageError as error:
            if error.code != "PreconditionFailed":
                raise
            return False
        return True

    if not put_new():
        # Perhaps it is this caller's: a lost answer, and the same request sent again.
        found = call_with_retries(uri, answer, "head_object", Bucket=bucket, Key=key)
        return bool(found["Metadata"].get("created-by") == mark)
    place = (_access().endpoint, bucket)
    if place not in _conditional:
        if put_new():  # the same bytes, so nothing is lost
            raise UserError(
                f"cannot write {uri} safely: the S3 server overwrites what `If-None-Match: *` protects; "
                "use a folder, or a server that knows it, as Amazon's and SeaweedFS do"
            )
        _conditional.add(place)
    return True


# Servers and buckets that were seen to honor `If-None-Match`: once a process is enough.
_conditional: set[tuple[str | None, str]] = set()


def delete(bucket: str, keys: list[str]) -> None:
    """Remove up to 1,000 objects by one request.

    Raises:
        StorageError: some were not removed: S3 answers 200 all the same.
    """
    found = answer(
        "delete_objects", Bucket=bucket, Delete={"Objects": [{"Key": key} for key in keys], "Quiet": True}
    )
    for error in found.get("Errors", ()):
        raise StorageError(f"{error.get('Key')}: {error.get('Message')}", error.get("Code", ""))


class Reader(io.RawIOBase):
    """An object to read from any place, one request for each read.

    Raises:
        StorageError: there is none, or storage refused.
    """

    def __init__(self, bucket: str, key: str) -> None:
        found = head(bucket, key)
        if found is None:
            raise FileNotFoundError(f"s3://{bucket}/{key}")
        self._bucket, self._key, self._size, self._place = bucket, key, int(found["ContentLength"]), 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        return self._place

    def tell(self) -> int:
        return self._place

    def size(self) -> int:
        return self._size

    def readinto(self, buffer: Any) -> int:
        end = min(self._place + len(buffer), self._size)
        data = get(self._bucket, self._key, (self._place, end)) if end > self._place else b""
        buffer[: len(data)] = data
        self._place += len(data)
        return len(data)


class _Access(NamedTuple):
    """How S3 is reached. A changed key makes another filesystem, so that none answers with old ones."""

    endpoint: str | None
    region: str
    key_id: str | None
    secret: str | None
    token: str | None


def _access() -> _Access:
    """What the usual AWS chain says now: environment, profile, role; short-lived keys are renewed."""
    try:
        with _making:
            chain = _chain(os.environ.get("AWS_PROFILE"), os.environ.get("AWS_ACCESS_KEY_ID"))
        keys = chain.credentials.get_frozen_credentials() if chain.credentials else None
    except BotoCoreError as error:
        raise UserError(f"no AWS credentials: {error}; check AWS_PROFILE and ~/.aws") from error
    named = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    return _Access(
        endpoint=named or chain.endpoint,
        region=os.environ.get("AWS_REGION") or chain.region or "us-east-1",
        key_id=keys.access_key if keys else None,
        secret=keys.secret_key if keys else None,
        token=keys.token if keys else None,
    )


class _Chain(NamedTuple):
    credentials: Any  # botocore's, which renew themselves; None where there are none
    endpoint: str | None
    region: str | None


# Looked up once: asking a cloud's own service for keys takes seconds where there is none.
@lru_cache(maxsize=4)
def _chain(profile: str | None, _key_id: str | None) -> _Chain:
    session = get_session()
    session.set_config_variable("profile", profile)
    endpoint = session.get_scoped_config().get("endpoint_url")
    return _Chain(session.get_credentials(), endpoint, session.get_config_variable("region"))


@lru_cache(maxsize=8)
def _filesystem(access: _Access, attempts: int) -> pafs.S3FileSystem:
    options: dict[str, Any] = {
        "region": access.region,
        "access_key": access.key_id,
        "secret_key": access.secret,
        "session_token": access.token,
        "anonymous": access.key_id is None,  # a public bucket needs none
        "connect_timeout": _CONNECT_TIMEOUT_S,
        "request_timeout": _REQUEST_TIMEOUT_S,
        "allow_delayed_open": True,  # a small file is one request, and not three
        "retry_strategy": pafs.AwsStandardS3RetryStrategy(max_attempts=attempts),
    }
    if access.endpoint:
        split = urlsplit(access.endpoint)
        options |= {"endpoint_override": split.netloc or split.path, "scheme": split.scheme or "https"}
    return pafs.S3FileSystem(**options)


@lru_cache(maxsize=8)
def _client(access: _Access) -> Any:
    config = Config(
        connect_timeout=_CONNECT_TIMEOUT_S,
        read_timeout=_REQUEST_TIMEOUT_S,
        retries={"mode": "standard", "max_attempts": _MAX_ATTEMPTS},
        max_pool_connections=_POOL,
        signature_version=None if access.key_id else UNSIGNED,
    )
    return boto3.client(
        "s3",
        endpoint_url=access.endpoint,
        region_name=access.region,
        aws_access_key_id=access.key_id,
        aws_secret_access_key=access.secret,
        aws_session_token=access.token,
        config=config,
    )
