"""Readiness of the model, checked in the background so that probes are cheap."""

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
    """Last result of a check that one background task repeats."""

    def __init__(self, check: Callable[[], Awaitable[object]]) -> None:
        self._check = check
        self._task: asyncio.Task[None] | None = None
        self._is_ready = False
        self._checked_at: float | None = None

    async def is_ready(self) -> bool:
        """Whether the last check passed and is recent. Only the first calls wait for a result."""
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._watch())
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
