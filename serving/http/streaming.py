"""A large body in constant memory: what is read of it follows what was used.

Serve reads a body ahead as fast as the client sends, in its proxy and again in the replica, without a bound.
So `FlowControlMiddleware` runs before Serve and reads only as fast as the application reports used bytes. It
also buffers the answers for a client that reads them after it has sent everything; otherwise both would stop.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

BATCH_PATH = "/v1/grade/batch"
"""The one path whose body is not bounded by the size of an image."""

AHEAD = 2**20
"""Bytes that are read and not used yet, at most; one message of the server (64 KiB) may come to it."""

_STEP = AHEAD // 4
_EXTENSION = "scalp.paced"  # of the scope: how to report what was used
_USED = "scalp.used"
_TIMEOUT_HEADER = b"x-request-timeout-seconds"


class ClientGoneError(Exception):
    """The client closed the connection: nobody waits for an answer."""


class _Used:
    """Takes reports of used bytes. Where the application runs in another process, it sends messages instead.

    Ray takes the first message for the begin of the answer: after such a message its metrics have no status.
    """

    def __init__(self, report: Callable[[int], None] | None = None) -> None:
        self.report = report

    def __reduce__(self) -> tuple[type[_Used], tuple[()]]:
        return _Used, ()


class FlowControlMiddleware:
    """ASGI middleware. It holds `AHEAD` of a body, and answers, which their sender bounds."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].removesuffix("/").endswith(BATCH_PATH):
            await self._app(scope, receive, send)
            return
        read = used = 0
        moved = asyncio.Event()
        answers: asyncio.Queue[Message | None] = asyncio.Queue()

        async def paced_receive() -> Message:
            nonlocal read
            while read - used > AHEAD:
                moved.clear()
                await moved.wait()
            message = await receive()
            read += len(message.get("body", b""))
            return message

        def set_used(size: int) -> None:
            nonlocal used
            used = size
            moved.set()

        loop = asyncio.get_running_loop()

        def report(size: int) -> None:
            loop.call_soon_threadsafe(set_used, size)  # the application may have a loop of its own

        async def take(message: Message) -> None:
            if message["type"] == _USED:
                set_used(message["bytes"])
            else:
                answers.put_nowait(message)

        async def pass_on() -> None:
            while message := await answers.get():
                await send(message)

        passing = asyncio.create_task(pass_on())
        try:
            await self._app(_paced(scope, _Used(report)), paced_receive, take)
            answers.put_nowait(None)
            await passing
        finally:
            passing.cancel()


def _paced(scope: Scope, used: _Used) -> Scope:
    """Marked for `read_body`, and without Serve's limit on the time that a request may take."""
    headers = [header for header in scope["headers"] if header[0] != _TIMEOUT_HEADER]
    return {
        **scope,
        "headers": [*headers, (_TIMEOUT_HEADER, b"0")],
        "extensions": {**(scope.get("extensions") or {}), _EXTENSION: used},
    }


async def read_body(scope: Scope, receive: Receive, send: Send) -> AsyncGenerator[bytes, None]:
    """The body piece by piece; a piece counts as used when the next one is asked for.

    Raises:
        ClientGoneError: before its end.
    """
    used: _Used | None = (scope.get("extensions") or {}).get(_EXTENSION)
    taken = told = 0
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        more = message.get("more_body", False)
        if data := message.get("body", b""):
            taken += len(data)
            yield data
        if used and taken - told >= _STEP:
            told = taken
            if used.report:
                used.report(taken)
            else:
                await send({"type": _USED, "bytes": taken})


async def wait_until_gone(receive: Receive) -> None:
    """Returns when the client has closed the connection; for after the body."""
    while (await receive())["type"] != "http.disconnect":
        pass
