"""Limits of a replica: bytes and duration of request bodies, number of requests, overload."""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from pydantic import BaseModel, Field, model_validator
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.haproxy import OPEN_INFERENCE_PATH
from scalp_core.images.codecs import MAX_BYTES
from serving.admission.fairness import LOCAL_OWNER, ActiveOwners, OwnerQuota
from serving.auth.network import client_network
from serving.http import request_context
from serving.http.problems import Refusal

MAX_BODY_BYTES = MAX_BYTES + 64 * 1024  # an image in a form, with boundaries and part headers

_MIB = 2**20
_LONGEST_RETRY_S = 60
_REMEMBERED = 0.95  # weight of the old mean in the moving mean of seconds per image
_FIRST_GUESS_S = 0.02
# Part of `queue_seconds` up to which requests are accepted: the estimate is not exact.
_SURE = 0.9
# Requests that are accepted at any speed, so that passes are full and the speed can be measured.
_ALWAYS = 8
# Owners with an older last request get no part of the queue.
_ACTIVE_S = 10.0


class Limits(BaseModel, extra="forbid", frozen=True):
    """Limits of one ingress replica."""

    grade_bytes: int = Field(
        MAX_BODY_BYTES, ge=1, description="bytes of a request with one image, with its form"
    )
    batch_bytes: int = Field(1024 * _MIB, ge=1, description="bytes of a request with many images")
    infer_images: int = Field(
        32, ge=1, description="images of one request of the Open Inference Protocol, within `grade_bytes`"
    )
    other_bytes: int = Field(64 * 1024, ge=1, description="bytes of any other request")
    grade_seconds: float = Field(
        60, gt=0, description="seconds that the replica waits for the body of one image"
    )
    batch_seconds: float = Field(
        1800, gt=0, description="seconds that the replica waits for the body of a batch"
    )
    grace_seconds: float = Field(
        10,
        gt=0,
        description="seconds that the replica waits for any body; each `min_bytes_per_s` bytes add one",
    )
    min_bytes_per_s: int = Field(4096, ge=1, description="minimum upload rate after grace_seconds")
    uploads: int = Field(256, ge=1, description="concurrent uploads; more are refused unread")
    in_flight: int = Field(
        128,
        ge=1,
        description="requests with a complete body and no answer yet; more are refused unread",
    )
    queue_seconds: float = Field(
        3.0,
        gt=0,
        description="longest queue, in seconds at the present speed of the model; requests beyond it are "
        "refused unread",
    )
    held_bytes: int = Field(
        512 * _MIB, ge=1, description="bytes of all bodies with one image that are held in memory"
    )
    max_megapixels: float = Field(
        12.5,
        gt=0,
        description="cost of decoding one image: megapixels of a JPEG count an eighth, those of a "
        "progressive JPEG 0.03 per scan",
    )
    megapixels_per_minute: float = Field(
        600,
        gt=0,
        description="decoding cost per minute of all images of one key, a tenth of it in a row; each replica "
        "counts separately",
    )

    @model_validator(mode="after")
    def _one_fits(self) -> Limits:
        if self.held_bytes < self.grade_bytes:
            raise ValueError(f"held_bytes ({self.held_bytes}) is below grade_bytes ({self.grade_bytes})")
        return self


class _Bounds(NamedTuple):
    """Limits of the request body of one path."""

    bytes: int
    seconds: float
    is_held: bool  # in memory as a whole; otherwise it is streamed


