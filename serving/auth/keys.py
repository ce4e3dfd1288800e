"""Bearer keys of the endpoint, from a file or the environment."""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import re
import secrets
import stat
import time
from collections.abc import Iterable
from datetime import UTC, date, datetime
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel, Field

from scalp_core import storage
from scalp_core.errors import UserError
from serving.auth.scopes import ADJUDICATE, REVIEW, Rights

VARIABLE = "SCALP_KEYS"

_LINE = re.compile(r"(?P<id>[\w.@-]{1,64})(?:\s*:\s*|\s+)(?P<key>\S+)(?P<attributes>(?:\s+\S+)*)")
_ID = re.compile(r"[\w.@-]{1,64}", re.ASCII)
_HASHED = re.compile(r"sha256:[0-9a-f]{64}", re.ASCII | re.IGNORECASE)
_SHORTEST = 20  # characters of a key: short keys can be guessed from their hashes
_RELOAD_S = 5

DEFAULT_RIGHTS = Rights(grade=True)
"""Rights of a key without scopes. Bulk runs show images of others and take hours, so they need a scope."""

_log = logging.getLogger("ray.serve")


class KeySettings(BaseModel, extra="forbid", frozen=True):
    """Where the keys are. The keys themselves stay in the file or the environment of the replicas."""

    file: str | None = Field(
        None,
        description="one line `ID: sha256:HEX [scope=SCOPE]... [expires=YYYY-MM-DD]` per key, `#` for "
        f"comments; a change applies within five seconds. The environment variable {VARIABLE} adds keys",
    )
    open_to_network_without_keys: bool = Field(
        False, description="accept requests from the network without keys"
    )


class Key(NamedTuple):
    """One key.

    Args:
        rights: Rights of the key; `grade` alone for a line without scopes.
        expires: Last valid day, in UTC; None for no expiry.
    """

    id: str
    digest: bytes
    rights: Rights = DEFAULT_RIGHTS
    expires: date | None = None

    @property
    def is_expired(self) -> bool:
        return self.expires is not None and datetime.now(UTC).date() > self.expires


def new_key(id_: str, rights: Rights = DEFAULT_RIGHTS, expires: date | None = None) -> tuple[str, str]:
    """Make a key.

    Returns:
        The key for the client, and the line for the key file, which contains its hash only.

    Raises:
        UserError: The id is invalid.
    """
    if not _ID.fullmatch(id_):
        raise UserError(
            f"{id_!r} is not a valid id of a key; use up to 64 letters, digits and any of . _ @ -"
        )
    key = f"scalp_{secrets.token_urlsafe(32)}"
    words = [f"{id_}:", f"sha256:{hashlib.sha256(key.encode()).hexdigest()}"]
    words += [f"scope={scope}" for scope in rights.scopes]
    words += [f"expires={expires}"] if expires else []
    return key, " ".join(words)


def parse_keys(lines: Iterable[str], origin: str) -> list[Key]:
    """Parse lines of keys. An id may have several keys, so that a new key can replace an old one.

    Raises:
        UserError: A line is invalid; the message has its number, not its content.
    """
    keys: dict[bytes, Key] = {}
    decides: dict[str, bool] = {}
    for number, line in enumerate(lines, 1):
        key = parse_line(line, f"line {number} of {origin}")
        if key is None:
            continue
        if (known := keys.setdefault(key.digest, key)) != key:
            advice = "give each id its own key" if known.id != key.id else "remove one of the two lines"
            raise UserError(f"line {number} of {origin} has the key of {known.id}; {advice}")
        is_reader = key.rights.review or key.rights.adjudicate
        if is_reader and decides.setdefault(key.id, key.rights.adjudicate) != key.rights.adjudicate:
            raise UserError(
                f"line {number} of {origin} is a second key of {key.id}, which would both read and decide; "
                f"give the keys with {REVIEW} and {ADJUDICATE} different ids"
            )
    return list(keys.values())


