"""How often somebody may ask: token buckets, in the memory of one replica."""

from __future__ import annotations

from collections import OrderedDict

# Beyond so many, the one that was longest without a request starts anew: addresses are cheap to come by.
_MOST_BUCKETS = 10_000


class Buckets:
    """A bucket of tokens for each name; a request takes one, and they come back evenly.

    Args:
        per_minute: tokens that come back in a minute.
        burst: tokens of a full bucket.
    """

    def __init__(self, per_minute: float, burst: int) -> None:
        self._per_second = per_minute / 60
        self._burst = burst
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, name: str, now: float) -> float:
        """Takes a token.

        Args:
            name: whose.
            now: seconds of a clock that never goes back.

        Returns:
            0 when there was one, else the seconds until there is.
        """
        tokens, since = self._buckets.pop(name, (float(self._burst), now))
        tokens = min(self._burst, tokens + (now - since) * self._per_second)
        wait = 0.0 if tokens >= 1 else (1 - tokens) / self._per_second
        self._buckets[name] = (tokens if wait else tokens - 1, now)
        if len(self._buckets) > _MOST_BUCKETS:
            self._buckets.popitem(last=False)
        return wait
