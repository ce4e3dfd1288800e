"""How the client tries a call: what is asked again, for how long, and what failed at last."""

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

_BUSY = (429, 503)  # refused before anything was done
_BROKEN = (500, 502, 504)  # who knows what was done


class Retries(BaseModel):
    """For how long a call is tried."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    attempts: int = Field(8, ge=1, description="tries of a call in all; 1 for no retries")
    seconds: float = Field(60, gt=0, description="from the first try to the start of the last one")
    first_wait: float = Field(
        0.1, ge=0, description="seconds between tries: drawn below this, doubled each time"
    )
    longest_wait: float = Field(5, ge=0, description="bound on them; `Retry-After` of the server adds to it")


class GradeError(Exception):
    """The endpoint refused a call, failed, or could not be reached.

    Args:
        code: of the problem; `unreachable`, `timed_out`, `bad_answer` or `http_STATUS` where there was none.
        detail: one line for a person.
        request_id: names the call in the server's log.
        status: of HTTP; None without an answer.
        retry_after: seconds that the server asked to wait.
        again: whether another try may do better.
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
    """What a client's calls took so far.

    Args:
        calls: that ended, well or not; of `grade_batch` one for each request.
        attempts: requests that these and the running ones sent.
        failed_at_first: calls whose first try failed with what is tried again: lost without retries.
        failed: calls that raised.
    """

    calls: int = 0
    attempts: int = 0
    failed_at_first: int = 0
    failed: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def add(self, **more: int) -> None:
        """Adds to the counts; threads may share a client."""
        with self._lock:
            for name, value in more.items():
                setattr(self, name, getattr(self, name) + value)


@dataclass(frozen=True)
class Call(Generic[T]):
    """One call: what is sent, how the answer is read, and whether sending it twice does no harm."""

    method: str
    path: str
    read: Callable[[httpx.Response], T]
    idempotent: bool = True
    body: dict[str, Any] = field(default_factory=dict)


class Tries(Generic[T]):
    """The tries of one call, whoever sends them: when there is another one, and what comes of them."""

    def __init__(self, call: Call[T], retries: Retries, timeout: float, counts: Counts) -> None:
        self._call, self._timeout, self._counts = call, timeout, counts
        self._id, self._tries = uuid.uuid4().hex, 0
        self._until = time.monotonic() + retries.seconds
        self._backoff = tenacity.wait_random_exponential(retries.first_wait, retries.longest_wait)
        self.plan: dict[str, Any] = {
            "retry": tenacity.retry_if_exception(lambda error: isinstance(error, GradeError) and error.again),
            "stop": tenacity.stop_after_attempt(retries.attempts)
            | tenacity.stop_before_delay(retries.seconds),
            "wait": self._wait,
            "reraise": True,
        }

    @property
    def request(self) -> dict[str, Any]:
        """Arguments of httpx's `request`; no try waits for a byte beyond the bound on the call."""
        left = max(1.0, self._until - time.monotonic())
        headers = {"X-Request-ID": self._id}
        timeout = min(self._timeout, left)
        fixed = {"method": self._call.method, "url": self._call.path, "headers": headers, "timeout": timeout}
        return fixed | self._call.body

    @contextmanager
    def call(self) -> Iterator[None]:
        """Counts the call that is made inside."""
        try:
            yield
        except BaseException:
            self._counts.add(failed=1)
            raise
        finally:
            self._counts.add(calls=1)

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """Counts one try, and words its failure."""
        self._tries += 1
        self._counts.add(attempts=1)
        try:
            yield
        except httpx.TransportError as error:
            self._fail(self._transport(error), error)
        except GradeError as error:
            self._fail(error, None)

    def answer(self, response: httpx.Response) -> T:
        """What the call returns.

        Raises:
            GradeError: it is a problem, or no answer of this endpoint.
        """
        if not response.is_success:
            raise self._problem(response)
        try:
            return self._call.read(response)
        except ValueError as error:  # pydantic's and json's are ValueErrors
            said = f"this is no answer of a scalp endpoint ({type(error).__name__})"
            raise self._error("bad_answer", said, response, again=self._call.idempotent) from error

    def _fail(self, error: GradeError, cause: Exception | None) -> None:
        self._counts.add(failed_at_first=int(self._tries == 1 and error.again))
        raise error from cause

    def _wait(self, state: tenacity.RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome else None
        # Added, not the larger of both: clients told to wait a second must not come back together.
        return self._backoff(state) + (error.retry_after if isinstance(error, GradeError) else 0)

    def _transport(self, error: httpx.TransportError) -> GradeError:
        never_sent = isinstance(error, httpx.ConnectError | httpx.ConnectTimeout | httpx.PoolTimeout)
        code = "timed_out" if isinstance(error, httpx.TimeoutException) else "unreachable"
        detail = str(error) or type(error).__name__
        return GradeError(code, detail, self._id, again=never_sent or self._call.idempotent)

    def _problem(self, response: httpx.Response) -> GradeError:
        status = response.status_code
        again = status in _BUSY or (status in _BROKEN and self._call.idempotent)
        try:
            said = Problem.model_validate_json(response.content)
        except ValidationError:  # of a proxy
            return self._error(f"http_{status}", response.reason_phrase or "no reason", response, again)
        return self._error(said.code, said.detail, response, again)

    def _error(self, code: str, detail: str, response: httpx.Response, again: bool) -> GradeError:
        after = response.headers.get("Retry-After", "")
        request_id = response.headers.get("X-Request-ID", self._id)
        wait = float(after) if after.isdigit() else 0.0
        return GradeError(code, detail, request_id, response.status_code, wait, again)