def parse_line(line: str, origin: str) -> Key | None:
    """Parse one line; None for an empty line or a comment.

    Raises:
        UserError: The line is invalid; the message has `origin`, not the content.
    """
    text = line.strip()
    if not text or text.startswith("#"):
        return None
    match = _LINE.fullmatch(text)
    if match is None or not _ID.fullmatch(match["id"]):
        raise UserError(f"{origin} is not `ID: KEY`; `scalp keys new ID` makes a valid line")
    word = match["key"]
    if word.lower().startswith("sha256:"):
        if not _HASHED.fullmatch(word):
            raise UserError(f"{origin} does not have 64 hexadecimal digits after sha256:")
        digest = bytes.fromhex(word[7:])
    elif len(word) < _SHORTEST:
        raise UserError(
            f"the key in {origin} is shorter than {_SHORTEST} characters; "
            "`scalp keys new ID` makes a strong one"
        )
    else:
        digest = hashlib.sha256(word.encode()).digest()
    try:
        return Key(match["id"], digest, *_attributes(match["attributes"].split()))
    except ValueError as error:
        raise UserError(f"{origin}: {error}") from None


def _attributes(words: list[str]) -> tuple[Rights, date | None]:
    """Parse the rights and expiry of a line.

    Raises:
        ValueError: An attribute is invalid; the message omits it, as it may be part of a key.
    """
    scopes, dates = [], []
    for word in words:
        name, _, value = word.partition("=")
        if name == "scope":
            scopes.append(value)
        elif name == "expires":
            dates.append(parse_date(value))
        else:
            raise ValueError(
                "an attribute of the key is unknown; use scope=SCOPE, repeatable, and expires=YYYY-MM-DD"
            )
    if len(dates) > 1:
        raise ValueError("expires= is given twice; keep one")
    return Rights.parse(scopes) if scopes else DEFAULT_RIGHTS, dates[0] if dates else None


def parse_date(text: str) -> date:
    """Parse a day as `YYYY-MM-DD`.

    Raises:
        ValueError: The format is wrong; the message omits the text.
    """
    if not re.fullmatch(r"\d{4}-\d\d-\d\d", text, re.ASCII):
        raise ValueError("a day has another form; write YYYY-MM-DD")
    try:
        return date.fromisoformat(text)
    except ValueError:
        raise ValueError("the calendar has no such day; write one that it has, as YYYY-MM-DD") from None


def read_file(path: str) -> list[str]:
    """Read the lines of a key file.

    Raises:
        UserError: The file is not readable, or other users can read it.
    """
    try:
        with Path(path).open(encoding="utf-8") as file:
            status = os.fstat(file.fileno())
            # Kubernetes mounts a secret as owned by root, with the group of the process.
            forbidden = stat.S_IRWXO | (stat.S_IRWXG if status.st_uid == os.geteuid() else stat.S_IWGRP)
            if status.st_mode & forbidden:
                raise UserError(f"{path} holds keys and other users can read it; run: chmod 600 {path}")
            return file.read().splitlines()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 text; give a file with lines that `scalp keys new ID` printed"
        ) from error
    except OSError as error:
        raise UserError(f"cannot read keys from {path}: {storage.advice(error)}") from error


class Keys:
    """The keys of `settings.file` and of the environment; reads the file again every five seconds.

    Raises:
        UserError: As `parse_keys` and `read_file`.
    """

    def __init__(self, settings: KeySettings) -> None:
        self._path = settings.file
        self._from_environment = parse_keys(os.environ.get(VARIABLE, "").splitlines(), VARIABLE)
        self._from_file = self._read()
        self._looked = time.monotonic()

    def __bool__(self) -> bool:
        # A file without keys had all its keys revoked: every request is refused.
        return bool(self._from_environment) or self._path is not None

    def identify(self, authorization: str | None) -> Key | None:
        """Find the key of an `Authorization` header, expired or not; None if it is unknown.

        All keys are compared in constant time, so that the duration reveals nothing about them.
        """
        self._refresh()
        scheme, _, word = (authorization or "").partition(" ")
        if scheme.lower() != "bearer":
            return None
        digest = hashlib.sha256(word.strip().encode()).digest()
        match = None
        for key in (*self._from_environment, *self._from_file):
            if hmac.compare_digest(key.digest, digest):
                match = key
        return match

    def _read(self) -> list[Key]:
        return [] if self._path is None else parse_keys(read_file(self._path), self._path)

    def _refresh(self) -> None:
        """Read the file again: a revoked key stops working within seconds."""
        now = time.monotonic()
        if self._path is None or now - self._looked < _RELOAD_S:
            return
        self._looked = now
        try:
            self._from_file = self._read()
        except UserError as error:
            if Path(self._path).exists():
                _log.error("the key file is invalid, the keys stay as they were: %s", error)
            else:
                self._from_file = []
                _log.error("the key file is missing, its keys are refused until it exists again: %s", error)
