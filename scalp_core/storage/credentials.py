"""S3 credentials in use, by the AWS chain, and the name of their source for messages; never a key."""

from __future__ import annotations

import os
from functools import lru_cache
from typing import Any

# The variables of the chain: a change of one takes effect with the next request.
ENVIRONMENT = (
    "AWS_PROFILE", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_REGION",
    "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_CONFIG_FILE",
    "AWS_SHARED_CREDENTIALS_FILE",
)  # fmt: skip

# By botocore's names of its providers.
_SOURCES = {
    "env": "AWS_ACCESS_KEY_ID of the environment",
    "shared-credentials-file": "profile {profile}",
    "config-file": "profile {profile}",
    "custom-process": "credential_process of profile {profile}",
    "sso": "single sign-on of profile {profile}",
    "assume-role": "the role of profile {profile}",
    "assume-role-with-web-identity": "the role of the service account",
    "container-role": "the role of the container",
    "iam-role": "the role of the machine",
}


def find() -> tuple[Any, Any]:
    """Find the credentials of the environment, a profile or a role.

    Returns:
        A new session of botocore, and its credentials, which renew themselves; None without any.

    Raises:
        BotoCoreError: The profile does not exist, or its files cannot be read.
    """
    # Imported here, because it is slow.
    from botocore.session import get_session

    session = get_session()
    return session, session.get_credentials()


def describe_source() -> str | None:
    """Name the source of the credentials in use; None if there are none."""
    return _describe_source(tuple(map(os.environ.get, ENVIRONMENT)))


# Cached: outside of a cloud, a request to its metadata service for keys takes seconds until it fails.
@lru_cache(maxsize=8)
def _describe_source(_environment: tuple[str | None, ...]) -> str | None:
    from botocore.exceptions import BotoCoreError

    try:
        session, credentials = find()
    except BotoCoreError:
        return None
    if credentials is None:
        return None
    profile = session.get_config_variable("profile") or "default"
    return _SOURCES.get(credentials.method, credentials.method).format(profile=profile)
