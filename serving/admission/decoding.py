"""Decoding threads: several for small images, one with low priority for large images.

A large image takes up to a second of CPU and 300 MiB. Decoding one at a time bounds the memory. The separate
thread with low priority keeps large images from delaying small ones.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

from serving.admission.fairness import FairQueue

SMALL_COST = 1.0
"""Largest cost of a small image in megapixels (`codecs.Header.cost`): 15 to 75 ms of CPU."""

_SMALL_THREADS = 4
_LARGE_NICENESS = 10  # gets 110/1,024 of a core under contention

T = TypeVar("T")


class Decoders:
    """Decoding threads of one replica."""

    def __init__(self) -> None:
        self._small = _FairThreads(ThreadPoolExecutor(_SMALL_THREADS, "decode"))
        self._large = _FairThreads(ThreadPoolExecutor(1, "decode-large", _lower_priority))

    async def run(self, owner: str, cost: float, work: Callable[..., T], *arguments: Any) -> T:
        """Call `work` in a decoding thread; owners take turns.

        Args:
            cost: Megapixels, see `codecs.Header.cost`.
        """
        threads = self._small if cost <= SMALL_COST else self._large
        return await threads.run(owner, partial(work, *arguments))


class _FairThreads:
    """Threads that run the calls of owners in rotation."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self._pool = pool
        self._lock = threading.Lock()
        self._calls: FairQueue[tuple[Callable[[], Any], Future[Any]]] = FairQueue()

    async def run(self, owner: str, call: Callable[[], T]) -> T:
        result: Future[T] = Future()
        with self._lock:
            self._calls.push(owner, (call, result))
        asyncio.get_running_loop().run_in_executor(self._pool, self._run_next)
        return await asyncio.wrap_future(result)

    def _run_next(self) -> None:
        with self._lock:
            call, result = self._calls.pop()
        if not result.set_running_or_notify_cancel():
            return
        try:
            result.set_result(call())
        except BaseException as error:
            result.set_exception(error)


def _lower_priority() -> None:
    """Lower the priority of this thread; on Linux only."""
    if sys.platform == "linux":
        thread = threading.get_native_id()
        niceness = os.getpriority(os.PRIO_PROCESS, thread) + _LARGE_NICENESS
        os.setpriority(os.PRIO_PROCESS, thread, min(19, niceness))
