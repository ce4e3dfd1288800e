"""Retries of storage requests: their timeout, and what they log."""

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
_LONG_S = 30.0
_LOG_EVERY_S = 30.0

_timeout_of_thread: ContextVar[float | None] = ContextVar("retry_timeout", default=None)
_lock = threading.Lock()
_timeouts_in_process: list[float] = []


@contextmanager
def retry_timeout(seconds: float) -> Iterator[None]:
    """Set the retry timeout, in seconds, of storage requests inside this block and of threads it starts.

    The default is short, for a mistyped address; a job of hours should survive a restart of the server.
    A thread without a retry timeout uses the longest one in force in its process.
    """
    with _lock:
        _timeouts_in_process.append(seconds)
    token = _timeout_of_thread.set(seconds)
    try:
        yield
    finally:
        _timeout_of_thread.reset(token)
        with _lock:
            _timeouts_in_process.remove(seconds)


def current_retry_timeout() -> float:
    """Return the retry timeout in force in this thread, in seconds."""
    timeout = _timeout_of_thread.get()
    with _lock:
        return timeout if timeout is not None else max(_timeouts_in_process, default=_DEFAULT_S)


def call_with_retries(name: str, request: Callable[..., T], *arguments: Any, **keywords: Any) -> T:
    """Call `request` and retry it after transient storage errors, until the retry timeout.

    The timeout counts from the first failure, so that a request that fails after long work is retried too.

    Args:
        name: Uri for the log; a request for a local file is not retried.
        request: Function to call with the arguments.

    Raises:
        OSError: the last error after the retry timeout; a permanent error immediately.
    """
    if not is_s3(name):  # errors of a local disk are permanent
        return request(*arguments, **keywords)
    retrying = tenacity.Retrying(
        stop=_StopAfterOutage(name, current_retry_timeout()),
        wait=tenacity.wait_random_exponential(0.2, max=5),
        retry=tenacity.retry_if_exception(is_transient),
        reraise=True,
    )
    return retrying(request, *arguments, **keywords)


class _StopAfterOutage:
    """End the retries of one request at its timeout; log the first one, then one per half minute."""

    def __init__(self, name: str, seconds: float) -> None:
        self._name = name
        self._seconds = seconds
        self._until: float | None = None
        self._logged = -_LOG_EVERY_S

    def __call__(self, state: tenacity.RetryCallState) -> bool:
        now = time.monotonic()
        if self._until is None:
            self._until = now + self._seconds
        left = self._until - now
        if left > 0 and now - self._logged >= _LOG_EVERY_S:
            self._logged = now
            error = state.outcome.exception() if state.outcome else None
            # With a short timeout the error itself follows within seconds.
            level = logging.WARNING if self._seconds >= _LONG_S else logging.INFO
            logger.log(level, "%s: %s; retrying for %.0f s", self._name, error and label(error), left)
        return left <= 0
