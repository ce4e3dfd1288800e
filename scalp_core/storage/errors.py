"""Storage errors by code: which are transient, and one line of advice for each.

Codes are compared and not words of a message, because messages contain the names of a user's files.
"""

from __future__ import annotations

import errno
import re
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import pyarrow as pa

from scalp_core.errors import UserError
from scalp_core.storage.credentials import describe_source

# S3's error codes and the names of botocore's exceptions. Codes in capitals come from the AWS SDK in pyarrow.
_THROTTLES = (
    "SlowDown", "SLOW_DOWN", "Throttling", "ThrottlingException", "THROTTLING", "RequestLimitExceeded",
    "TooManyRequests",
)  # fmt: skip
_NO_ANSWERS = (
    "NETWORK_CONNECTION", "EndpointConnectionError", "ConnectTimeoutError", "ReadTimeoutError",
    "ConnectionClosedError", "ConnectionError", "HTTPClientError", "ProxyConnectionError",
    "ResponseStreamingError", "IncompleteReadError",
)  # fmt: skip
# The same request may succeed later.
_TRANSIENT_CODES = frozenset({
    *_THROTTLES, *_NO_ANSWERS, "InternalError", "INTERNAL_FAILURE", "ServiceUnavailable",
    "SERVICE_UNAVAILABLE", "RequestTimeout", "REQUEST_TIMEOUT", "ConditionalRequestConflict",
    "OperationAborted",
})  # fmt: skip
_TRANSIENT_STATUS = frozenset({429, 500, 502, 503, 504})

_UNREACHABLE = "the S3 server did not answer; check AWS_ENDPOINT_URL and the network"
_THROTTLED = "the S3 server throttles requests and kept doing so; run the same command again later"
_NO_CREDENTIALS = (
    "no S3 credentials were found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or give "
    "the machine a role"
)
_MISSING = "it does not exist; check the path"
_CERTIFICATE = "the certificate of the S3 server cannot be verified; set AWS_CA_BUNDLE, or check the clock"


def _refused_key(source: str) -> str:
    return (
        f"the S3 server refused the key of {source}; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or "
        "AWS_PROFILE, to a valid one"
    )


def _denied(source: str) -> str:
    return (
        f"access denied (HTTP 403); the credentials in use ({source}) need s3:ListBucket, s3:GetObject and, "
        "to write, s3:PutObject and s3:DeleteObject"
    )


# Functions need the source of the credentials in use.
_ADVICE: dict[str, str | Callable[[str], str]] = {
    **dict.fromkeys(("InvalidAccessKeyId", "SignatureDoesNotMatch", "INVALID_ACCESS_KEY_ID",
                     "SIGNATURE_DOES_NOT_MATCH", "InvalidToken", "InvalidClientTokenId"), _refused_key),
    **dict.fromkeys(("ExpiredToken", "TokenRefreshRequired"),
                    "the S3 credentials have expired; renew them and run the same command again"),
    **dict.fromkeys(("NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError"),
                    _NO_CREDENTIALS),
    **dict.fromkeys(("AccessDenied", "ACCESS_DENIED", "AllAccessDisabled"), _denied),
    **dict.fromkeys(_THROTTLES, _THROTTLED),
    **dict.fromkeys(_NO_ANSWERS, _UNREACHABLE),
    **dict.fromkeys(("SSLError", "CERTIFICATE"), _CERTIFICATE),
    **dict.fromkeys(("NoSuchBucket", "NO_SUCH_BUCKET", "InvalidBucketName"),
                    "the bucket does not exist; check the name after s3://"),
    **dict.fromkeys(("NoSuchKey", "NO_SUCH_KEY", "RESOURCE_NOT_FOUND"), _MISSING),
    **dict.fromkeys(("PermanentRedirect", "AuthorizationHeaderMalformed"),
                    "the bucket is in another region; set AWS_REGION to it"),
    "RequestTimeTooSkewed": "the clock of this machine differs from the S3 server's; correct it",
}  # fmt: skip
_ADVICE_BY_STATUS: dict[int, str | Callable[[str], str]] = {
    401: _refused_key,
    403: _denied,
    404: _MISSING,
    429: _THROTTLED,
    503: _UNREACHABLE,
}

_ADVICE_BY_ERRNO = {
    errno.ENOSPC: "the disk is full; free space there and run the same command again",
    errno.EDQUOT: "the quota there is used up; free space there and run the same command again",
    errno.ENOENT: _MISSING,
    errno.ENOTDIR: "a part of the path is a file, not a folder; check the path",
    errno.EISDIR: "it is a folder, not a file; check the path",
    errno.EACCES: "permission denied for the user who runs this; change its permissions or the user",
    errno.EPERM: "permission denied for the user who runs this; change its permissions or the user",
    errno.EROFS: "the disk is read-only; choose another place",
    errno.ENAMETOOLONG: "the name is too long for this disk; rename it",
    errno.ELOOP: "its links form a loop; remove one of them",
    errno.EIO: "the disk reports an input/output error; check it",
    errno.ESTALE: "the network disk was mounted again; run the same command again",
}  # fmt: skip

