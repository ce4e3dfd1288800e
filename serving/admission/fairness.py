"""Fairness between owners of requests: queues, quotas and semaphores that one owner cannot fill alone.

An owner is a key, or without keys a client's network. Clients of this machine without a key are one owner
with the empty name. It is the only owner then, so it has no limit.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Container, Iterator
from typing import Generic, TypeVar

LOCAL_OWNER = ""
"""Owner of requests from this machine without a key; has no limit."""

T = TypeVar("T")


def owner_limit(places: int, owner: str) -> int:
    """Limit of one owner: half of `places`, at least one."""
    return places if owner == LOCAL_OWNER else max(1, places // 2)


class FairQueue(Generic[T]):
    """Queue with round-robin between owners: an owner with a hundred items delays another by one item."""

    def __init__(self) -> None:
        self._queues: OrderedDict[str, deque[T]] = OrderedDict()
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def push(self, owner: str, item: T) -> None:
        """Append an item to its owner's queue."""
        self._queues.setdefault(owner, deque()).append(item)
        self._length += 1

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
        self._length -= 1
        return item

    def count(self, without: Container[str] = ()) -> int:
        """Number of items of the owners that are not in `without`."""
        return sum(len(queue) for owner, queue in self._queues.items() if owner not in without)

    def heads(self) -> Iterator[T]:
        """The oldest item of each owner."""
        return (queue[0] for queue in self._queues.values())


class OwnerQuota:
    """Quota of a resource, such as bytes or requests, with a limit per owner (`owner_limit`)."""

    def __init__(self, places: int) -> None:
        self._places = places
        self._held: Counter[str] = Counter()

    def can_take(self, owner: str, amount: int = 1) -> bool:
        """Whether `owner` may take `amount` more."""
        is_free = self._held.total() + amount <= self._places
        return is_free and self._held[owner] + amount <= owner_limit(self._places, owner)

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


class FairSemaphore:
    """Semaphore with round-robin between owners.

    Args:
        slots: Number of slots. One owner gets all but one, so that another owner does not wait for it.
    """

    def __init__(self, slots: int) -> None:
        self._free = slots
        self._most = max(1, slots - 1)
        self._held: Counter[str] = Counter()
        self._waiting: FairQueue[tuple[str, asyncio.Future[None]]] = FairQueue()

    async def acquire(self, owner: str) -> None:
        """Wait for a slot."""
        turn = asyncio.get_running_loop().create_future()
        self._waiting.push(owner, (owner, turn))
        self._hand_out()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # both in the same step of the loop
                self.release(owner)
            raise

    def release(self, owner: str) -> None:
        """Release a slot."""
        self._free += 1
        self._held[owner] -= 1
        self._held += Counter()  # drops owners with zero slots
        self._hand_out()

    def _hand_out(self) -> None:
        while self._free:
            full = {owner for owner, held in self._held.items() if held >= self._most}
            try:
                owner, turn = self._waiting.pop(without=full)
            except LookupError:
                return
            if turn.done():  # cancelled
                continue
            self._free -= 1
            self._held[owner] += 1
            turn.set_result(None)


class ActiveOwners:
    """Owners with a recent request; `len` is their number."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._seen: OrderedDict[str, float] = OrderedDict()

    def record(self, owner: str) -> None:
        """Record a request of `owner`."""
        self._seen[owner] = time.monotonic()
        self._seen.move_to_end(owner)

    def __len__(self) -> int:
        while self._seen and time.monotonic() - next(iter(self._seen.values())) > self._seconds:
            self._seen.popitem(last=False)
        return len(self._seen)
