"""What holds for every request: an id, safe headers, no traceback in an answer, a line in the access log."""

from __future__ import annotations

import logging

from fastapi import FastAPI, Response
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.admission.limits import BodyLimitMiddleware, Load
from serving.api.authorization import AuthorizationMiddleware
from serving.auth.keys import Keys
from serving.http import request_context
from serving.http.problems import Refusal, problem, refusal_response
from serving.http.streaming import BATCH_PATH
from serving.observability.audit import AuditLog
from serving.settings import Settings

HEADERS = {
    "Cache-Control": "no-store",  # answers are about people
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
# Requests that are refused before a route is looked for, as under load, are told by these.
_BEFORE_ROUTING = {path: path for path in ("/v1/grade", BATCH_PATH, "/v1/bulk")}

_log = logging.getLogger("ray.serve")
# Its lines go where Ray Serve's go, whatever the level there.
access_log = logging.getLogger("ray.serve.access")
access_log.setLevel(logging.INFO)


class RequestMiddleware:
    """ASGI middleware around the whole application.

    Args:
        app: the application.
        audit: where requests are told; without one, nowhere.
        access_log: whether there is a line for each.
    """

    def __init__(
        self,
        app: ASGIApp,
        audit: AuditLog | None = None,
        access_log: bool = False,
    ) -> None:
        self._app = app
        self._audit = audit
        self._access_log = access_log
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

        async def send_with_headers(message: Message) -> None:
            nonlocal started, finished
            if message["type"] == "http.response.start":
                started = True
                request.status = message["status"]
                own = list(message.get("headers", ()))
                named = {name.lower() for name, _ in own}  # a route knows better what its answer needs
                message["headers"] = own + [pair for pair in self._headers if pair[0] not in named]
                if scope.get("scheme") == "https":  # here, or at a proxy that uvicorn believes
                    message["headers"].append(_HSTS)
            elif message["type"] == "http.response.body":
                if is_head:
                    message = {**message, "body": b""}
                request.sent += len(message.get("body", b""))
            await send(message)
            finished = message["type"] == "http.response.body" and not message.get("more_body", False)

        try:
            await self._app(scope, receive, send_with_headers)
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
            request.route = getattr(scope.get("route"), "path", None) or _BEFORE_ROUTING.get(scope["path"])
            if self._audit is not None:
                self._audit.log_request()
            if self._access_log:
                _log_access(request)


def _refusal(error: Exception) -> Response:
    if isinstance(error, Refusal):  # of a middleware; those of routes were answered by FastAPI
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
    """Puts all middleware around `api`.

    Args:
        api: the application of one replica.
        settings: of the endpoint.
        load: where it is counted what the replica is busy with.
        audit: the log of `settings.audit`.

    Returns:
        The keys of `settings.keys`, to which requests are held.

    Raises:
        UserError: the keys cannot be read.
    """
    keys = Keys(settings.keys)
    # The last one added is the outermost.
    api.add_middleware(BodyLimitMiddleware, limits=settings.limits, load=load)
    api.add_middleware(AuthorizationMiddleware, settings=settings.keys, keys=keys)
    api.add_middleware(RequestMiddleware, audit=audit, access_log=settings.access_log)
    return keys