# The format of pyarrow's S3 errors (ErrorToStatus in its s3_internal.h), after the names of key and bucket.
_ARROW = re.compile(r"(?:^|: )AWS Error ([A-Z_]+)(?: \(HTTP status (\d{3})\))? during \w+ operation")
_CURL = re.compile(r"curlCode: (\d+)")
_CURL_CERTIFICATE = {35, 51, 58, 60, 77, 83, 91}  # TLS: a handshake, a certificate or its authority


class ArchiveError(OSError):
    """An archive that cannot be read further: damaged, hostile or not an archive. Its text is the reason."""


class StorageError(OSError):
    """A refused or failed S3 request.

    Args:
        message: Message of the server, or of botocore.
        code: S3's error code such as `SlowDown`, or the name of botocore's exception.
        status: HTTP status; None where no response arrived.
    """

    def __init__(self, message: str, code: str, status: int | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.status = status

    def __reduce__(self) -> tuple[type[StorageError], tuple[str, str, int | None]]:
        return type(self), (str(self), self.code, self.status)


class _Code(NamedTuple):
    """Code and HTTP status of an S3 error; code is empty for another error."""

    code: str = ""
    status: int | None = None


@contextmanager
def explain_errors(uri: str, doing: str = "read") -> Iterator[None]:
    """Turn storage errors inside the block into a `UserError`: one line with `uri` and the fix."""
    try:
        yield
    except (OSError, EOFError, zipfile.BadZipFile, tarfile.TarError, zlib.error, pa.ArrowInvalid) as error:
        raise UserError(f"cannot {doing} {uri}: {advice(error)}") from error


@contextmanager
def rename_errors(uri: str) -> Iterator[None]:
    """Name `uri`, which the user gave, in storage errors of a file below it that only scalp knows."""
    try:
        yield
    except UserError as error:
        if not isinstance(error.__cause__, OSError):
            raise
        raise UserError(f"cannot read {uri}: {advice(error.__cause__)}") from error.__cause__


def is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed later; the cause of a `UserError` is examined."""
    if isinstance(error, UserError) and error.__cause__ is not None:
        return is_transient(error.__cause__)
    if not isinstance(error, OSError) or isinstance(error, ArchiveError):
        return False
    code, status = _code_of(error)
    return code in _TRANSIENT_CODES or (bool(code) and status in _TRANSIENT_STATUS)


def is_missing(error: BaseException) -> bool:
    """Whether an error means that the object or file is missing."""
    return isinstance(error, FileNotFoundError | NotADirectoryError) or (
        isinstance(error, OSError) and _code_of(error).code in ("NoSuchKey", "NO_SUCH_KEY", "404")
    )


def label(error: BaseException) -> str:
    """Code and HTTP status of a storage error, or its text, for a log message."""
    code, status = _code_of(error) if isinstance(error, OSError) else _Code()
    if not code:
        return str(error)
    return f"{code} (HTTP {status})" if status else code


def advice(error: BaseException) -> str:
    """Explain a storage error and its fix in one line."""
    if isinstance(error, ArchiveError):
        return str(error)
    if isinstance(error, OSError):
        code, status = _code_of(error)
        if known := _ADVICE.get(code) or _ADVICE_BY_STATUS.get(status or 0):
            if isinstance(known, str):
                return known
            source = describe_source()
            return known(source) if source else f"access denied: {_NO_CREDENTIALS}"
        if known := _ADVICE_BY_ERRNO.get(error.errno or 0):
            return known
        if isinstance(error, FileNotFoundError):
            return _MISSING
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, OSError):
        return text
    if isinstance(error, pa.ArrowInvalid):
        return f"it is damaged or of another format ({text[:200]}); create it or fetch it again"
    return "it is not an archive of its kind or it is damaged; fetch it again"


def _code_of(error: OSError) -> _Code:
    if isinstance(error, StorageError):
        return _Code(error.code, error.status)
    if error.errno is not None:  # an error of this machine
        return _Code()
    text = str(error)
    matches = list(_ARROW.finditer(text))
    if not matches:
        return _Code()
    code, status = matches[-1].groups()
    curl = _CURL.search(text, matches[-1].end())
    if curl and int(curl[1]) in _CURL_CERTIFICATE:
        return _Code("CERTIFICATE")
    return _Code(code, int(status) if status else None)
