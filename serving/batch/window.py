"""What a replica takes in for batches: bounds that all of them share, and patience with a busy grader."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from weakref import WeakValueDictionary

from pydantic import BaseModel, ConfigDict, Field

from scalp_core.errors import ImageError
from scalp_core.images.codecs import MAX_BYTES
from serving.admission.fairness import OwnerQuota
from serving.admission.pixels import Admission
from serving.batch.unpack import Limits
from serving.http import request_context
from serving.http.problems import Refusal
from serving.schemas.grading import GradeResponse

_RETRY_AFTER_S = 5
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 1.0
_BUSY = (503, 504)


class BatchSettings(BaseModel):
    """Bounds of batches, for each replica."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    photographs: int = Field(1000, ge=1, description="of one request")
    requests: int = Field(8, ge=1, description="at once; one more is refused as overload")
    in_flight: int = Field(
        32, ge=1, description="images of all batches that are graded at once: two forward passes' worth"
    )
    in_flight_bytes: int = Field(2**27, ge=MAX_BYTES, description="of these images")
    megapixels: float = Field(
        1500, gt=0, description="of one request, as limits.max_megapixels counts those of an image"
    )
    archives: int = Field(2, ge=1, description="zips and tars at once; one more is refused as overload")
    archive_members: int = Field(10_000, ge=1, description="of one archive, images or not")
    zip_bytes: int = Field(2**26, ge=1, description="of a zip, which is held in memory")
    patience_s: float = Field(
        60.0, gt=0, description="how long an image waits for a full queue before its batch is given up"
    )


class Batches:
    """All batches of a replica.

    Args:
        settings: their bounds.
        grade: grades one image; raises `ImageError`, or a `Refusal` of 503 or 504 when it is too busy.
        model_version: what signs the images that failed.
        admission: measures images and paces owners; without it, neither.
    """

    def __init__(
        self,
        settings: BatchSettings,
        grade: Callable[[bytes], Awaitable[GradeResponse]],
        model_version: Callable[[], Awaitable[str]],
        admission: Admission | None = None,
    ) -> None:
        self.settings = settings
        self.model_version = model_version
        self.limits = Limits(settings.photographs, settings.archive_members, settings.zip_bytes)
        self.window = Window(settings.in_flight, settings.in_flight_bytes)
        self.requests = RequestLimit(settings.requests, "batches")
        self.archives = RequestLimit(settings.archives, "archives")
        self.pool = ThreadPoolExecutor(settings.archives, "archive")
        self._grade = grade
        self._admission = admission

    async def admit(self, data: bytes) -> float:
        """Waits until the owner's budget allows to decode an image; its megapixels.

        One that will be refused costs nothing: `grade` says why.
        """
        if self._admission is None:
            return 0.0
        owner = request_context.current().owner
        try:
            megapixels = await self._admission.measure(owner, data)
        except ImageError:
            return 0.0
        await self._admission.wait(owner, megapixels)
        return megapixels

    def check_megapixels(self, megapixels: float) -> None:
        """Refuses a request whose images so far are too many pixels.

        Raises:
            Refusal: with the limit.
        """
        limit = self.settings.megapixels
        if megapixels > limit:
            raise Refusal(
                413,
                "too_many_pixels",
                f"{megapixels:,.0f} megapixels (those of a JPEG count an eighth); the limit of a request is "
                f"{limit:,g}; divide the batch",
            )

    async def grade(self, data: bytes) -> GradeResponse:
        """Grades an image, again and again while the grader is too busy: the window bounds who waits.

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
    """What is in flight: so many images, and so many bytes of them; of one owner, its share of both.

    Of an owner, whoever comes first enters first, so that small ones do not overtake a large one for ever.
    """

    def __init__(self, images: int, max_bytes: int) -> None:
        self._images = OwnerQuota(images)
        self._bytes = OwnerQuota(max_bytes)
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._left = asyncio.Event()

    async def enter(self, owner: str, size: int) -> None:
        """Waits for room; an image alone always has it."""
        async with self._turns.setdefault(owner, asyncio.Lock()):
            while self._images.held(owner) and not self._has_room(owner, size):
                self._left.clear()
                await self._left.wait()
            self._images.take(owner)
            self._bytes.take(owner, size)

    def leave(self, owner: str, size: int) -> None:
        """Makes the room again that `enter` took."""
        self._images.release(owner)
        self._bytes.release(owner, size)
        self._left.set()

    def _has_room(self, owner: str, size: int) -> bool:
        return self._images.can_take(owner) and self._bytes.can_take(owner, size)


class RequestLimit:
    """Limit of concurrent requests, of all owners together and of one owner."""

    def __init__(self, places: int, what: str) -> None:
        self._places = OwnerQuota(places)
        self._what = what

    @contextmanager
    def reserve(self, owner: str) -> Iterator[None]:
        """Holds a place inside the block.

        Raises:
            Refusal: there is none.
        """
        if not self._places.can_take(owner):
            raise Refusal(
                503,
                "overloaded",
                f"too many {self._what} at once; try again in {_RETRY_AFTER_S} seconds",
                {"Retry-After": str(_RETRY_AFTER_S)},
            )
        self._places.take(owner)
        try:
            yield
        finally:
            self._places.release(owner)
