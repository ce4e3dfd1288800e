"""What is known of the request that is being answered; the middleware fills it, refusals and logs read it."""

from __future__ import annotations

import re
import time
import uuid
from contextvars import ContextVar
from dataclasses import dataclass, field

from serving.auth.scopes import NO_RIGHTS, Caller, Rights

_GOOD_ID = re.compile(rb"[!-~]{1,128}")


def request_id(given: bytes = b"") -> str:
    """The id that a request came with when it is short and printable, else a new one."""
    return given.decode("ascii") if _GOOD_ID.fullmatch(given) else str(uuid.uuid4())


@dataclass(slots=True)
class RequestContext:
    """One request, from its head to the end of its answer."""

    request_id: str
    method: str = ""
    route: str | None = None  # the template, known when the answer is; None where nothing is
    key: str | None = None  # id of the key, never the key
    owner: str = ""  # that shares and budgets are counted for, see `fairness`
    rights: Rights = NO_RIGHTS  # what the key allows: nothing until it is known
    work: str | None = None  # id of the bulk run that it is about
    source: str | None = None  # of a bulk run that it starts
    status: int = 499  # until it is answered: the client went away
    problem: str | None = None  # code of the refusal
    sent: int = 0  # bytes of the answer's body
    owes_audit: bool = False  # it was let in, and no line of the audit log tells of it yet
    began: float = field(default_factory=time.perf_counter)

    @property
    def caller(self) -> Caller:
        """Who sent it."""
        return Caller(self.key, self.rights)

    @property
    def ms(self) -> float:
        """Milliseconds since its head came in."""
        return round(1000 * (time.perf_counter() - self.began), 2)


_CURRENT: ContextVar[RequestContext] = ContextVar("request")


def set_current(request: RequestContext) -> None:
    """Makes it the request of everything that is awaited from here."""
    _CURRENT.set(request)


def current() -> RequestContext:
    """The request that is being answered; outside of one, an empty one."""
    return _CURRENT.get(None) or RequestContext("")
