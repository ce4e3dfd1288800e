"""Calls by threads that start simultaneously."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

from scalp_core.errors import UserError


def at_once(count: int, work: Callable[[int], Any]) -> list[Any]:
    """Return results or UserErrors of `count` threads that start simultaneously."""
    barrier = Barrier(count)

    def begin(index: int) -> Any:
        barrier.wait()
        try:
            return work(index)
        except UserError as error:
            return error

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(begin, range(count)))
