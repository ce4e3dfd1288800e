"""Who may ask: bearer keys, from a file or the environment, and how often each."""

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
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from scalp_core.errors import UserError

VARIABLE = "SCALP_KEYS"

_LINE = re.compile(r"(?P<id>[\w.@-]{1,64})(?:\s*:\s*|\s+)(?P<key>\S+)", re.ASCII)
_HASHED = re.compile(r"sha256:[0-9a-f]{64}", re.ASCII | re.IGNORECASE)
_SHORTEST = 20  # characters of a key: hashes of short ones are guessed
_LOOK_AGAIN_S = 5

_log = logging.getLogger("ray.serve")


class KeySettings(BaseModel):
    """Who may ask, and how often. Keys themselves stay in the file or the environment of the replicas."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    file: str | None = Field(
        None,
        description="a line `ID: KEY` or `ID: sha256:HEX` for each key, `#` for comments; read again when it "
        f"changes. Keys in the environment variable {VARIABLE}, in the same lines, count too",
    )
    per_minute: float = Field(
        600, gt=0, description="requests a minute of one key, each replica counting for itself"
    )
    burst: int = Field(60, ge=1, description="requests of one key at once, when it was quiet before")
    anonymous_per_minute: float | None = Field(
        None, gt=0, description="the same for one client address without a right key; None is no limit"
    )
    anonymous_burst: int = Field(20, ge=1, description="the same for one client address")
    open_to_network_without_keys: bool = Field(
        False, description="answer everybody who reaches the endpoint, though there are no keys"
    )


class Key(NamedTuple):
    """One key: who it is, and the sha256 of what is sent."""

    id: str
    digest: bytes


def new_key(id_: str) -> tuple[str, str]:
    """Makes a key.

    Returns:
        The key, to give away, and the line for the file, from which it cannot be had back.

    Raises:
        UserError: the id is none.
    """
    key = f"scalp_{secrets.token_urlsafe(32)}"
    line = f"{id_}: sha256:{hashlib.sha256(key.encode()).hexdigest()}"
    if not _LINE.fullmatch(line):
        raise UserError(
            f"{id_!r} cannot be the id of a key; take up to 64 letters, digits and any of . _ @ -"
        )
    return key, line


def parse_keys(lines: Iterable[str], origin: str) -> list[Key]:
    """Reads lines of keys. An id may have several keys, so that a new one can replace an old one.

    Raises:
        UserError: with the number of the line, and without what it holds.
    """
    keys: dict[bytes, Key] = {}
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        match = _LINE.fullmatch(text)
        if match is None:
            raise UserError(f"line {number} of {origin} is no `ID: KEY`; `scalp keys new ID` makes one")
        id_, word = match["id"], match["key"]
        if word.lower().startswith("sha256:"):
            if not _HASHED.fullmatch(word):
                raise UserError(f"line {number} of {origin} has no 64 hexadecimal digits after sha256:")
            digest = bytes.fromhex(word[7:])
        elif len(word) < _SHORTEST:
            raise UserError(
                f"the key in line {number} of {origin} is shorter than {_SHORTEST} characters; "
                "`scalp keys new ID` makes one that nobody guesses"
            )
        else:
            digest = hashlib.sha256(word.encode()).digest()
        if digest in keys and keys[digest].id != id_:
            raise UserError(f"line {number} of {origin} has the key of {keys[digest].id}; each needs its own")
        keys[digest] = Key(id_, digest)
    return list(keys.values())


def _read_file(path: str) -> list[str]:
    """The lines of the key file.

    Raises:
        UserError: it cannot be read, or others can.
    """
    try:
        with Path(path).open(encoding="utf-8") as file:
            status = os.fstat(file.fileno())
            # Kubernetes mounts a secret as root's, for the group of the one who runs.
            forbidden = stat.S_IRWXO | (stat.S_IRWXG if status.st_uid == os.geteuid() else stat.S_IWGRP)
            if status.st_mode & forbidden:
                raise UserError(f"{path} holds keys and others may read it; run: chmod 600 {path}")
            return file.read().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise UserError(f"the keys in {path} cannot be read: {reason}") from error


class Keys:
    """The keys of `settings.file` and of the environment.

    Raises:
        UserError: as `parse_keys`, and when the file cannot be read or can be read by others.
    """

    def __init__(self, settings: KeySettings) -> None:
        self._path = settings.file
        self._from_environment = parse_keys(os.environ.get(VARIABLE, "").splitlines(), VARIABLE)
        self._signature = self._look()
        self._from_file = self._read()
        self._looked = time.monotonic()

    def __bool__(self) -> bool:
        # A file without a key is a file whose keys were all taken back: nobody is let in.
        return bool(self._from_environment) or self._path is not None

    def identify(self, authorization: str | None) -> str | None:
        """The id of the key in an `Authorization` header; None when it is none of ours.

        All keys are compared, each in constant time: how long it takes says nothing of any key.
        """
        self._refresh()
        scheme, _, word = (authorization or "").partition(" ")
        if scheme.lower() != "bearer":
            return None
        digest = hashlib.sha256(word.strip().encode()).digest()
        found = None
        for key in (*self._from_environment, *self._from_file):
            if hmac.compare_digest(key.digest, digest):
                found = key.id
        return found

    def _read(self) -> list[Key]:
        return [] if self._path is None else parse_keys(_read_file(self._path), self._path)

    def _look(self) -> tuple[int, ...]:
        if self._path is None:
            return ()
        try:
            status = Path(self._path).stat()
        except OSError:
            return ()
        return status.st_mtime_ns, status.st_size, status.st_ino, status.st_mode

    def _refresh(self) -> None:
        """Reads the file again when it changed: a key that was taken back stops within seconds."""
        now = time.monotonic()
        if self._path is None or now - self._looked < _LOOK_AGAIN_S:
            return
        self._looked = now
        signature = self._look()
        if signature == self._signature:
            return
        self._signature = signature
        try:
            self._from_file = self._read()
        except UserError as error:
            if not Path(self._path).exists():
                self._from_file = []
                _log.error("all keys of the file are refused until it exists again: %s", error)
                return
            _log.error("the keys stay as they were: %s", error)
