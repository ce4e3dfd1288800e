"""Middleware of all requests: request id, security headers, error responses, audit log and metrics."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from contextlib import suppress

from fastapi import FastAPI, Response
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.haproxy import BATCH_PATH, OPEN_INFERENCE_PATH
from serving.admission.limits import BodyLimitMiddleware, Load
from serving.api.authorization import AuthorizationMiddleware
from serving.auth.keys import Keys
from serving.http import request_context
from serving.http.headers import SECURITY_HEADERS
from serving.http.problems import Refusal, problem, refusal_response
from serving.observability.audit import AuditLog
from serving.observability.metrics import ImageMetrics, RequestMetrics
from serving.observability.tracing import traceparent
from serving.settings import Settings

_HSTS = (b"strict-transport-security", b"max-age=31536000")
# The rest of a large unread body is not waited for.
_CLOSE = (b"connection", b"close")
# The rest of a small one is read before a refusal: bytes that reach a closed connection reset it, and the
# proxy or the client may then lose the answer.
_SMALL_BYTES, _SMALL_SECONDS = 64 * 1024, 1.0
# Routes in the metrics for requests that are refused before routing, for example under overload.
_BEFORE_ROUTING = ("/v1/grade", BATCH_PATH, "/v1/bulk")

_log = logging.getLogger("ray.serve")


class RequestMiddleware:
    """ASGI middleware around the whole application."""

    def __init__(self, app: ASGIApp, audit: AuditLog | None = None) -> None:
        self._app = app
        self._audit = audit
        self._metrics, self._stages = RequestMetrics(), ImageMetrics()
        self._headers = [(name.lower().encode(), value.encode()) for name, value in SECURITY_HEADERS.items()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        request_id = request_context.request_id(headers.get(b"x-request-id", b""))
        request = request_context.RequestContext(request_id)
        is_head = scope["method"] == "HEAD"
        request.is_open_inference = OPEN_INFERENCE_PATH in f"{scope['path']}/"
        # HEAD is GET without its body, and a path may end in a slash.
        scope = {**scope, "path": scope["path"].removesuffix("/") or "/"}
        scope["method"] = "GET" if is_head else scope["method"]
        request_context.set_current(request)
        started = finished = False
        is_unread = b"content-length" in headers or b"transfer-encoding" in headers

        async def receive_with_metrics() -> Message:
            nonlocal is_unread
            message = await receive()
            if message["type"] == "http.request" and not message.get("more_body"):
                is_unread = False
                self._stages.observe_stage("read", request.seconds)
            return message

        async def send_with_headers(message: Message) -> None:
            nonlocal started, finished, is_unread
            if message["type"] == "http.response.start":
                started = True
                request.status = message["status"]
                if is_unread and request.status >= 400 and _is_small(headers):
                    is_unread = not await _read_rest(receive)
                route_headers = list(message.get("headers", ()))
                named = {name.lower() for name, _ in route_headers}  # the route's headers take precedence
                if parent := traceparent():
                    route_headers.append((b"traceparent", parent.encode()))
                message["headers"] = route_headers + [pair for pair in self._headers if pair[0] not in named]
                if scope.get("scheme") == "https":  # here, or at a trusted proxy
                    message["headers"].append(_HSTS)
                if is_unread and request.status >= 400:
                    message["headers"].append(_CLOSE)
            elif is_head and message["type"] == "http.response.body":
                message = {**message, "body": b""}
            await send(message)
            finished = message["type"] == "http.response.body" and not message.get("more_body", False)

        try:
            await self._app(scope, receive_with_metrics, send_with_headers)
        except ClientDisconnect:
            request.problem = "client_gone"
        except Exception as error:
            if started:
                _log.exception("request failed")
                raise
            await _refusal(error)(scope, receive, send_with_headers)
        finally:
            if started and not finished and request.problem is None:
                request.problem = "broken_off"  # its status was sent before it failed
            path = scope["path"]
            request.route = getattr(scope.get("route"), "path", path if path in _BEFORE_ROUTING else None)
            outcome = request.problem or ("ok" if finished else "broken_off")
            self._metrics.observe(request.route or "other", request.status, outcome, request.seconds)
            if self._audit is not None:
                self._audit.log_request()


def _is_small(headers: Mapping[bytes, bytes]) -> bool:
    """Whether the client sends a small body in any case, without waiting for `100 Continue`."""
    declared = headers.get(b"content-length", b"")
    return declared.isdigit() and int(declared) <= _SMALL_BYTES and b"expect" not in headers


async def _read_rest(receive: Receive) -> bool:
    """Read the rest of a body for a short time; return whether it ended."""
    with suppress(TimeoutError):
        async with asyncio.timeout(_SMALL_SECONDS):
            while (message := await receive())["type"] == "http.request":
                if not message.get("more_body"):
                    return True
    return False


def _refusal(error: Exception) -> Response:
    if isinstance(error, Refusal):  # from a middleware; FastAPI handles those of routes
        return refusal_response(error)
    _log.error("request failed", exc_info=error)
    return problem(500, "internal", "the server failed; its log has the reason")


def install(api: FastAPI, settings: Settings, load: Load, audit: AuditLog | None = None) -> Keys:
    """Add all middleware to `api`.

    Returns:
        The keys of `settings.keys` that requests need.

    Raises:
        UserError: The keys cannot be read.
    """
    keys = Keys(settings.keys)
    # The last one added is the outermost.
    api.add_middleware(BodyLimitMiddleware, load=load)
    api.add_middleware(AuthorizationMiddleware, settings=settings.keys, keys=keys)
    api.add_middleware(RequestMiddleware, audit=audit)
    return keys
