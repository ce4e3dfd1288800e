"""Timeouts and size limits of HTTP connections to Ray Serve, and a filter of its internal headers.

Ray Serve uses uvicorn, which waits forever for the head of a request and accepts a head of any size. An ASGI
application cannot prevent that, since it is called after the head. Ray Serve calls `proxy_callback` in each
HTTP process when the environment variable RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH names it.
"""

from __future__ import annotations

import asyncio
import json
import os
from http import HTTPStatus
from typing import Any

import uvicorn.config
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from serving.http import request_context
from serving.http.backpressure import bound_request_queues

CALLBACK = "serving.http.connections:proxy_callback"  # for RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH
# Seconds for the head of a request, for the rest of a body after the response, and for a stalled response.
VARIABLE = "SCALP_CONNECTION_SECONDS"
DEFAULT_SECONDS = 15.0
MAX_HEAD_BYTES = 64 * 1024
BATCH_PATH = "/v1/grade/batch"
"""The only path with bodies larger than an image."""

_REQUEST_ID, _REQUEST_TIMEOUT = b"x-request-id", b"x-request-timeout-seconds"
# Headers that control Ray Serve: timeout of a request, cancel on disconnect, and choice of the replica. Ray
# accepts some with - or with _.
_CONTROL_HEADERS = {
    _REQUEST_TIMEOUT,
    b"x-request-disconnect-disabled",
    b"serve-multiplexed-model-id",
    b"x-session-id",
}


class Connection(HttpToolsProtocol):
    """HTTP connection with timeouts. `BodyLimitMiddleware` limits the bodies."""

    seconds = DEFAULT_SECONDS

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.ws_protocol_class = None  # no WebSocket
        self._deadline: asyncio.TimerHandle | None = None  # for data from the client
        self._write_deadline: asyncio.TimerHandle | None = None  # for data to the client
        self._head_bytes = 0  # received bytes outside of complete heads and bodies

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start_deadline()

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel_deadline()
        self.resume_writing()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._deadline is None and self._between_requests:
            self._start_deadline()
        self._head_bytes += len(data)
        super().data_received(data)
        if self._head_bytes > MAX_HEAD_BYTES:
            self._refuse(431, "large_head", f"the head of a request is limited to {MAX_HEAD_BYTES:,} bytes")

    def on_headers_complete(self) -> None:
        self._head_bytes = 0
        self._cancel_deadline()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._head_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self.cycle.more_body = False  # also if the response came before the body

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.cycle.response_complete and self.cycle.more_body:
            self._start_deadline()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_deadline = self.loop.call_later(self.seconds, self.transport.abort)

    def resume_writing(self) -> None:
        if self._write_deadline is not None:
            self._write_deadline.cancel()
            self._write_deadline = None
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, "bad_request", msg)

    @property
    def _between_requests(self) -> bool:
        return self.cycle is None or (self.cycle.response_complete and not self.cycle.more_body)

    def _start_deadline(self) -> None:
        self._cancel_deadline()
        self._deadline = self.loop.call_later(self.seconds, self._too_slow)

    def _cancel_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _too_slow(self) -> None:
        self._deadline = None
        if self._between_requests and self._head_bytes:
            self._refuse(408, "slow_head", f"the head of a request must arrive within {self.seconds:g} s")
        else:
            self.transport.close()

    def _refuse(self, status: int, code: str, detail: str) -> None:
        if self.transport.is_closing():
            return
        if self._between_requests or not self.cycle.response_started:
            self.transport.write(_raw_problem(status, code, detail))
        self.transport.close()


def _raw_problem(status: int, code: str, detail: str) -> bytes:
    """As `problems.problem`, without its imports, which a proxy process should not load."""
    phrase, id_ = HTTPStatus(status).phrase, request_context.request_id()
    body = json.dumps(
        {
            "type": "about:blank",
            "title": phrase,
            "status": status,
            "detail": detail,
            "code": code,
            "request_id": id_,
        }
    ).encode()
    head = (
        f"HTTP/1.1 {status} {phrase}\r\ncontent-type: application/problem+json\r\n"
        f"content-length: {len(body)}\r\nx-request-id: {id_}\r\nx-content-type-options: nosniff\r\n"
        "cache-control: no-store\r\nconnection: close\r\n\r\n"
    )
    return head.encode() + body


class HeaderFilterMiddleware:
    """ASGI middleware around Ray Serve: set a valid request id, drop headers that control Ray Serve."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            given_id = b""
            headers = []
            for name, value in scope["headers"]:
                plain = name.lower().replace(b"_", b"-")
                if plain == _REQUEST_ID:
                    given_id = value
                elif plain not in _CONTROL_HEADERS:
                    headers.append((name, value))
            headers.append((_REQUEST_ID, request_context.request_id(given_id).encode()))
            if scope["path"].removesuffix("/").endswith(BATCH_PATH):
                headers.append((_REQUEST_TIMEOUT, b"0"))  # `limits.batch_seconds` applies in place of Serve's
            scope["headers"] = headers
        await self._app(scope, receive, send)


def proxy_callback() -> list[Middleware]:
    """Install `Connection` and bounded request queues in this process; return Ray Serve's middleware."""
    bound_request_queues()
    Connection.seconds = float(os.environ.get(VARIABLE, DEFAULT_SECONDS))
    uvicorn.config.HTTP_PROTOCOLS["auto"] = f"{Connection.__module__}:{Connection.__name__}"
    return [Middleware(HeaderFilterMiddleware)]
