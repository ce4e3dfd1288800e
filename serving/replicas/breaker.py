"""Circuit breaker: stop calling a service that fails too often, for a while."""

from __future__ import annotations

import time
from collections import deque
from typing import Literal

State = Literal["closed", "open", "half_open"]


class CircuitBreaker:
    """Count failures among the last calls, and refuse calls when there are too many.

    Closed, it allows all calls. After `failures` failures among the last `of` calls it opens, and refuses
    calls for `pause_s` seconds. Then it is half open and allows one call at a time: a success closes it, a
    failure opens it again.
    """

    def __init__(self, failures: int = 5, of: int = 20, pause_s: float = 30.0) -> None:
        self._most = failures
        self._pause_s = pause_s
        self._failed: deque[bool] = deque(maxlen=of)
        self._opened_at: float | None = None
        self._is_trying = False

    @property
    def state(self) -> State:
        """State of the breaker at this moment."""
        if self._opened_at is None:
            return "closed"
        return "open" if time.monotonic() - self._opened_at < self._pause_s else "half_open"

    @property
    def failures(self) -> int:
        """Number of failures among the last calls."""
        return sum(self._failed)

    def allows(self) -> bool:
        """Whether to make a call now. Report its outcome by one of the three methods below."""
        if self.state == "half_open" and not self._is_trying:
            self._is_trying = True
            return True
        return self.state == "closed"

    def record_success(self) -> None:
        """Record that a call succeeded."""
        if self._opened_at is not None:
            self._failed.clear()
        self._opened_at, self._is_trying = None, False
        self._failed.append(False)

    def record_failure(self) -> None:
        """Record that a call failed."""
        self._is_trying = False
        self._failed.append(True)
        if self._opened_at is not None or self.failures >= self._most:
            self._opened_at = time.monotonic()

    def record_cancel(self) -> None:
        """Record that a call was canceled, which counts neither as success nor as failure."""
        self._is_trying = False
