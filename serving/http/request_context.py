"""Context of the current request: filled by the middleware, read by refusals, logs and metrics."""

from __future__ import annotations

import re
import time
import uuid
from contextvars import ContextVar
from dataclasses import dataclass, field

from serving.auth.scopes import NO_RIGHTS, Caller, Rights

_GOOD_ID = re.compile(rb"[!-~]{1,128}")


def request_id(given: bytes = b"") -> str:
    """The id that a request was sent with if it is short and printable, otherwise a new id."""
    return given.decode("ascii") if _GOOD_ID.fullmatch(given) else str(uuid.uuid4())


@dataclass(slots=True)
class RequestContext:
    """One request, from its head to the end of its response."""

    request_id: str
    is_open_inference: bool = False  # a path of the Open Inference Protocol, whose errors have another form
    route: str | None = None  # path template, known after routing; None for an unknown path
    key: str | None = None  # id of the key, not the key itself
    owner: str = ""  # for quotas and budgets, see `admission.fairness`
    rights: Rights = NO_RIGHTS  # of the key; none until the authorization
    work: str | None = None  # id of the bulk run in the path
    source: str | None = None  # source of the bulk run that it starts
    image: str | None = None  # id of the image of a review
    status: int = 499  # until the response starts: the client disconnected
    problem: str | None = None  # code of the problem
    owes_audit: bool = False  # it passed the authorization and has no line in the audit log yet
    began: float = field(default_factory=time.perf_counter)

    @property
    def caller(self) -> Caller:
        """Sender of the request."""
        return Caller(self.key, self.rights)

    @property
    def seconds(self) -> float:
        """Seconds since the head arrived."""
        return time.perf_counter() - self.began

    @property
    def ms(self) -> float:
        return round(1000 * self.seconds, 2)


_CURRENT: ContextVar[RequestContext] = ContextVar("request")


def set_current(request: RequestContext) -> None:
    """Set the current request of this task and its children."""
    _CURRENT.set(request)


def current() -> RequestContext:
    """The current request; an empty context outside of requests."""
    return _CURRENT.get(None) or RequestContext("")
