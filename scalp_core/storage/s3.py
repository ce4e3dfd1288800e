"""S3 clients and requests: keys, region and endpoint from the AWS chain, the same for pyarrow and boto3.

`AWS_ENDPOINT_URL`, or `endpoint_url` of a profile, selects another server than Amazon's.

Objects are read, written, listed and removed by boto3, whose errors carry codes. pyarrow's client reads
images and data sets: an object of 60 KB takes it 1.2 ms of a core, boto3 2.1 ms (SeaweedFS on loopback, 2
cores, 2026-11-28). boto3 handles the keys that pyarrow refuses, and all failures. It is imported inside
the functions that use it, because that is slow.
"""

from __future__ import annotations

import os
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from http import HTTPStatus
from typing import IO, Any, NamedTuple
from urllib.parse import urlsplit

import pyarrow.fs as pafs

from scalp_core.errors import UserError
from scalp_core.storage import credentials
from scalp_core.storage.errors import StorageError
from scalp_core.storage.retry import call_with_retries

_CONNECT_TIMEOUT_S = 5
_REQUEST_TIMEOUT_S = 30
_MAX_ATTEMPTS = 3  # by the S3 client itself, within seconds
_LONG_ATTEMPTS = 12  # within a minute or two
_POOL = 32  # connections per process, for requests of its threads in parallel

_client_lock = threading.Lock()


def filesystem(long_retries: bool = False) -> pafs.S3FileSystem:
    """Return pyarrow's S3 filesystem; with `long_retries` it retries an unavailable server for minutes."""
    chain, keys = _chain()
    return _filesystem(chain.endpoint, chain.region, keys, _LONG_ATTEMPTS if long_retries else _MAX_ATTEMPTS)


def answer(operation: str, **query: Any) -> dict[str, Any]:
    """Call an operation of boto3's client.

    Raises:
        StorageError: the request failed; has S3's code and the HTTP status.
    """
    with coded():
        return getattr(client(), operation)(**query)


@contextmanager
def coded() -> Iterator[None]:
    """Turn boto3's errors inside the block into `StorageError`."""
    from boto3.exceptions import S3UploadFailedError
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except (ClientError, BotoCoreError, S3UploadFailedError) as error:
        cause = error if isinstance(error, ClientError) else error.__context__  # s3transfer wraps it
        if not isinstance(cause, ClientError):
            raise StorageError(str(error), type(error).__name__) from error
        code = cause.response.get("Error", {}).get("Code", "")
        status = cause.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        raise StorageError(str(cause), code, status) from error


def client() -> Any:
    """Return the boto3 client for the current credentials."""
    return _chain()[0].client


def head(bucket: str, key: str) -> dict[str, Any] | None:
    """Read size, etag and metadata of one object; None if it is missing."""
    if not key or key.endswith("/"):  # a folder of some tools
        return None
    try:
        return answer("head_object", Bucket=bucket, Key=key)
    except StorageError as error:
        if error.status == HTTPStatus.NOT_FOUND:
            return None
        # A response to HEAD has no body, hence no error code; a listing request returns the code.
        answer("list_objects_v2", Bucket=bucket, Prefix=key, MaxKeys=1)
        raise


def get(bucket: str, key: str, byte_range: tuple[int, int] | None = None) -> bytes:
    """Read the bytes of one object, or its range [start, end)."""
    query = {"Range": f"bytes={byte_range[0]}-{byte_range[1] - 1}"} if byte_range else {}
    try:
        with coded():
            return client().get_object(Bucket=bucket, Key=key, **query)["Body"].read()
    except StorageError as error:
        if byte_range and error.code == "InvalidRange":  # beyond the end
            return b""
        raise


def put(bucket: str, key: str, data: bytes) -> None:
    answer("put_object", Bucket=bucket, Key=key, Body=data)


def upload(bucket: str, key: str, file: IO[bytes]) -> None:
    """Upload a file from its start, atomically; a large one in parts."""
    file.seek(0)
    # s3transfer closes the file object that it gets.
    with coded(), open(file.fileno(), "rb", closefd=False) as unclosed:
        client().upload_fileobj(unclosed, bucket, key)


