"""Retries of requests to storage: for how long, and what is logged meanwhile."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import tenacity

from scalp_core.storage.errors import is_transient, label
from scalp_core.storage.uris import is_s3

T = TypeVar("T")

logger = logging.getLogger(__name__)

_DEFAULT_S = 3.0
# Clients give up an unavailable server sooner (3 attempts of 30 s): a later failure means it answered.
_WORKED_S = 120.0
_MAX_STREAKS = 5
_LONG_S = 30.0
_LOG_EVERY_S = 30.0

_own: ContextVar[float | None] = ContextVar("retry_timeout", default=None)
_lock = threading.Lock()
_of_process: list[float] = []


@contextmanager
def patience(seconds: float) -> Iterator[None]:
    """Set the retry timeout for requests inside this block, in seconds, and for threads it starts.

    A person who mistyped an address waits seconds; a job of hours outlives a server's restart. Threads that
    set none of their own take the longest of those in force in this process.
    """
    with _lock:
        _of_process.append(seconds)
    token = _own.set(seconds)
    try:
        yield
    finally:
        _own.reset(token)
        with _lock:
            _of_process.remove(seconds)


def timeout() -> float:
    """The retry timeout in force in this thread, in seconds."""
    own = _own.get()
    with _lock:
        return own if own is not None else max(_of_process, default=_DEFAULT_S)


def retried(name: str, request: Callable[..., T], *arguments: Any, **keywords: Any) -> T:
    """Call `request`, again while it fails with a transient storage error.

    The clock starts at the first failure of a streak, so that a request that worked for long and then met an
    outage is retried as long as one that met it at once.

    Args:
        name: the uri, for the log; one of a local file is requested once.
        request: what to call with the arguments.

    Raises:
        OSError: the last one, after the retry timeout; permanent errors immediately.
    """
    if not is_s3(name):  # errors of a local disk are permanent
        return request(*arguments, **keywords)
    retrying = tenacity.Retrying(
        stop=_StopAfterOutage(name, timeout()),
        wait=tenacity.wait_random_exponential(0.2, max=5),
        retry=tenacity.retry_if_exception(is_transient),
        reraise=True,
    )
    return retrying(request, *arguments, **keywords)


class _StopAfterOutage:
    """Ends the retries of one request, and logs that it waits: once a streak, then every half minute."""

    def __init__(self, name: str, seconds: float) -> None:
        self._name = name
        self._seconds = seconds
        self._since: float | None = None
        self._began = time.monotonic()
        self._streaks = 0
        self._logged = 0.0

    def __call__(self, state: tenacity.RetryCallState) -> bool:
        now = time.monotonic()
        worked = now - self._began > _WORKED_S and self._streaks < _MAX_STREAKS
        if self._since is None or worked:
            self._since = now
            self._streaks += 1
            self._logged = 0.0
        self._began = now + (state.upcoming_sleep or 0)
        left = self._since + self._seconds - now
        if left > 0 and now - self._logged >= _LOG_EVERY_S:
            self._logged = now
            error = state.outcome.exception() if state.outcome else None
            # A person who mistyped an address gets the error seconds later: one line is enough.
            level = logging.WARNING if self._seconds >= _LONG_S else logging.INFO
            logger.log(level, "%s: %s; retrying for %.0f s", self._name, error and label(error), left)
        return left <= 0
