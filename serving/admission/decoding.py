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
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from serving.admission.fairness import FairSemaphore

SMALL_COST = 1.0
"""Largest cost of a small image in megapixels (`codecs.Header.cost`): 15 to 75 ms of CPU."""

_SMALL_THREADS = 4
_LARGE_NICENESS = 10  # gets 110/1,024 of a core under contention

T = TypeVar("T")


class Decoders:
    """Decoding threads of one replica."""

    def __init__(self) -> None:
        self._small = ThreadPoolExecutor(_SMALL_THREADS, "decode")
        self._large = ThreadPoolExecutor(1, "decode-large", _lower_priority)
        # Images wait here and not in the executors, so that owners take turns.
        self._small_slots = FairSemaphore(_SMALL_THREADS)
        self._large_slots = FairSemaphore(1)

    async def run(self, owner: str, cost: float, work: Callable[..., T], *arguments: Any) -> T:
        """Call `work` in a decoding thread; owners take turns.

        Args:
            cost: Megapixels, see `codecs.Header.cost`.
        """
        is_small = cost <= SMALL_COST
        slots, pool = (self._small_slots, self._small) if is_small else (self._large_slots, self._large)
        await slots.acquire(owner)
        call = asyncio.get_running_loop().run_in_executor(pool, work, *arguments)
        call.add_done_callback(lambda _: slots.release(owner))
        return await asyncio.shield(call)  # the thread keeps its slot after a cancel


def _lower_priority() -> None:
    """Lower the priority of this thread; on Linux only."""
    if sys.platform == "linux":
        thread = threading.get_native_id()
        niceness = os.getpriority(os.PRIO_PROCESS, thread) + _LARGE_NICENESS
        os.setpriority(os.PRIO_PROCESS, thread, min(19, niceness))
