"""How much a replica takes in at once: bodies that are bounded in bytes and time, requests in number."""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, Field, model_validator
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from scalp_core.images.codecs import MAX_BYTES
from serving.admission.fairness import LOCAL_OWNER, ActiveOwners, OwnerQuota
from serving.auth.network import client_network, is_here
from serving.http import request_context
from serving.http.problems import Refusal

# The form around an image: boundaries and part headers.
FORM_BYTES = 64 * 1024
MAX_BODY_BYTES = MAX_BYTES + FORM_BYTES

_MIB = 2**20
_LONGEST_RETRY_S = 60
_REMEMBERED = 0.95  # of the measured seconds per image, when a new measurement comes
_FIRST_GUESS_S = 0.02
# Of `queue_seconds`, up to which more are taken in: no measurement foretells the next second to the tenth.
_SURE = 0.9
# However slow it is: the passes that run are full, and there is something to measure.
_ALWAYS = 8
# Owners whose last request is older want no share of the queue.
_ACTIVE_S = 10.0


class Limits(BaseModel):
    """What a replica of the ingress takes in."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    grade_bytes: int = Field(MAX_BODY_BYTES, ge=1, description="of a request with one image, in its form")
    batch_bytes: int = Field(1024 * _MIB, ge=1, description="of a request with many images")
    other_bytes: int = Field(64 * 1024, ge=1, description="of any other request")
    grade_seconds: float = Field(60, gt=0, description="that the body of one image may keep us waiting")
    batch_seconds: float = Field(1800, gt=0, description="that the body of many may keep us waiting")
    grace_seconds: float = Field(
        10, gt=0, description="that any body may keep us waiting; each `min_bytes_per_s` bytes give one more"
    )
    min_bytes_per_s: int = Field(4096, ge=1, description="slowest body that is waited for, after the grace")
    uploads: int = Field(256, ge=1, description="requests whose body is coming in; more are refused unread")
    in_flight: int = Field(
        128,
        ge=1,
        description="requests whose body is here, before they are answered; more are refused unread",
    )
    queue_seconds: float = Field(
        1.0,
        gt=0,
        description="in which what is here will be answered, as fast as the model is at present; what would "
        "make it more is refused unread",
    )
    held_bytes: int = Field(512 * _MIB, ge=1, description="of all bodies of one image that are here")
    max_megapixels: float = Field(
        12.5,
        gt=0,
        description="of one image, as decoding weighs them: those of a JPEG count an eighth, those of a "
        "progressive one 0.03 per scan",
    )
    megapixels_per_minute: float = Field(
        600,
        gt=0,
        description="of all images of one key, weighed in the same way; each replica counts for itself",
    )
    megapixels_burst: float = Field(60, gt=0, description="of one key at once, when it was quiet before")

    @model_validator(mode="after")
    def _one_fits(self) -> Limits:
        if self.held_bytes < self.grade_bytes:
            raise ValueError(f"held_bytes ({self.held_bytes}) is below grade_bytes ({self.grade_bytes})")
        if self.megapixels_burst < self.max_megapixels:
            raise ValueError(
                f"megapixels_burst ({self.megapixels_burst:g}) is below max_megapixels "
                f"({self.max_megapixels:g}): the largest image would wait for ever"
            )
        return self


@dataclass(frozen=True, slots=True)
class _Bounds:
    """Of the body of one path."""

    bytes: int
    seconds: float
    held: bool  # in memory, whole; else it is read in passing


class Load:
    """Current load of the replica: requests, counted by `BodyLimitMiddleware`, and images that are graded.

    No owner gets more than half of the places, and where several owners ask, each gets its part of the queue.

    Args:
        limits: that it is held against.
        seconds_per_image: a first guess.
    """

    def __init__(self, limits: Limits, seconds_per_image: float = _FIRST_GUESS_S) -> None:
        self._limits = limits
        self._seconds = seconds_per_image
        self._grading: Counter[str] = Counter()  # images, of requests with one and with many
        self._active = ActiveOwners(_ACTIVE_S)
        self.uploads = OwnerQuota(limits.uploads)
        self.in_flight = OwnerQuota(limits.in_flight)
        self.held_bytes = OwnerQuota(limits.held_bytes)

    @contextmanager
    def grading(self) -> Iterator[None]:
        """Counts an image while the block grades it, and measures how fast the queue moves."""
        owner = request_context.current().owner
        self._grading[owner] += 1
        # The grader serves owners in rotation: before this one come as many of each other as of its own.
        place = min(self._grading.total(), self._grading[owner] * len(self._grading))
        since = time.monotonic()
        try:
            yield
        finally:
            self._grading[owner] -= 1
            if not self._grading[owner]:
                del self._grading[owner]
        self.observe((time.monotonic() - since) / place)

    def observe(self, seconds_per_image: float) -> None:
        """Takes in a measurement: seconds that an image took, for each that was here when it came."""
        self._seconds = _REMEMBERED * self._seconds + (1 - _REMEMBERED) * seconds_per_image

    def retry_after(self) -> int:
        """Whole seconds until what is here will be done."""
        queue = max(self.in_flight.total, self._grading.total())
        return min(_LONGEST_RETRY_S, max(1, math.ceil(queue * self._seconds)))

    def check(self, owner: str = LOCAL_OWNER) -> None:
        """Refuses one more request when there are enough."""
        self._active.record(owner)
        self.check_in_flight(owner)
        if not self.uploads.can_take(owner):
            raise self.overloaded()

    def check_in_flight(self, owner: str = LOCAL_OWNER) -> None:
        """Refuses a request that has come in when there are enough."""
        owners = max(1, len(self._active))
        if owners == 1:
            requests = self.in_flight.total
            queue = max(requests, self._grading.total())
        else:
            requests = self.in_flight.held(owner)
            queue = owners * max(requests, self._grading[owner])
        too_long = (queue + 1) * self._seconds > _SURE * self._limits.queue_seconds
        is_some = requests >= max(1, _ALWAYS // owners)
        if not self.in_flight.can_take(owner) or (is_some and too_long):
            raise self.overloaded()

    def hold(self, owner: str, size: int) -> None:
        """Counts bytes that came in, and refuses them when there are enough."""
        has_room = self.held_bytes.can_take(owner, size)
        self.held_bytes.take(owner, size)
        if not has_room:
            raise self.overloaded()

    def overloaded(self) -> Refusal:
        """What whoever is one too many is told."""
        wait = self.retry_after()
        return Refusal(
            503,
            "overloaded",
            f"too many requests are waiting; try again in {wait} s",
            {"Retry-After": str(wait)},
        )


class BodyLimitMiddleware:
    """ASGI middleware: refuses requests when there are enough, and bodies that are too large or too slow.

    Requests without a body of their own pass: they cost nothing.

    Args:
        app: what it protects.
        limits: what is taken in.
        load: where it is counted.
    """

    def __init__(self, app: ASGIApp, limits: Limits, load: Load) -> None:
        self._app = app
        self._limits = limits
        self._load = load
        self._other = _Bounds(limits.other_bytes, limits.grade_seconds, held=True)
        self._by_path = {
            "/v1/grade": _Bounds(limits.grade_bytes, limits.grade_seconds, held=True),
            "/v1/grade/batch": _Bounds(limits.batch_bytes, limits.batch_seconds, held=False),
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self._app(scope, receive, send)
            return
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        bounds = self._by_path.get(path, self._other)
        declared = dict(scope["headers"]).get(b"content-length", b"")
        if declared.isdigit() and int(declared) > bounds.bytes:
            raise _too_large(bounds)
        request = request_context.current()
        request.owner = request.key or _network(scope)
        self._load.check(request.owner)
        body = _Body(receive, bounds, self._limits, self._load, request.owner)
        try:
            await self._app(scope, body.receive, send)
        finally:
            body.close()


class _Body:
    """The body of one request, as it comes in."""

    def __init__(self, receive: Receive, bounds: _Bounds, limits: Limits, load: Load, owner: str) -> None:
        self._receive = receive
        self._bounds = bounds
        self._limits = limits
        self._load = load
        self._owner = owner
        self._taken = 0  # bytes
        self._waited = 0.0  # seconds in which the client was awaited; not those in which we were busy
        self._whole = False
        load.uploads.take(owner)

    def close(self) -> None:
        """The request is over."""
        if self._whole:
            self._load.in_flight.release(self._owner)
        else:
            self._load.uploads.release(self._owner)
        if self._bounds.held:
            self._load.held_bytes.release(self._owner, self._taken)

    async def receive(self) -> Message:
        """The next piece of it."""
        if self._whole:
            return await self._receive()  # which tells when the client goes away
        message = await self._next()
        size = len(message.get("body", b""))
        self._taken += size
        if self._bounds.held:
            self._load.hold(self._owner, size)
        if self._taken > self._bounds.bytes:
            raise _too_large(self._bounds)
        if not message.get("more_body", False):
            if self._bounds.held:
                self._load.check_in_flight(
                    self._owner
                )  # who began to send at the same time may have filled it up
            self._whole = True
            self._load.uploads.release(self._owner)
            self._load.in_flight.take(self._owner)
        return message

    async def _next(self) -> Message:
        earned = self._limits.grace_seconds + self._taken / self._limits.min_bytes_per_s
        began = asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout(min(self._bounds.seconds, earned) - self._waited):
                return await self._receive()
        except TimeoutError:
            raise Refusal(
                408,
                "slow_body",
                f"the body stopped after {self._taken:,} bytes; it must come at "
                f"{self._limits.min_bytes_per_s:,} bytes/s or more, and within {self._bounds.seconds:g} s",
            ) from None
        finally:
            self._waited += asyncio.get_running_loop().time() - began


def _network(scope: Scope) -> str:
    """Of a client without a key: empty where it is of this machine."""
    client = scope.get("client")
    address = client[0] if client else ""
    return LOCAL_OWNER if is_here(address) else client_network(address)


def _too_large(bounds: _Bounds) -> Refusal:
    limit = f"the limit is {bounds.bytes:,} bytes"
    if bounds.bytes == MAX_BODY_BYTES:
        limit = f"the limit of an image is {MAX_BYTES:,} bytes"
    elif not bounds.held:
        limit += "; divide the batch"
    return Refusal(413, "too_many_bytes", f"the request is too large; {limit}")