def create(bucket: str, key: str, data: bytes) -> bool:
    """Write an object unless it exists; True for exactly one of concurrent callers."""
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
        # It may be this caller's object: the first response was lost, and the request was retried.
        head_of_object = call_with_retries(uri, answer, "head_object", Bucket=bucket, Key=key)
        return bool(head_of_object["Metadata"].get("created-by") == mark)
    place = (client().meta.endpoint_url, bucket)
    if place not in _conditional:
        if put_new():  # the same bytes, so no data are lost
            raise UserError(
                f"cannot write {uri} safely: the S3 server ignores `If-None-Match: *` and overwrites; "
                "use a local folder, or a server that supports it, such as Amazon S3 or SeaweedFS"
            )
        _conditional.add(place)
    return True


# Servers and buckets that honored `If-None-Match`, tested once per process.
_conditional: set[tuple[str | None, str]] = set()


def delete(bucket: str, keys: list[str]) -> None:
    """Remove up to 1,000 objects by one request.

    Raises:
        StorageError: some objects were not removed, although S3 answered 200.
    """
    response = answer(
        "delete_objects", Bucket=bucket, Delete={"Objects": [{"Key": key} for key in keys], "Quiet": True}
    )
    for error in response.get("Errors", ()):
        raise StorageError(f"{error.get('Key')}: {error.get('Message')}", error.get("Code", ""))


class _Chain(NamedTuple):
    """The AWS chain: environment, profile, role."""

    credentials: Any  # botocore's, which renew themselves; None without any
    endpoint: str | None
    region: str
    client: Any


def _chain() -> tuple[_Chain, Any]:
    """Resolve the AWS chain now, and its keys; None without keys, as for a public bucket."""
    from botocore.exceptions import BotoCoreError

    try:
        with _client_lock:
            chain = _resolve(tuple(map(os.environ.get, credentials.ENVIRONMENT)))
        return chain, chain.credentials.get_frozen_credentials() if chain.credentials else None
    except BotoCoreError as error:
        raise UserError(f"no AWS credentials: {error}; check AWS_PROFILE and ~/.aws") from error


# Cached: outside of a cloud, a request to its metadata service for keys takes seconds until it fails.
@lru_cache(maxsize=8)
def _resolve(_environment: tuple[str | None, ...]) -> _Chain:
    import boto3
    from botocore import UNSIGNED
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError

    session, keys = credentials.find()
    named = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    endpoint = named or session.get_scoped_config().get("endpoint_url")
    region = os.environ.get("AWS_REGION") or session.get_config_variable("region") or "us-east-1"
    config = Config(
        connect_timeout=_CONNECT_TIMEOUT_S,
        read_timeout=_REQUEST_TIMEOUT_S,
        retries={"mode": "standard", "max_attempts": _MAX_ATTEMPTS},
        max_pool_connections=_POOL,
        signature_version=None if keys else UNSIGNED,
    )
    made = boto3.Session(botocore_session=session)
    try:
        client = made.client("s3", endpoint_url=endpoint, region_name=region, config=config)
    except BotoCoreError:
        raise
    except ValueError as error:  # botocore has no class for it
        raise UserError(
            f"the S3 endpoint {endpoint} of AWS_ENDPOINT_URL or the profile is not a URL; write "
            "http://HOST:PORT or https://HOST"
        ) from error
    return _Chain(keys, endpoint, region, client)


@lru_cache(maxsize=8)
def _filesystem(endpoint: str | None, region: str, keys: Any, attempts: int) -> pafs.S3FileSystem:
    options: dict[str, Any] = {
        "region": region,
        "anonymous": keys is None,
        "connect_timeout": _CONNECT_TIMEOUT_S,
        "request_timeout": _REQUEST_TIMEOUT_S,
        "allow_delayed_open": True,  # one request per small file instead of three
        "retry_strategy": pafs.AwsStandardS3RetryStrategy(max_attempts=attempts),
    }
    if keys:
        options |= {"access_key": keys.access_key, "secret_key": keys.secret_key, "session_token": keys.token}
    if endpoint:
        split = urlsplit(endpoint)
        options |= {"endpoint_override": split.netloc or split.path, "scheme": split.scheme or "https"}
    return pafs.S3FileSystem(**options)
