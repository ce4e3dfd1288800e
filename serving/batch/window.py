"""Batches of a replica: shared limits of the images in flight, and retries while the grader is busy."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from weakref import WeakValueDictionary

import tenacity
from pydantic import BaseModel, ConfigDict, Field

from scalp_core.errors import ImageError
from scalp_core.images.codecs import MAX_BYTES
from serving.admission.fairness import OwnerQuota
from serving.admission.rate_limit import Admission
from serving.http import request_context
from serving.http.problems import Refusal
from serving.schemas.grading import GradeResponse

_RETRY_AFTER_S = 5
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 1.0


class BatchSettings(BaseModel):
    """Limits of batch requests, per replica."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    photographs: int = Field(1000, ge=1, description="images of one request")
    requests: int = Field(8, ge=1, description="concurrent requests; more are refused as overload")
    in_flight: int = Field(
        32, ge=1, description="images in flight of all batches: enough for two forward passes"
    )
    in_flight_bytes: int = Field(2**27, ge=MAX_BYTES, description="bytes of the images in flight")
    megapixels: float = Field(
        1500, gt=0, description="decoding cost of one request, counted as for limits.max_megapixels"
    )
    archives: int = Field(2, ge=1, description="concurrent zips and tars; more are refused as overload")
    archive_members: int = Field(10_000, ge=1, description="members of one archive, images or not")
    zip_bytes: int = Field(2**26, ge=1, description="bytes of a zip, which is held in memory")
    patience_s: float = Field(
        60.0, gt=0, description="seconds that an image retries a full queue before its batch is aborted"
    )


class Batches:
    """All batch requests of a replica.

    Args:
        grade: Function that grades one image; raises `ImageError`, or a `Refusal` of 503 or 504 when busy.
    """

    def __init__(
        self,
        settings: BatchSettings,
        grade: Callable[[bytes], Awaitable[tuple[GradeResponse, int]]],
        model_version: Callable[[], Awaitable[str]],
        admission: Admission,
    ) -> None:
        self.settings = settings
        self.model_version = model_version
        self.window = Window(settings.in_flight, settings.in_flight_bytes)
        self.requests = RequestLimit(settings.requests, "batches")
        self.archives = RequestLimit(settings.archives, "archives")
        self.pool = ThreadPoolExecutor(settings.archives, "archive")
        self._grade = grade
        self._admission = admission

    async def admit(self, data: bytes, megapixels: float) -> float:
        """Wait until the owner's budget allows to decode an image.

        Args:
            data: Bytes of the file; an image that `grade` will refuse costs nothing.
            megapixels: Decoding cost of the request before this image.

        Returns:
            The decoding cost with this image.

        Raises:
            Refusal: The cost exceeds the limit of a request.
        """
        owner = request_context.current().owner
        try:
            cost = await self._admission.measure(owner, data)
        except ImageError:
            return megapixels
        await self._admission.wait(owner, cost)
        megapixels, limit = megapixels + cost, self.settings.megapixels
        if megapixels > limit:
            raise Refusal(
                413,
                "too_many_pixels",
                f"{megapixels:,.0f} megapixels (those of a JPEG count an eighth); the limit of a request is "
                f"{limit:,g}; divide the batch",
            )
        return megapixels

    async def grade(self, data: bytes) -> GradeResponse:
        """Grade an image, with retries while the grader is busy; the window bounds the number that waits.

        Raises:
            ImageError: The image cannot be graded.
            Refusal: The grader was busy for longer than `patience_s`.
        """
        retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception(_is_busy),
            wait=tenacity.wait_random_exponential(_FIRST_PAUSE_S, _LONGEST_PAUSE_S),
            stop=tenacity.stop_after_delay(self.settings.patience_s),
            reraise=True,
        )
        result: tuple[GradeResponse, int] = await retrying(self._grade, data)
        return result[0]


def _is_busy(error: BaseException) -> bool:
    return isinstance(error, Refusal) and error.status_code in (503, 504)


class Window:
    """Window of the images in flight: limits of their number and bytes, in total and per owner.

    Images of an owner enter in order, so that small images do not starve a large one.
    """

    def __init__(self, images: int, max_bytes: int) -> None:
        self._images = OwnerQuota(images)
        self._bytes = OwnerQuota(max_bytes)
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._left = asyncio.Event()

    async def enter(self, owner: str, size: int) -> None:
        """Wait for space in the window; an owner's only image always enters."""
        async with self._turns.setdefault(owner, asyncio.Lock()):
            while self._images.held(owner) and not self._has_room(owner, size):
                self._left.clear()
                await self._left.wait()
            self._images.take(owner)
            self._bytes.take(owner, size)

    def leave(self, owner: str, size: int) -> None:
        """Free the space that `enter` took."""
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
        """Count a request while the block runs.

        Raises:
            Refusal: There are too many requests (503).
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
