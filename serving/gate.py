"""Who is let in: the key of a request, and how often its owner may ask."""

from __future__ import annotations

import math
import time

from starlette.types import ASGIApp, Receive, Scope, Send

from serving import visit
from serving.keys import Keys, KeySettings
from serving.network import client_network, is_here
from serving.problems import Refusal
from serving.rates import Buckets

CLOSED = "/v1/"  # a path with it, at whatever prefix, asks for a key; the page and the probes do not


class Gate:
    """ASGI middleware: requests below `/v1/` need a key when there are keys, and none may ask too often.

    Args:
        app: what it protects.
        settings: who may ask, and how often.
        keys: of `settings`.
    """

    def __init__(self, app: ASGIApp, settings: KeySettings, keys: Keys) -> None:
        self._app = app
        self._settings = settings
        self._keys = keys
        self._by_key = Buckets(settings.per_minute, settings.burst)
        self._by_address = (
            Buckets(settings.anonymous_per_minute, settings.anonymous_burst)
            if settings.anonymous_per_minute
            else None
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and CLOSED in scope["path"]:
            request = visit.current()
            request.key = self._admit(scope)
            request.owes_audit = scope["method"] != "GET"
        await self._app(scope, receive, send)

    def _admit(self, scope: Scope) -> str | None:
        given = dict(scope["headers"]).get(b"authorization", b"").decode("latin-1")
        if self._keys:
            id_ = self._keys.identify(given)
            if id_ is not None:
                _wait(self._by_key.take(id_, time.monotonic()))
                return id_
        elif not self._settings.open_to_network_without_keys and not is_here(_address(scope)):
            raise Refusal(
                403, "not_open", "this endpoint has no keys, and so it answers its own machine alone"
            )
        if self._by_address is not None:
            _wait(self._by_address.take(client_network(_address(scope)), time.monotonic()))
        if self._keys:
            code, detail = ("wrong_key", "no such key") if given else ("no_key", "send a key")
            raise Refusal(
                401,
                code,
                f"{detail}; the header is Authorization: Bearer KEY",
                {"WWW-Authenticate": "Bearer"},
            )
        return None


def _wait(seconds: float) -> None:
    if seconds:
        whole = math.ceil(seconds)
        raise Refusal(
            429, "too_many_requests", f"too many requests; wait {whole} s", {"Retry-After": str(whole)}
        )


def _address(scope: Scope) -> str:
    """Of the client, as uvicorn knows it; "" on a socket of this machine's.

    uvicorn believes the header X-Forwarded-For of 127.0.0.1, and of what FORWARDED_ALLOW_IPS names.
    """
    client = scope.get("client")
    return client[0] if client else ""
