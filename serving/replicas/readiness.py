"""Whether the model answers, as probes ask it: known beforehand, so that a probe costs nothing."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

_CHECK_EVERY_S = 1.0
_ANSWER_WITHIN_S = 5.0
_VALID_S = 10.0

_log = logging.getLogger("ray.serve")


class Readiness:
    """The last result of a check that one task repeats, however many ask for it.

    Args:
        check: raises what is wrong.
    """

    def __init__(self, check: Callable[[], Awaitable[object]]) -> None:
        self._check = check
        self._watching: asyncio.Task[None] | None = None
        self._is_ready = False
        self._checked_at: float | None = None

    async def is_ready(self) -> bool:
        """Whether the last check passed, and not long ago. Only those who ask first wait for its result."""
        if self._watching is None or self._watching.done():
            self._watching = asyncio.create_task(self._watch())
        until = time.monotonic() + _ANSWER_WITHIN_S
        while self._checked_at is None and time.monotonic() < until:
            await asyncio.sleep(0.01)
        is_recent = self._checked_at is not None and time.monotonic() - self._checked_at < _VALID_S
        return self._is_ready and is_recent

    async def _watch(self) -> None:
        while True:
            was_ready = self._is_ready
            try:
                await asyncio.wait_for(self._check(), _ANSWER_WITHIN_S)
                self._is_ready = True
            except Exception as error:
                self._is_ready = False
                if was_ready or self._checked_at is None:
                    _log.warning("the model does not answer: %s", error or type(error).__name__)
            self._checked_at = time.monotonic()
            await asyncio.sleep(_CHECK_EVERY_S)
