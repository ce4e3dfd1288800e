"""Rate limit of the decoding cost, in megapixels: of one image, and of one owner per minute on this replica.

The number of bytes is not enough: a PNG with 49 million pixels has 142,765 bytes, and 541 bytes in a zip.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterable
from contextlib import suppress

from cachetools import LRUCache

from scalp_core.errors import ImageError
from scalp_core.images.codecs import MAX_PIXELS, Header, read_header
from serving.admission.decoding import Decoders
from serving.admission.fairness import MOST_OWNERS
from serving.admission.limits import Limits
from serving.http.problems import Refusal

_JPEG = b"\xff\xd8\xff"
_READ_AT_ONCE = 2**21  # bytes


class TokenBuckets:
    """A token bucket per name, refilled at a constant rate."""

    def __init__(self, per_minute: float, burst: float) -> None:
        self._per_second = per_minute / 60
        self._burst = burst
        self._buckets: LRUCache[str, tuple[float, float]] = LRUCache(MOST_OWNERS)

    def take(self, name: str, now: float, cost: float = 1.0) -> float:
        """Take tokens, all or none.

        Args:
            now: Seconds of a monotonic clock.
            cost: Tokens to take, at most the burst.

        Returns:
            0 if the tokens were taken, otherwise the seconds until the bucket has enough.
        """
        tokens, since = self._buckets.get(name, (float(self._burst), now))
        tokens = min(self._burst, tokens + (now - since) * self._per_second)
        wait = 0.0 if tokens >= cost else (cost - tokens) / self._per_second
        self._buckets[name] = (tokens if wait else tokens - cost, now)
        return wait


class Admission:
    """Check of the decoding cost of images before a replica decodes them."""

    def __init__(self, limits: Limits, decoders: Decoders) -> None:
        self._limits = limits
        self._decoders = decoders
        self._burst = max(limits.max_megapixels, limits.megapixels_per_minute / 10)
        self._budgets = TokenBuckets(limits.megapixels_per_minute, self._burst)

    async def measure(self, owner: str, data: bytes) -> float:
        """Decoding cost of a file, in megapixels of PNG, from its header; nothing is decompressed.

        Raises:
            ImageError: The header is damaged, or the image exceeds the limit.
        """
        if len(data) < _READ_AT_ONCE and data.startswith(_JPEG):
            header = read_header(data)  # 0.02 ms
        else:
            header = await self._decoders.run(owner, 0, read_header, data)
        if header.cost > self._limits.max_megapixels:
            raise ImageError("too_many_pixels", self._too_large(header))
        return header.cost

    async def measure_readable(self, owner: str, images: Iterable[bytes]) -> float:
        """Decoding cost of several files; those that `measure` refuses cost nothing."""
        total = 0.0
        for data in images:
            with suppress(ImageError):
                total += await self.measure(owner, data)
        return total

    def take(self, owner: str, megapixels: float) -> None:
        """Take megapixels from the budget of an owner.

        Raises:
            Refusal: The budget is used up (429), or smaller than that (413).
        """
        if megapixels > self._burst:
            raise Refusal(
                413,
                "too_many_pixels",
                f"{megapixels:,.0f} megapixels (those of a JPEG count an eighth); the limit of a request is "
                f"{self._burst:g}; divide it",
            )
        seconds = self._budgets.take(owner, time.monotonic(), megapixels)
        if seconds:
            whole = math.ceil(seconds)
            raise Refusal(
                429,
                "pixel_budget",
                f"the {self._limits.megapixels_per_minute:g} megapixels per minute are used up (those of a "
                f"JPEG count an eighth); wait {whole} s, or send smaller images",
                {"Retry-After": str(whole)},
            )

    async def wait(self, owner: str, megapixels: float) -> None:
        """Wait until the budget of an owner suffices, and take from it."""
        while seconds := self._budgets.take(owner, time.monotonic(), megapixels):
            await asyncio.sleep(seconds)

    def _too_large(self, header: Header) -> str:
        limit = self._limits.max_megapixels / header.cost * header.width * header.height
        return (
            f"{header.width}x{header.height} pixels; the limit of this endpoint is {int(limit):,} for such a "
            f"{header.kind} and at most {MAX_PIXELS:,} for a JPEG; send a smaller copy, or grade it in bulk"
        )
