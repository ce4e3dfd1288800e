"""How often, or how much, somebody may ask: token buckets, in the memory of one replica."""

from __future__ import annotations

from collections import OrderedDict

# Beyond so many, the one that was longest without a request starts anew: addresses are cheap to come by.
_MOST_BUCKETS = 10_000


class TokenBuckets:
    """A bucket of tokens for each name; a request takes some, and they come back evenly.

    Args:
        per_minute: tokens that come back in a minute.
        burst: tokens of a full bucket.
    """

    def __init__(self, per_minute: float, burst: float) -> None:
        self._per_second = per_minute / 60
        self._burst = burst
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, name: str, now: float, cost: float = 1.0) -> float:
        """Takes tokens, all or none.

        Args:
            name: whose.
            now: seconds of a clock that never goes back.
            cost: tokens to take, at most the burst.

        Returns:
            0 when there were enough, else the seconds until there are.
        """
        tokens, since = self._buckets.pop(name, (float(self._burst), now))
        tokens = min(self._burst, tokens + (now - since) * self._per_second)
        wait = 0.0 if tokens >= cost else (cost - tokens) / self._per_second
        self._buckets[name] = (tokens if wait else tokens - cost, now)
        if len(self._buckets) > _MOST_BUCKETS:
            self._buckets.popitem(last=False)
        return wait
