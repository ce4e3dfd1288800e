"""A circuit breaker: what fails too often is left alone for a while."""

from __future__ import annotations

import time
from collections import deque
from typing import Literal

State = Literal["closed", "open", "half_open"]


class CircuitBreaker:
    """Counts failures among the last calls, and stops allowing calls when there are too many.

    Closed, it allows all calls. After `failures` failed ones of the last `of` it opens and allows none for
    `pause_s` seconds. Half open, it then allows one call at a time: a success closes it, a failure opens it.

    Args:
        failures: that open it.
        of: calls that are remembered.
        pause_s: seconds until the next call after it opened.
    """

    def __init__(self, failures: int = 5, of: int = 20, pause_s: float = 30.0) -> None:
        self._most = failures
        self._pause_s = pause_s
        self._failed: deque[bool] = deque(maxlen=of)
        self._opened_at: float | None = None
        self._is_trying = False

    @property
    def state(self) -> State:
        """Whether calls are allowed."""
        if self._opened_at is None:
            return "closed"
        return "open" if time.monotonic() - self._opened_at < self._pause_s else "half_open"

    @property
    def failures(self) -> int:
        """Failed ones of the last calls."""
        return sum(self._failed)

    def allows(self) -> bool:
        """Whether to make a call now. One of the three methods below says afterwards how it ended."""
        if self.state == "half_open" and not self._is_trying:
            self._is_trying = True
            return True
        return self.state == "closed"

    def record_success(self) -> None:
        """A call succeeded."""
        if self._opened_at is not None:
            self._failed.clear()
        self._opened_at, self._is_trying = None, False
        self._failed.append(False)

    def record_failure(self) -> None:
        """A call failed."""
        self._is_trying = False
        self._failed.append(True)
        if self._opened_at is not None or self.failures >= self._most:
            self._opened_at = time.monotonic()

    def record_cancel(self) -> None:
        """A call was canceled, which says nothing."""
        self._is_trying = False
