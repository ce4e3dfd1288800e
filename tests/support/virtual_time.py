"""Asyncio loops with clocks of their own: results do not depend on the machine's speed."""

from __future__ import annotations

import asyncio
import selectors
import time
from collections.abc import Callable, Coroutine
from typing import Any
from unittest import mock


class _Selector(selectors.DefaultSelector):
    """Move the clock of the loop instead of blocking, unless a thread works for the loop."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        self.working_threads = 0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if self.working_threads:  # their work takes no time of this clock
            return super().select(None if timeout is None or timeout > 0 else 0)
        events = super().select(0 if timeout is not None else None)
        if not events and timeout:
            self.now += timeout
        return events


class _Loop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._clock = _Selector()
        super().__init__(self._clock)

    def time(self) -> float:
        return self._clock.now

    def advance(self, seconds: float) -> None:
        self._clock.now += seconds

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:
        future = super().run_in_executor(executor, func, *args)
        self._clock.working_threads += 1
        future.add_done_callback(self._thread_ended)
        return future

    def _thread_ended(self, _: asyncio.Future[Any]) -> None:
        self._clock.working_threads -= 1


def run(scenario: Coroutine[Any, Any, Any], give_up_s: float = 1e6) -> Any:
    """Run `scenario` with a virtual clock, which `time.monotonic` shows too.

    The clock stands still while executors of the loop work; other threads do not stop it.

    Raises:
        TimeoutError: Immediately, if the scenario waits and nothing can wake it.
    """

    async def guarded() -> Any:
        return await asyncio.wait_for(scenario, give_up_s)

    with asyncio.Runner(loop_factory=_Loop) as runner:
        loop = runner.get_loop()
        with mock.patch.object(time, "monotonic", loop.time):
            return runner.run(guarded())


async def advance(seconds: float) -> None:
    """Advance the clock while a thread is at work, and run what is due."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, _Loop)
    loop.advance(seconds)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
