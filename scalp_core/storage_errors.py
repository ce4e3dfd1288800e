"""What storage's errors mean: which of them pass, and what a person can do about the others, in one line."""

from __future__ import annotations

import errno
import tarfile
import zipfile
import zlib

import pyarrow as pa

from scalp_core.errors import UserError

# What says that the same request may be answered later.
_TRANSIENT = (
    "NETWORK_CONNECTION", "Couldn't connect", "curlCode", "SLOW_DOWN", "SlowDown", "INTERNAL_FAILURE",
    "SERVICE_UNAVAILABLE", "REQUEST_TIMEOUT", "HTTP status 500", "HTTP status 502", "HTTP status 503",
    "HTTP status 504", "InternalError", "ServiceUnavailable", "Could not connect", "Connection was closed",
    "timed out", "timeout", "(500)", "(502)", "(503)", "(504)", "ConditionalRequestConflict",
)  # fmt: skip

# Marks in an error's text, and what they come to.
_KNOWN = (
    (("INVALID_ACCESS_KEY_ID", "SIGNATURE_DOES_NOT_MATCH", "ACCESS_DENIED", "InvalidAccessKeyId",
      "SignatureDoesNotMatch", "AccessDenied", "HTTP status 403", "(403)", "Unable to locate credentials"),
     "the S3 server refused the key; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY to a valid one"),
    (("SLOW_DOWN", "SlowDown"),
     "the S3 server asks for fewer requests and went on asking; run the same command again later"),
    (("NETWORK_CONNECTION", "Couldn't connect", "Could not connect", "curlCode: 7", "curlCode: 28"),
     "the S3 server did not answer; check AWS_ENDPOINT_URL and the network"),
    (("NO_SUCH_BUCKET", "NoSuchBucket"), "there is no such bucket; check the name after s3://"),
)  # fmt: skip

_NO_SPACE = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the quota there is used up"}


class ArchiveError(OSError):
    """An archive that cannot be read, or not further: damaged, hostile or none. Its text is the reason."""


def is_transient(error: BaseException) -> bool:
    """Whether the same request may be answered later; of a `UserError`, whether it explains such a one."""
    if isinstance(error, UserError) and error.__cause__ is not None:
        return is_transient(error.__cause__)
    return (
        isinstance(error, OSError)
        and not isinstance(error, FileNotFoundError | PermissionError | ArchiveError)
        and error.errno not in _NO_SPACE
        and any(mark in str(error) for mark in _TRANSIENT)
    )


def advice(error: Exception) -> str:
    """What a storage error means and what to do, in one line."""
    if isinstance(error, ArchiveError):
        return str(error)
    if isinstance(error, OSError) and error.errno in _NO_SPACE:
        return f"{_NO_SPACE[error.errno]}; free space there and run the same command again"
    text = str(error).replace("\n", " ")
    for marks, meaning in _KNOWN:
        if any(mark in text for mark in marks):
            return meaning
    if isinstance(error, FileNotFoundError):
        return "it does not exist; check the path"
    if isinstance(error, zipfile.BadZipFile | tarfile.TarError | pa.ArrowInvalid | EOFError | zlib.error):
        return "it is not an archive of its kind or it is damaged; fetch it again"
    return text
