"""What a replica takes in for batches: bounds that all of them share, and patience with a busy grader."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor

from pydantic import BaseModel, ConfigDict, Field

from scalp_core.codecs import MAX_BYTES
from serving.problems import Refusal
from serving.schemas import GradeResponse
from serving.unpack import Limits

_RETRY_AFTER_S = 5
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 1.0
_BUSY = (503, 504)


class BatchSettings(BaseModel):
    """Bounds of batches, for each replica."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    photographs: int = Field(1000, ge=1, description="of one request")
    requests: int = Field(8, ge=1, description="at once; one more is refused as overload")
    in_flight: int = Field(
        32, ge=1, description="photographs of all batches that are graded at once: two forward passes' worth"
    )
    in_flight_bytes: int = Field(2**27, ge=MAX_BYTES, description="of these photographs")
    archives: int = Field(2, ge=1, description="zips and tars at once; one more is refused as overload")
    archive_members: int = Field(10_000, ge=1, description="of one archive, photographs or not")
    zip_bytes: int = Field(2**26, ge=1, description="of a zip, which is held in memory")
    patience_s: float = Field(
        60.0, gt=0, description="how long a photograph waits for a full queue before its batch is given up"
    )


class Batches:
    """All batches of a replica.

    Args:
        settings: their bounds.
        grade: grades one photograph; raises `ImageError`, or a `Refusal` of 503 or 504 when it is too busy.
        model_version: what signs the photographs that failed.
    """

    def __init__(
        self,
        settings: BatchSettings,
        grade: Callable[[bytes], Awaitable[GradeResponse]],
        model_version: Callable[[], Awaitable[str]],
    ) -> None:
        self.settings = settings
        self.model_version = model_version
        self.limits = Limits(settings.photographs, settings.archive_members, settings.zip_bytes)
        self.window = Window(settings.in_flight, settings.in_flight_bytes)
        self.requests = Room(settings.requests, "batches")
        self.archives = Room(settings.archives, "archives")
        self.pool = ThreadPoolExecutor(settings.archives, "archive")
        self._grade = grade

    async def grade(self, data: bytes) -> GradeResponse:
        """Grades a photograph, again and again while the grader is too busy: the window bounds who waits.

        Raises:
            ImageError: it cannot be graded.
            Refusal: the grader was too busy for longer than the settings allow.
        """
        clock = asyncio.get_running_loop().time
        until, pause = clock() + self.settings.patience_s, _FIRST_PAUSE_S
        while True:
            try:
                return await self._grade(data)
            except Refusal as refusal:
                if refusal.status_code not in _BUSY or clock() > until:
                    raise
            await asyncio.sleep(pause * random.uniform(0.5, 1.5))  # noqa: S311
            pause = min(2 * pause, _LONGEST_PAUSE_S)


class Window:
    """What is in flight: so many photographs, and so many bytes of them.

    Whoever comes first enters first, so that small ones do not overtake a large one for ever.
    """

    def __init__(self, photographs: int, max_bytes: int) -> None:
        self._most = photographs
        self._max_bytes = max_bytes
        self._photographs = self._bytes = 0
        self._turn = asyncio.Lock()
        self._left = asyncio.Event()

    async def enter(self, size: int) -> None:
        """Waits for room; a photograph alone always has it."""
        async with self._turn:
            while self._photographs and not self._has_room(size):
                self._left.clear()
                await self._left.wait()
            self._photographs += 1
            self._bytes += size

    def leave(self, size: int) -> None:
        """Makes the room again that `enter` took."""
        self._photographs -= 1
        self._bytes -= size
        self._left.set()

    def _has_room(self, size: int) -> bool:
        return self._photographs < self._most and self._bytes + size <= self._max_bytes


class Room:
    """Counts who is in, and refuses whoever is one too many."""

    def __init__(self, places: int, what: str) -> None:
        self._free = places
        self._what = what

    def __enter__(self) -> None:
        if not self._free:
            raise Refusal(
                503,
                "overloaded",
                f"too many {self._what} at once; try again in {_RETRY_AFTER_S} seconds",
                {"Retry-After": str(_RETRY_AFTER_S)},
            )
        self._free -= 1

    def __exit__(self, *_: object) -> None:
        self._free += 1
