"""Scopes and rights of a key, and the prefixes that they name."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Literal, NamedTuple
from urllib.parse import quote, unquote

from scalp_core.storage.uris import is_s3

Need = Literal["grade", "keep", "bulk", "review"]

GRADE: Literal["grade"] = "grade"
KEEP: Literal["keep"] = "keep"
BULK: Literal["bulk"] = "bulk"
REVIEW: Literal["review"] = "review"
ADJUDICATE = "adjudicate"
ADMIN = "admin"
NAMES_OF_NEEDS: dict[Need, str] = {
    GRADE: GRADE,
    KEEP: KEEP,
    BULK: f"{BULK}:PREFIX",
    REVIEW: f"{REVIEW} or {ADJUDICATE}",
}
"""Scopes that a key lacks, in a refusal."""

_PLAIN = (GRADE, KEEP, REVIEW, ADJUDICATE, ADMIN)  # scopes without a prefix
_MAX_LENGTH = 1024  # of a key in S3
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_FORBIDDEN = re.compile(r"[?#@%\\]")  # queries, fragments, users, escapes, another system's slashes


def canonical_uri(uri: str) -> str:
    """Canonical form of a prefix or source, without a trailing slash.

    Other forms are refused: a program that decodes or resolves one again must not reach another place.

    Raises:
        ValueError: It is not `s3://BUCKET[/KEY]` or an absolute path in canonical form.
    """
    if len(uri) > _MAX_LENGTH or _FORBIDDEN.search(uri) or not uri.isprintable():
        raise ValueError("it is too long, or contains one of ? # @ % \\ or a character that is not printable")
    if is_s3(uri):
        bucket, _, path = uri[len("s3://") :].partition("/")
        if not _BUCKET.fullmatch(bucket) or ".." in bucket:
            raise ValueError("the name of the bucket is invalid")
    elif uri.startswith("/") and len(uri) > 1:
        path = uri[1:]
    else:
        raise ValueError("write s3://BUCKET/PREFIX, or an absolute path of a folder")
    path = path.removesuffix("/")
    if path and any(part in ("", ".", "..") for part in path.split("/")):
        raise ValueError("it has an empty part, . or .. between its slashes")
    return uri.removesuffix("/")


def is_below(uri: str, prefix: str) -> bool:
    """Whether `uri` is `prefix` or below it, both canonical; `s3://b/x-y` is not below `s3://b/x`."""
    return uri == prefix or uri.startswith(f"{prefix}/")


class Rights(NamedTuple):
    """Rights of a key, parsed from its scopes.

    Args:
        grade: Allows `/v1/grade`, `/v1/grade/batch`, `/v1/model` and `/v2/models/`.
        bulk: Canonical prefixes. Allows to start bulk runs on sources below them, and to read one's own runs.
        admin: Allows everything, including the bulk runs of all owners.
        review: Allows to answer the images of a review as its owner, blind to other readers.
        adjudicate: Allows to decide between readers instead, with their answers in view.
        keep: Allows to ask `/v1/grade` to keep an image in the endpoint's store.
    """

    grade: bool = False
    bulk: tuple[str, ...] = ()
    admin: bool = False
    review: bool = False
    adjudicate: bool = False
    keep: bool = False

    @classmethod
    def parse(cls, scopes: Iterable[str]) -> Rights:
        """Parse scopes in the notation of the key file.

        Raises:
            ValueError: A scope is not `grade`, `keep`, `bulk:PREFIX`, `review`, `adjudicate` or `admin`, or
                the key would both read and decide; the message omits the scope.
        """
        plain, bulk = set(), []
        for scope in scopes:
            name, colon, prefix = scope.partition(":")
            if name == BULK and colon:
                try:
                    bulk.append(canonical_uri(unquote(prefix)))
                except ValueError as error:
                    raise ValueError(f"a prefix is invalid: {error}") from None
            elif scope in _PLAIN:
                plain.add(scope)
            else:
                raise ValueError(
                    f"a scope is invalid; use {BULK}:PREFIX, {', '.join(_PLAIN[:-1])} or {ADMIN}"
                )
        if {REVIEW, ADJUDICATE} <= plain:
            raise ValueError(
                f"a key with {ADJUDICATE} sees the answers of readers, so it cannot {REVIEW}; use two keys"
            )
        return cls(
            GRADE in plain,
            tuple(dict.fromkeys(bulk)),
            ADMIN in plain,
            REVIEW in plain,
            ADJUDICATE in plain,
            KEEP in plain,
        )

    @property
    def scopes(self) -> list[str]:
        """Scopes in the notation of the key file; a space in a prefix is %20."""
        named = [*[GRADE] * self.grade, *[KEEP] * self.keep, *(f"{BULK}:{prefix}" for prefix in self.bulk)]
        named += [*[REVIEW] * self.review, *[ADJUDICATE] * self.adjudicate, *[ADMIN] * self.admin]
        return [
            "".join(quote(character) if character.isspace() else character for character in scope)
            for scope in named
        ]

    def allows(self, need: Need) -> bool:
        """Whether requests that need this scope are allowed; for sources see `covers`."""
        held = {
            GRADE: self.grade,
            KEEP: self.keep,
            BULK: bool(self.bulk),
            REVIEW: self.review or self.adjudicate,
        }
        return self.admin or held[need]

    def covers(self, source: str) -> bool:
        """Whether bulk runs on a canonical source are allowed."""
        return self.admin or any(is_below(source, prefix) for prefix in self.bulk)


NO_RIGHTS = Rights()

ALL_RIGHTS = Rights(admin=True)
"""Rights of a request to an endpoint without keys."""


class Caller(NamedTuple):
    """Sender of a request: id of its key, None without keys, and its rights."""

    key: str | None
    rights: Rights
