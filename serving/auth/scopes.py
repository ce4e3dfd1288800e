"""Scopes of a key: what its holder may do."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple
from urllib.parse import quote, unquote

from serving.auth.prefixes import is_below, plain_uri

Need = Literal["grade", "bulk"]

GRADE: Literal["grade"] = "grade"
BULK: Literal["bulk"] = "bulk"
ADMIN = "admin"


class Rights(NamedTuple):
    """Parsed scopes.

    Args:
        grade: `/v1/grade`, `/v1/grade/batch` and `/v1/model`.
        bulk: plain prefixes; bulk runs on sources below them may be started, and the own ones read.
        admin: everything, and the bulk runs of all owners.
    """

    grade: bool = False
    bulk: tuple[str, ...] = ()
    admin: bool = False

    @classmethod
    def parse(cls, scopes: Iterable[str]) -> Rights:
        """The rights of scopes as the key file writes them.

        Raises:
            ValueError: one is not `grade`, `bulk:PREFIX` or `admin`; the text is not repeated.
        """
        grade, admin, bulk = False, False, []
        for scope in scopes:
            name, colon, prefix = scope.partition(":")
            if name == BULK and colon:
                try:
                    bulk.append(plain_uri(unquote(prefix)))
                except ValueError as error:
                    raise ValueError(f"a prefix is invalid: {error}") from None
            elif scope in (GRADE, ADMIN):
                grade, admin = grade or scope == GRADE, admin or scope == ADMIN
            else:
                raise ValueError(f"a scope is {GRADE}, {BULK}:PREFIX or {ADMIN}")
        return cls(grade, tuple(dict.fromkeys(bulk)), admin)

    @property
    def scopes(self) -> list[str]:
        """The scopes as the key file writes them; a space of a prefix is %20."""
        named = [*[GRADE] * self.grade, *(f"{BULK}:{prefix}" for prefix in self.bulk), *[ADMIN] * self.admin]
        return ["".join(quote(sign) if sign.isspace() else sign for sign in scope) for scope in named]

    def allow(self, need: Need) -> bool:
        """Whether requests that need this scope are let in; which sources, `cover` says."""
        return self.admin or (self.grade if need == GRADE else bool(self.bulk))

    def cover(self, source: str) -> bool:
        """Whether bulk runs on a plain source are allowed."""
        return self.admin or any(is_below(source, prefix) for prefix in self.bulk)


NO_RIGHTS = Rights()

ALL_RIGHTS = Rights(admin=True)
"""Of a request that was let in though the endpoint has no keys."""


class Caller(NamedTuple):
    """Who sent a request: the id of its key, None without keys, and what the key allows."""

    key: str | None
    rights: Rights
