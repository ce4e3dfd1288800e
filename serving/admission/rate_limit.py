"""Rate limits: token buckets in the memory of one replica."""

from __future__ import annotations

from collections import OrderedDict

# Beyond this number the least recently used bucket is dropped, since clients can use many addresses.
_MOST_BUCKETS = 10_000


class TokenBuckets:
    """A token bucket per name, refilled at a constant rate.

    Args:
        per_minute: Tokens refilled per minute.
        burst: Tokens of a full bucket.
    """

    def __init__(self, per_minute: float, burst: float) -> None:
        self._per_second = per_minute / 60
        self._burst = burst
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, name: str, now: float, cost: float = 1.0) -> float:
        """Take tokens, all or none.

        Args:
            name: Name of the bucket.
            now: Seconds of a monotonic clock.
            cost: Tokens to take, at most the burst.

        Returns:
            0 if the tokens were taken, otherwise the seconds until the bucket has enough.
        """
        tokens, since = self._buckets.pop(name, (float(self._burst), now))
        tokens = min(self._burst, tokens + (now - since) * self._per_second)
        wait = 0.0 if tokens >= cost else (cost - tokens) / self._per_second
        self._buckets[name] = (tokens if wait else tokens - cost, now)
        if len(self._buckets) > _MOST_BUCKETS:
            self._buckets.popitem(last=False)
        return wait
