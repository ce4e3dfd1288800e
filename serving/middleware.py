"""What holds for every request: a bounded body, safe headers, and no traceback in an answer."""

from __future__ import annotations

import logging

from fastapi import Request
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from scalp_core.codecs import MAX_BYTES
from serving.problems import Refusal, problem

# The form around the photograph: boundaries and part headers.
MAX_BODY_BYTES = MAX_BYTES + 64 * 1024

HEADERS = {
    "Cache-Control": "no-store",  # answers are about people
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src 'self' blob: data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}

_log = logging.getLogger("ray.serve")


class Envelope:
    """ASGI middleware around the whole application."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False

        async def send_with_headers(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        try:
            await self._app(scope, _bounded(scope, receive), send_with_headers)
        except Exception:
            _log.exception("request failed")
            if started:
                raise
            answer = problem(Request(scope), 500, "internal", "the server failed; its log has the reason")
            await answer(scope, receive, send_with_headers)


def _bounded(scope: Scope, receive: Receive) -> Receive:
    """`receive` that refuses a body above the limit: by its declared length at once, else as it comes in."""
    declared = Headers(scope=scope).get("content-length", "")
    taken = 0

    async def bounded() -> Message:
        nonlocal taken
        if declared.isdigit() and int(declared) > MAX_BODY_BYTES:
            raise _too_large()
        message = await receive()
        taken += len(message.get("body", b""))
        if taken > MAX_BODY_BYTES:
            raise _too_large()
        return message

    return bounded


def _too_large() -> Refusal:
    return Refusal(
        413, "too_many_bytes", f"the request is too large; the limit of a photograph is {MAX_BYTES:,} bytes"
    )
