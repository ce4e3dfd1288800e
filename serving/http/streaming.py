"""Flow control of batch uploads: read a large body in constant memory, as fast as the application uses it.

Serve reads a body as fast as the client sends, in its proxy and again in the replica, without a limit.
So `FlowControlMiddleware` runs before Serve and reads only as fast as the application reports used bytes. It
also buffers the answers for a client that reads them after it has sent everything; otherwise both would stop.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

BATCH_PATH = "/v1/grade/batch"
"""The only path with bodies larger than an image."""

AHEAD = 2**20
"""Maximum of bytes that are read and not used yet, plus one message of the server (64 KiB)."""

_STEP = AHEAD // 4
_EXTENSION = "scalp.paced"  # extension of the ASGI scope to report used bytes
_USED = "scalp.used"
_TIMEOUT_HEADER = b"x-request-timeout-seconds"


class ClientGoneError(Exception):
    """The client closed the connection before the response."""


class _Used:
    """Callback for reports of used bytes; an application in another process sends messages instead.

    Ray takes the first message for the start of the response, so that its metrics then have no status.
    """

    def __init__(self, report: Callable[[int], None] | None = None) -> None:
        self.report = report

    def __reduce__(self) -> tuple[type[_Used], tuple[()]]:
        return _Used, ()


class FlowControlMiddleware:
    """ASGI middleware that buffers at most `AHEAD` bytes of a body, and the response, whose size is small."""

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
            loop.call_soon_threadsafe(set_used, size)  # the application may run in another event loop

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
    """The scope with the extension for `read_body`, and without Serve's request timeout."""
    headers = [header for header in scope["headers"] if header[0] != _TIMEOUT_HEADER]
    return {
        **scope,
        "headers": [*headers, (_TIMEOUT_HEADER, b"0")],
        "extensions": {**(scope.get("extensions") or {}), _EXTENSION: used},
    }


async def read_body(scope: Scope, receive: Receive, send: Send) -> AsyncGenerator[bytes, None]:
    """Yield the body piece by piece; a piece counts as used when the next one is requested.

    Raises:
        ClientGoneError: The client disconnected before the end of the body.
    """
    used: _Used | None = (scope.get("extensions") or {}).get(_EXTENSION)
    taken = reported = 0
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        more = message.get("more_body", False)
        if data := message.get("body", b""):
            taken += len(data)
            yield data
        if used and taken - reported >= _STEP:
            reported = taken
            if used.report:
                used.report(taken)
            else:
                await send({"type": _USED, "bytes": taken})


async def wait_until_gone(receive: Receive) -> None:
    """Wait until the client closes the connection, after the body."""
    while (await receive())["type"] != "http.disconnect":
        pass
