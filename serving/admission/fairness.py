"""Fair shares: queues and places that no owner of requests can fill alone.

An owner is a key, or where there are no keys a client's network. Clients of this machine without a key are
one owner with the empty name: nobody else is there, so it may hold everything.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Container, Iterator
from typing import Generic, TypeVar

LOCAL_OWNER = ""
"""The owner who shares with nobody."""

T = TypeVar("T")


def owner_limit(places: int, owner: str) -> int:
    """How many of `places` one owner may hold: half of them, and at least one."""
    return places if owner == LOCAL_OWNER else max(1, places // 2)


class FairQueue(Generic[T]):
    """A queue for each owner, taken from in rotation: one with a hundred items delays another by one."""

    def __init__(self) -> None:
        self._queues: OrderedDict[str, deque[T]] = OrderedDict()
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def push(self, owner: str, item: T) -> None:
        """Adds an item at the end of its owner's queue."""
        self._queues.setdefault(owner, deque()).append(item)
        self._length += 1

    def pop(self, without: Container[str] = ()) -> T:
        """Takes the next item.

        Args:
            without: owners whose items stay.

        Raises:
            LookupError: the others have none.
        """
        owner = next((each for each in self._queues if each not in without), None)
        if owner is None:
            raise LookupError("no item of another owner waits")
        queue = self._queues.pop(owner)
        item = queue.popleft()
        if queue:
            self._queues[owner] = queue  # at the end of the rotation
        self._length -= 1
        return item

    def count(self, without: Container[str] = ()) -> int:
        """Items that `pop` would find."""
        return sum(len(queue) for owner, queue in self._queues.items() if owner not in without)

    def heads(self) -> Iterator[T]:
        """The oldest item of each owner."""
        return (queue[0] for queue in self._queues.values())


class OwnerQuota:
    """Counts what owners hold of a resource; one owner gets at most its share.

    Args:
        places: of all owners together.
    """

    def __init__(self, places: int) -> None:
        self._places = places
        self._held: Counter[str] = Counter()

    def can_take(self, owner: str, amount: int = 1) -> bool:
        """Whether `owner` may take so much more."""
        is_free = self._held.total() + amount <= self._places
        return is_free and self._held[owner] + amount <= owner_limit(self._places, owner)

    def take(self, owner: str, amount: int = 1) -> None:
        """Counts what `owner` takes."""
        self._held[owner] += amount

    def release(self, owner: str, amount: int = 1) -> None:
        """Counts what `owner` returns."""
        self._held[owner] -= amount
        if not self._held[owner]:
            del self._held[owner]

    def held(self, owner: str) -> int:
        """What `owner` holds."""
        return self._held.get(owner, 0)

    @property
    def total(self) -> int:
        """What all owners hold."""
        return self._held.total()


class FairSemaphore:
    """A semaphore whose waiters are served in rotation by owner.

    Args:
        slots: that may be held at once. One owner gets all but one, so that another need not wait for it.
    """

    def __init__(self, slots: int) -> None:
        self._free = slots
        self._most = max(1, slots - 1)
        self._held: Counter[str] = Counter()
        self._waiting: FairQueue[tuple[str, asyncio.Future[None]]] = FairQueue()

    async def acquire(self, owner: str) -> None:
        """Waits for a slot."""
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
        """Gives a slot back."""
        self._free += 1
        self._held[owner] -= 1
        self._held += Counter()  # without those that hold none
        self._hand_out()

    def _hand_out(self) -> None:
        while self._free:
            full = {owner for owner, held in self._held.items() if held >= self._most}
            try:
                owner, turn = self._waiting.pop(without=full)
            except LookupError:
                return
            if turn.done():  # its waiter is gone
                continue
            self._free -= 1
            self._held[owner] += 1
            turn.set_result(None)


class ActiveOwners:
    """The owners whose requests came in during the last seconds.

    Args:
        seconds: after which a silent owner is forgotten.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._seen: OrderedDict[str, float] = OrderedDict()

    def record(self, owner: str) -> None:
        """Remembers that a request of `owner` came in."""
        self._seen[owner] = time.monotonic()
        self._seen.move_to_end(owner)

    def __len__(self) -> int:
        while self._seen and time.monotonic() - next(iter(self._seen.values())) > self._seconds:
            self._seen.popitem(last=False)
        return len(self._seen)
