"""Retries of the client: which errors are retried, for how long, and the error that is raised at last."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import httpx
import tenacity
from pydantic import BaseModel, Field, ValidationError

from serving.schemas.grading import Problem

T = TypeVar("T")

_BUSY = (429, 503)  # refused before any work
_BROKEN = (500, 502, 504)  # the work may have been done
# The wait before a retry is random below a bound, which doubles each time; `Retry-After` is added.
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.1, 5.0


class Retries(BaseModel, extra="forbid", frozen=True):
    """Bounds of the retries of a call."""

    attempts: int = Field(8, ge=1, description="maximum number of attempts; 1 turns retries off")
    seconds: float = Field(60, gt=0, description="seconds from the first to the start of the last attempt")


class GradeError(Exception):
    """The endpoint refused a call, failed, or could not be reached.

    Args:
        code: Code of the problem; otherwise `unreachable`, `timed_out`, `bad_answer` or `http_STATUS`.
        detail: One line for a person.
        request_id: Id of the call in the server's log.
        status: HTTP status; None without a response.
        retry_after: Seconds of the Retry-After header.
        again: Whether a retry may succeed.
    """

    def __init__(
        self,
        code: str,
        detail: str,
        request_id: str,
        status: int | None = None,
        retry_after: float = 0.0,
        again: bool = False,
    ) -> None:
        super().__init__(f"{code}: {detail} (request {request_id})")
        self.code, self.detail, self.request_id = code, detail, request_id
        self.status, self.retry_after, self.again = status, retry_after, again


@dataclass(frozen=True)
class Call(Generic[T]):
    """One call: its request, the function that reads the response, and whether it is idempotent."""

    method: str
    path: str
    read: Callable[[httpx.Response], T]
    idempotent: bool = True
    body: dict[str, Any] = field(default_factory=dict)


class Attempts(Generic[T]):
    """Attempts of one call, for both the sync and the async client."""

    def __init__(self, call: Call[T], retries: Retries, timeout: float) -> None:
        self._call, self._timeout, self._id = call, timeout, uuid.uuid4().hex
        self._until = time.monotonic() + retries.seconds
        self._backoff = tenacity.wait_random_exponential(_FIRST_WAIT_S, _LONGEST_WAIT_S)
        self.plan: dict[str, Any] = {
            "retry": tenacity.retry_if_exception(lambda error: isinstance(error, GradeError) and error.again),
            "stop": tenacity.stop_after_attempt(retries.attempts)
            | tenacity.stop_before_delay(retries.seconds),
            "wait": self._wait,
            "reraise": True,
        }

    def request(self) -> dict[str, Any]:
        """Arguments of httpx's `request` for an attempt, which ends with the call's timeout."""
        timeout = min(self._timeout, max(1.0, self._until - time.monotonic()))
        headers = {"X-Request-ID": self._id}
        fixed = {"method": self._call.method, "url": self._call.path, "headers": headers, "timeout": timeout}
        return fixed | self._call.body

    def read(self, response: httpx.Response) -> T:
        """Read the response of the call.

        Raises:
            GradeError: It is a problem, or not a response of this endpoint.
        """
        if not response.is_success:
            raise self._problem(response)
        try:
            return self._call.read(response)
        except ValueError as error:  # pydantic's and json's are ValueErrors
            detail = f"this is not a response of a scalp endpoint ({type(error).__name__})"
            raise self._error("bad_answer", detail, self._call.idempotent, response) from error

    def transport_error(self, error: httpx.TransportError) -> GradeError:
        """The error of an attempt without a response."""
        never_sent = isinstance(error, httpx.ConnectError | httpx.ConnectTimeout | httpx.PoolTimeout)
        code = "timed_out" if isinstance(error, httpx.TimeoutException) else "unreachable"
        detail, again = str(error) or type(error).__name__, never_sent or self._call.idempotent
        return GradeError(code, detail, self._id, again=again)

    def _wait(self, state: tenacity.RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome else None
        # Added, so that clients with the same Retry-After do not retry together.
        return self._backoff(state) + (error.retry_after if isinstance(error, GradeError) else 0)

    def _problem(self, response: httpx.Response) -> GradeError:
        status = response.status_code
        again = status in _BUSY or (status in _BROKEN and self._call.idempotent)
        try:
            problem = Problem.model_validate_json(response.content)
        except ValidationError:  # from a proxy
            return self._error(f"http_{status}", response.reason_phrase or "no reason", again, response)
        return self._error(problem.code, problem.detail, again, response)

    def _error(self, code: str, detail: str, again: bool, response: httpx.Response) -> GradeError:
        after = response.headers.get("Retry-After", "")
        request_id = response.headers.get("X-Request-ID", self._id)
        wait = float(after) if after.isdigit() else 0.0
        return GradeError(code, detail, request_id, response.status_code, wait, again)