class Load:
    """Current load of the replica: requests, counted by `BodyLimitMiddleware`, and images that are graded.

    One owner gets at most half of the places. When several owners are active, they share the queue equally.

    Args:
        seconds_per_image: Initial estimate of the model's speed.
    """

    def __init__(self, limits: Limits, seconds_per_image: float = _FIRST_GUESS_S) -> None:
        self.limits = limits
        self._seconds = seconds_per_image
        self._grading: Counter[str] = Counter()  # images, of requests with one and with many
        self._active = ActiveOwners(_ACTIVE_S)
        self.uploads = OwnerQuota(limits.uploads)
        self.in_flight = OwnerQuota(limits.in_flight)
        self.held_bytes = OwnerQuota(limits.held_bytes)

    @contextmanager
    def grading(self) -> Iterator[None]:
        """Count an image while the block grades it, and measure the seconds per image."""
        owner = request_context.current().owner
        self._grading[owner] += 1
        # The grader serves owners in turn: each other owner gets as many images ahead of this one.
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
        """Update the moving mean of seconds per image: duration of one image / its place in the queue."""
        self._seconds = _REMEMBERED * self._seconds + (1 - _REMEMBERED) * seconds_per_image

    def retry_after(self) -> int:
        """Estimate of the seconds until the queue is empty, for the Retry-After header."""
        queue = max(self.in_flight.total, self._grading.total())
        return min(_LONGEST_RETRY_S, max(1, math.ceil(queue * self._seconds)))

    def check(self, owner: str = LOCAL_OWNER) -> None:
        """Raise a `Refusal` (503) if the replica cannot accept another request."""
        self._active.record(owner)
        self.check_in_flight(owner)
        if not self.uploads.can_take(owner):
            raise self.overloaded()

    def check_in_flight(self, owner: str = LOCAL_OWNER) -> None:
        """Raise a `Refusal` (503) if the replica cannot hold another complete request."""
        owners = max(1, len(self._active))
        requests = self.in_flight.held(owner)
        queue = owners * max(requests, self._grading[owner])
        too_long = (queue + 1) * self._seconds > _SURE * self.limits.queue_seconds
        has_minimum = requests >= max(1, _ALWAYS // owners)
        if not self.in_flight.can_take(owner) or (has_minimum and too_long):
            raise self.overloaded()

    def overloaded(self) -> Refusal:
        """The refusal of a request that exceeds a limit, with Retry-After."""
        wait = self.retry_after()
        return Refusal(
            503,
            "overloaded",
            f"too many requests are waiting; try again in {wait} s",
            {"Retry-After": str(wait)},
        )


def is_infer(path: str) -> bool:
    """Whether a path grades images by the Open Inference Protocol."""
    return path.startswith(f"{OPEN_INFERENCE_PATH}models/") and path.endswith("/infer")


class BodyLimitMiddleware:
    """ASGI middleware that refuses requests under overload, and bodies that are too large or too slow.

    Requests without a body (GET, HEAD, OPTIONS) pass.
    """

    def __init__(self, app: ASGIApp, load: Load) -> None:
        self._app = app
        self._load = load
        limits = load.limits
        self._image = _Bounds(limits.grade_bytes, limits.grade_seconds, is_held=True)
        self._other = _Bounds(limits.other_bytes, limits.grade_seconds, is_held=True)
        self._by_path = {
            "/v1/grade": self._image,
            "/v1/grade/batch": _Bounds(limits.batch_bytes, limits.batch_seconds, is_held=False),
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self._app(scope, receive, send)
            return
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        bounds = self._image if is_infer(path) else self._by_path.get(path, self._other)
        declared = dict(scope["headers"]).get(b"content-length", b"")
        if declared.isdigit() and int(declared) > bounds.bytes:
            raise _too_large(bounds)
        request = request_context.current()
        request.owner = request.key or client_network(scope)
        self._load.check(request.owner)
        body = _Body(receive, bounds, self._load, request.owner)
        try:
            await self._app(scope, body.receive, send)
        finally:
            body.close()


class _Body:
    """The body of one request while it is received."""

    def __init__(self, receive: Receive, bounds: _Bounds, load: Load, owner: str) -> None:
        self._receive = receive
        self._bounds = bounds
        self._load = load
        self._owner = owner
        self._taken = 0  # bytes
        self._waited = 0.0  # seconds of waiting for the client, without those of the application
        self._is_whole = False
        load.uploads.take(owner)

    def close(self) -> None:
        """Release the quotas of the request."""
        (self._load.in_flight if self._is_whole else self._load.uploads).release(self._owner)
        if self._bounds.is_held:
            self._load.held_bytes.release(self._owner, self._taken)

    async def receive(self) -> Message:
        """Receive the next ASGI message of the body.

        Raises:
            Refusal: The body is too large or too slow, or the replica is overloaded.
        """
        if self._is_whole:
            return await self._receive()  # the disconnect of the client
        message = await self._next()
        size = len(message.get("body", b""))
        self._taken += size
        if self._bounds.is_held:
            has_space = self._load.held_bytes.can_take(self._owner, size)
            self._load.held_bytes.take(self._owner, size)
            if not has_space:
                raise self._load.overloaded()
        if self._taken > self._bounds.bytes:
            raise _too_large(self._bounds)
        if not message.get("more_body", False):
            if self._bounds.is_held:
                self._load.check_in_flight(self._owner)  # uploads that ended first may have filled it
            self._is_whole = True
            self._load.uploads.release(self._owner)
            self._load.in_flight.take(self._owner)
        return message

    async def _next(self) -> Message:
        limits, clock = self._load.limits, asyncio.get_running_loop().time
        earned = limits.grace_seconds + self._taken / limits.min_bytes_per_s
        began = clock()
        try:
            async with asyncio.timeout(min(self._bounds.seconds, earned) - self._waited):
                return await self._receive()
        except TimeoutError:
            raise Refusal(
                408,
                "slow_body",
                f"the body stopped after {self._taken:,} bytes; it must come at "
                f"{limits.min_bytes_per_s:,} bytes/s or more, and within {self._bounds.seconds:g} s",
            ) from None
        finally:
            self._waited += clock() - began


def _too_large(bounds: _Bounds) -> Refusal:
    advice = "" if bounds.is_held else "; divide the batch"
    return Refusal(413, "too_many_bytes", f"the limit of such a request is {bounds.bytes:,} bytes{advice}")
