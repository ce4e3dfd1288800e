"""Fairness between owners of requests: queues and quotas that one owner cannot fill alone.

An owner is a key, or without keys a client's network. Clients of this machine without a key are one owner
with the empty name. It is the only owner then, so it has no limit.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Container
from typing import Generic, TypeVar

from cachetools import TTLCache

LOCAL_OWNER = ""
"""Owner of requests from this machine without a key; has no limit."""

MOST_OWNERS = 10_000
"""Owners that are remembered. Beyond it the least recent is dropped, since clients can use many addresses."""


T = TypeVar("T")


class FairQueue(Generic[T]):
    """Queue with round-robin between owners: an owner with a hundred items delays another by one item."""

    def __init__(self) -> None:
        self._queues: OrderedDict[str, deque[T]] = OrderedDict()

    def __len__(self) -> int:
        return self.count()

    def push(self, owner: str, item: T) -> None:
        """Append an item to its owner's queue."""
        self._queues.setdefault(owner, deque()).append(item)

    def pop(self, without: Container[str] = ()) -> T:
        """Remove and return the next item.

        Raises:
            LookupError: The other owners have no items.
        """
        owner = next((name for name in self._queues if name not in without), None)
        if owner is None:
            raise LookupError("the queues of the other owners are empty")
        queue = self._queues.pop(owner)
        item = queue.popleft()
        if queue:
            self._queues[owner] = queue  # at the end of the rotation
        return item

    def count(self, without: Container[str] = ()) -> int:
        """Number of items of the owners that are not in `without`."""
        return sum(len(queue) for owner, queue in self._queues.items() if owner not in without)


class OwnerQuota:
    """Quota of a resource, such as bytes or requests; one owner gets half of it, at least one."""

    def __init__(self, places: int) -> None:
        self._places = places
        self._held: Counter[str] = Counter()

    def can_take(self, owner: str, amount: int = 1) -> bool:
        """Whether `owner` may take `amount` more."""
        limit = self._places if owner == LOCAL_OWNER else max(1, self._places // 2)
        return self._held.total() + amount <= self._places and self._held[owner] + amount <= limit

    def take(self, owner: str, amount: int = 1) -> None:
        """Add `amount` to what `owner` holds, also beyond the limit."""
        self._held[owner] += amount

    def release(self, owner: str, amount: int = 1) -> None:
        """Subtract `amount` from what `owner` holds."""
        self._held[owner] -= amount
        if not self._held[owner]:
            del self._held[owner]

    def held(self, owner: str) -> int:
        """Amount that `owner` holds."""
        return self._held.get(owner, 0)

    @property
    def total(self) -> int:
        """Amount that all owners hold."""
        return self._held.total()


class ActiveOwners(TTLCache[str, None]):
    """Owners with a recent request; `len` is their number."""

    def __init__(self, seconds: float) -> None:
        super().__init__(MOST_OWNERS, seconds)

    def record(self, owner: str) -> None:
        """Record a request of `owner`."""
        self[owner] = None
