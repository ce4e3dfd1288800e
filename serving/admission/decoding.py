"""Where images are decoded: small ones in several threads, large ones one after the other in another.

A large image takes up to a second of CPU and 300 MiB. One at a time bounds the memory; a thread of its own,
with less of the CPU than everything else, keeps large images from delaying small ones.
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
"""Megapixels, as `codecs.Header.cost` counts them, up to which an image is small: 15 to 75 ms of CPU."""

_SMALL_THREADS = 4
_LARGE_NICENESS = 10  # 110 of 1,024 parts of a core that others want

T = TypeVar("T")


class Decoders:
    """The threads of one replica that decode."""

    def __init__(self) -> None:
        self._small = ThreadPoolExecutor(_SMALL_THREADS, "decode")
        self._large = ThreadPoolExecutor(1, "decode-large", _give_way)
        # What waits, waits here and not in the executors: in rotation by owner.
        self._small_slots = FairSemaphore(_SMALL_THREADS)
        self._large_slots = FairSemaphore(1)

    async def run(self, owner: str, cost: float, work: Callable[..., T], *arguments: Any) -> T:
        """Calls `work` in a thread, when it is the owner's turn.

        Args:
            owner: of the image.
            cost: megapixels, see `codecs.Header.cost`.
            work: to do.
            arguments: of it.
        """
        is_small = cost <= SMALL_COST
        slots, pool = (self._small_slots, self._small) if is_small else (self._large_slots, self._large)
        await slots.acquire(owner)
        call = asyncio.get_running_loop().run_in_executor(pool, work, *arguments)
        call.add_done_callback(lambda _: slots.release(owner))
        return await asyncio.shield(call)  # a thread cannot be stopped: until it ends, its slot is taken


def _give_way() -> None:
    """Lowers the priority of this thread alone, which Linux can."""
    if sys.platform == "linux":
        thread = threading.get_native_id()
        niceness = os.getpriority(os.PRIO_PROCESS, thread) + _LARGE_NICENESS
        os.setpriority(os.PRIO_PROCESS, thread, min(19, niceness))
