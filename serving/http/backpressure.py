"""Holds a client back that sends faster than the application reads.

Ray Serve takes in a body as fast as it comes and queues it without a limit, in the process that listens and
in the replica: 400 MB sent to an application that reads slowly were 1.2 GB of memory (ray 2.60, 2026-11-26),
and Ray has no setting for it. Here each queue of a request is given a length, and the connection fills up.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sized
from typing import Any

from cluster.ray_internals import serve_queues

_MOST_MESSAGES = 16  # of up to 256 KiB, in one queue
_LOOK_AGAIN_S = 0.005
_MessageQueue, _ASGIReceiveProxy, _ASGIDIReceiveProxy = serve_queues()


def bound_request_queues() -> None:
    """Gives the queues of this process lengths; again, it does nothing."""
    if _MessageQueue.__call__ is not _put:
        _MessageQueue.__call__ = _put
        _give_length(_ASGIReceiveProxy, "_receive_asgi_messages")
        _give_length(_ASGIDIReceiveProxy, "_receive")


async def _room(messages: Callable[[], Sized]) -> None:
    while len(messages()) > _MOST_MESSAGES:
        await asyncio.sleep(_LOOK_AGAIN_S)


_put_at_once = _MessageQueue.__call__


async def _put(self: Any, message: Any) -> None:
    """`MessageQueue.__call__`, by which the process that listens queues a body for the replica."""
    await _put_at_once(self, message)
    if message["type"] == "http.request":
        await _room(lambda: self._message_queue)


def _give_length(receiver: Any, source: str) -> None:
    """Makes what fetches the messages of a request for a replica wait until the application took some."""
    initialize = receiver.__init__

    def __init__(self: Any, *arguments: Any, **options: Any) -> None:  # noqa: N807
        initialize(self, *arguments, **options)
        fetch = getattr(self, source)

        async def fetch_when_there_is_room(*arguments: Any) -> Any:
            await _room(lambda: self.queue._queue)
            return await fetch(*arguments)

        setattr(self, source, fetch_when_there_is_room)

    receiver.__init__ = __init__
