"""Backpressure: bound Ray Serve's queues of request bodies, so that fast clients wait.

Ray Serve reads a body as fast as it arrives and queues it without a limit, in the proxy and in the replica:
400 MB sent to a slow application took 1.2 GB of memory (Ray 2.60, 2026-11-26), and Ray has no setting for it.
With bounded queues the connection fills up instead.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sized
from typing import Any

from cluster.ray_internals import serve_queues

_MAX_MESSAGES = 16  # in one queue; up to 256 KiB each
_POLL_S = 0.005
_MessageQueue, _ASGIReceiveProxy, _ASGIDIReceiveProxy = serve_queues()


def bound_request_queues() -> None:
    """Bound the queues of request bodies in this process; idempotent."""
    if _MessageQueue.__call__ is not _put:
        _MessageQueue.__call__ = _put
        _bound_receiver(_ASGIReceiveProxy, "_receive_asgi_messages")
        _bound_receiver(_ASGIDIReceiveProxy, "_receive")


async def _wait_for_space(messages: Callable[[], Sized]) -> None:
    while len(messages()) > _MAX_MESSAGES:
        await asyncio.sleep(_POLL_S)


_put_unbounded = _MessageQueue.__call__


async def _put(self: Any, message: Any) -> None:
    """Replacement of `MessageQueue.__call__`, with which the proxy queues a body for the replica."""
    await _put_unbounded(self, message)
    if message["type"] == "http.request":
        await _wait_for_space(lambda: self._message_queue)


def _bound_receiver(receiver: Any, source: str) -> None:
    """Make a replica's receiver wait for the application before it fetches more messages."""
    initialize = receiver.__init__

    def __init__(self: Any, *arguments: Any, **options: Any) -> None:  # noqa: N807
        initialize(self, *arguments, **options)
        fetch = getattr(self, source)

        async def fetch_bounded(*arguments: Any) -> Any:
            await _wait_for_space(lambda: self.queue._queue)
            return await fetch(*arguments)

        setattr(self, source, fetch_bounded)

    receiver.__init__ = __init__
