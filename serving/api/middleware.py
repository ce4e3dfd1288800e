"""Middleware of all requests: request id, security headers, error responses, logs and metrics."""

from __future__ import annotations

import logging

from fastapi import FastAPI, Response
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.admission.limits import BodyLimitMiddleware, Load
from serving.api.authorization import AuthorizationMiddleware
from serving.auth.keys import Keys
from serving.http import request_context
from serving.http.connections import BATCH_PATH
from serving.http.problems import Refusal, problem, refusal_response
from serving.observability.audit import AuditLog
from serving.observability.metrics import ImageMetrics, RequestMetrics
from serving.settings import Settings

HEADERS = {
    "Cache-Control": "no-store",  # responses are about people
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src 'self' blob: data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": (
        "camera=(self), display-capture=(), geolocation=(), microphone=(), payment=(), usb=()"
    ),
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
_HSTS = (b"strict-transport-security", b"max-age=31536000")
_REQUEST_ID = b"x-request-id"
# Routes in the log for requests that are refused before routing, for example under overload.
_BEFORE_ROUTING = ("/v1/grade", BATCH_PATH, "/v1/bulk")

_log = logging.getLogger("ray.serve")
# A child of Ray Serve's logger with its own level.
access_log = logging.getLogger("ray.serve.access")
access_log.setLevel(logging.INFO)


class RequestMiddleware:
    """ASGI middleware around the whole application."""

    def __init__(
        self,
        app: ASGIApp,
        audit: AuditLog | None = None,
        access_log: bool = False,
    ) -> None:
        self._app = app
        self._audit = audit
        self._access_log = access_log
        self._metrics, self._stages = RequestMetrics(), ImageMetrics()
        self._headers = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(_REQUEST_ID, b"")
        request = request_context.RequestContext(request_context.request_id(given), scope["method"])
        is_head = scope["method"] == "HEAD"
        # HEAD is GET without its body, and a path may end in a slash.
        scope = {**scope, "path": scope["path"].removesuffix("/") or "/"}
        scope["method"] = "GET" if is_head else scope["method"]
        request_context.set_current(request)
        started = finished = False

        async def receive_with_metrics() -> Message:
            message = await receive()
            if message["type"] == "http.request" and not message.get("more_body"):
                self._stages.observe_stage("read", request.seconds)
            return message

        async def send_with_headers(message: Message) -> None:
            nonlocal started, finished
            if message["type"] == "http.response.start":
                started = True
                request.status = message["status"]
                route_headers = list(message.get("headers", ()))
                named = {name.lower() for name, _ in route_headers}  # the route's headers take precedence
                message["headers"] = route_headers + [pair for pair in self._headers if pair[0] not in named]
                if scope.get("scheme") == "https":  # here, or at a trusted proxy
                    message["headers"].append(_HSTS)
            elif message["type"] == "http.response.body":
                if is_head:
                    message = {**message, "body": b""}
                request.sent += len(message.get("body", b""))
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
            answer = _refusal(error)
            await answer(scope, receive, send_with_headers)
        finally:
            if started and not finished and request.problem is None:
                request.problem = "broken_off"  # its status was sent before it failed
            path = scope["path"]
            request.route = getattr(scope.get("route"), "path", path if path in _BEFORE_ROUTING else None)
            outcome = request.problem or ("ok" if finished else "broken_off")
            self._metrics.observe(request.route or "other", request.status, outcome, request.seconds)
            if self._audit is not None:
                self._audit.log_request()
            if self._access_log:
                _log_access(request)


def _refusal(error: Exception) -> Response:
    if isinstance(error, Refusal):  # from a middleware; FastAPI handles those of routes
        return refusal_response(error)
    _log.error("request failed", exc_info=error)
    return problem(500, "internal", "the server failed; its log has the reason")


def _log_access(request: request_context.RequestContext) -> None:
    ms = request.ms
    line = "%s %s %d %.1f ms"
    fields = {
        "method": request.method,
        "route": request.route,
        "status": request.status,
        "ms": ms,
        "bytes": request.sent,
        "key": request.key,
        "problem": request.problem,
        "request_id": request.request_id,
    }
    access_log.info(line, request.method, request.route, request.status, ms, extra=fields)


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
    api.add_middleware(RequestMiddleware, audit=audit, access_log=settings.access_log)
    return keys
