"""How S3 is reached: keys, region and address by the usual AWS chain, one for pyarrow and boto3 alike.

`AWS_ENDPOINT_URL`, or `endpoint_url` of a profile, names another server than Amazon's.
"""

from __future__ import annotations

import os
from functools import lru_cache
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import boto3
import pyarrow.fs as pafs
from botocore import UNSIGNED
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from botocore.session import get_session

from scalp_core.errors import UserError

_CONNECT_TIMEOUT_S = 5
_REQUEST_TIMEOUT_S = 30
_MAX_ATTEMPTS = 3  # by the S3 client itself, within seconds
_PATIENT_ATTEMPTS = 12  # within a minute or two


def filesystem(patient: bool = False) -> pafs.S3FileSystem:
    """For bytes: reads by range, writes in parts. A patient one itself waits for a server that is away."""
    return _filesystem(_access(), _PATIENT_ATTEMPTS if patient else _MAX_ATTEMPTS)


def answer(operation: str, **query: Any) -> dict[str, Any]:
    """What S3 answers to an operation of boto3's client.

    Raises:
        OSError: in boto3's words, so that all storage fails in one way.
    """
    try:
        return getattr(_client(_access()), operation)(**query)
    except (BotoCoreError, ClientError) as error:
        raise OSError(str(error)) from error


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
        chain = _chain(os.environ.get("AWS_PROFILE"), os.environ.get("AWS_ACCESS_KEY_ID"))
        keys = chain.credentials.get_frozen_credentials() if chain.credentials else None
    except BotoCoreError as error:
        raise UserError(f"the AWS credentials cannot be had: {error}") from error
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
