"""Retries of the client: which errors are retried, for how long, and the error that is raised at last."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import httpx
import tenacity
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from serving.schemas.grading import Problem

T = TypeVar("T")

_BUSY = (429, 503)  # refused before any work
_BROKEN = (500, 502, 504)  # the work may have been done


class Retries(BaseModel):
    """Bounds of the retries of a call."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    attempts: int = Field(8, ge=1, description="maximum number of attempts; 1 turns retries off")
    seconds: float = Field(60, gt=0, description="seconds from the first to the start of the last attempt")
    first_wait: float = Field(
        0.1,
        ge=0,
        description="seconds before the first retry, random below this bound, which doubles each time",
    )
    longest_wait: float = Field(
        5, ge=0, description="maximum of this bound; `Retry-After` of the server is added"
    )


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


@dataclass
class Counts:
    """Number of calls, attempts and failures of a client.

    Args:
        calls: Calls that ended; of `grade_batch` one per request.
        attempts: Requests that were sent.
        failed_at_first: Calls whose first attempt failed with a retryable error.
        failed: Calls that raised.
    """

    calls: int = 0
    attempts: int = 0
    failed_at_first: int = 0
    failed: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def add(self, **more: int) -> None:
        """Add to the counts; thread-safe."""
        with self._lock:
            for name, value in more.items():
                setattr(self, name, getattr(self, name) + value)


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

    def __init__(self, call: Call[T], retries: Retries, timeout: float, counts: Counts) -> None:
        self._call, self._timeout, self._counts = call, timeout, counts
        self._id, self._attempts = uuid.uuid4().hex, 0
        self._until = time.monotonic() + retries.seconds
        self._backoff = tenacity.wait_random_exponential(retries.first_wait, retries.longest_wait)
        self.plan: dict[str, Any] = {
            "retry": tenacity.retry_if_exception(lambda error: isinstance(error, GradeError) and error.again),
            "stop": tenacity.stop_after_attempt(retries.attempts)
            | tenacity.stop_before_delay(retries.seconds),
            "wait": self._wait,
            "reraise": True,
        }

    def next_request(self) -> dict[str, Any]:
        """Count an attempt and return its arguments of httpx's `request`; it ends with the call's timeout."""
        self._attempts += 1
        self._counts.add(attempts=1)
        timeout = min(self._timeout, max(1.0, self._until - time.monotonic()))
        headers = {"X-Request-ID": self._id}
        fixed = {"method": self._call.method, "url": self._call.path, "headers": headers, "timeout": timeout}
        return fixed | self._call.body

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Count the call of the block."""
        try:
            yield
        except BaseException:
            self._counts.add(failed=1)
            raise
        finally:
            self._counts.add(calls=1)

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
        return self._error(code, str(error) or type(error).__name__, never_sent or self._call.idempotent)

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

    def _error(
        self, code: str, detail: str, again: bool, response: httpx.Response | None = None
    ) -> GradeError:
        if self._attempts == 1 and again:
            self._counts.add(failed_at_first=1)
        if response is None:
            return GradeError(code, detail, self._id, again=again)
        after = response.headers.get("Retry-After", "")
        request_id = response.headers.get("X-Request-ID", self._id)
        wait = float(after) if after.isdigit() else 0.0
        return GradeError(code, detail, request_id, response.status_code, wait, again)
