"""Authentication and authorization of requests by keys and their scopes. HAProxy limits the rates."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from cluster.haproxy import CLOSED_PATHS
from serving.auth.keys import Key, Keys, KeySettings
from serving.auth.network import client_network, host_name, is_loopback
from serving.auth.scopes import ALL_RIGHTS, BULK, GRADE, NAMES_OF_NEEDS, REVIEW, Need
from serving.http import request_context
from serving.http.problems import Refusal, forbidden

BULK_PATH = "/v1/bulk"
REVIEW_PATH = "/v1/review"
_NEEDS: tuple[tuple[str, Need], ...] = ((BULK_PATH, BULK), (REVIEW_PATH, REVIEW))


class AuthorizationMiddleware:
    """ASGI middleware: if there are keys, requests below `CLOSED_PATHS` need one with a scope."""

    def __init__(self, app: ASGIApp, settings: KeySettings, keys: Keys) -> None:
        self._app = app
        self._settings = settings
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and any(closed in scope["path"] for closed in CLOSED_PATHS):
            request = request_context.current()
            if key := self._authenticate(scope):
                request.key, request.rights = key.id, key.rights
            else:
                request.rights = ALL_RIGHTS
            # Routes that show images add their reads to the audit; attempts without the scope are added too.
            need = _needed_scope(scope)
            is_allowed = request.rights.allows(need)
            request.owes_audit = not is_allowed or scope["method"] not in ("GET", "HEAD")
            if not is_allowed:
                raise forbidden(NAMES_OF_NEEDS[need])
        await self._app(scope, receive, send)

    def _authenticate(self, scope: Scope) -> Key | None:
        """Return the valid key of a request; None if the endpoint has no keys.

        Raises:
            Refusal: The key is missing, wrong or expired; without keys as `_check_origin`.
        """
        if self._keys:
            given = dict(scope["headers"]).get(b"authorization", b"").decode("latin-1")
            key = self._keys.identify(given)
            if key is None or key.is_expired:
                raise _unauthorized(key, given)
            return key
        self._check_origin(scope)
        return None

    def _check_origin(self, scope: Scope) -> None:
        """Without keys: accept requests of this machine, but not from pages of other sites in its browser.

        After DNS rebinding, such a page sends the name of its own site as Host.

        Raises:
            Refusal: The client is another machine, the Host is not this machine's, or the Origin differs.
        """
        headers = {name: value.decode("latin-1").lower() for name, value in scope["headers"]}
        host, origin = headers.get(b"host", ""), headers.get(b"origin")
        if not self._settings.open_to_network_without_keys:
            if client_network(scope):
                raise Refusal(
                    403,
                    "not_open",
                    "this endpoint has no keys and accepts requests from its own machine only",
                )
            if not is_loopback(host_name(host)):
                raise Refusal(
                    403,
                    "wrong_host",
                    "this endpoint has no keys and accepts localhost, 127.0.0.1 and [::1] as Host only; "
                    "with a proxy that authenticates, start it with --allow-anonymous",
                )
        if origin is not None and scope["method"] != "GET" and origin.partition("://")[2] != host:
            raise Refusal(
                403, "cross_origin", "the page of another site may not send requests to this endpoint"
            )


def _needed_scope(scope: Scope) -> Need:
    path = scope["path"].removeprefix(scope.get("root_path", ""))
    below = f"{path}/"
    return next((need for start, need in _NEEDS if below.startswith(f"{start}/")), GRADE)


def _unauthorized(key: Key | None, given: str) -> Refusal:
    if key is not None:
        code, detail = "expired_key", f"the key was valid until {key.expires}; ask the operator for a new one"
    elif given:
        code, detail = "wrong_key", "the key is unknown; send the header Authorization: Bearer KEY"
    else:
        code, detail = "no_key", "the key is missing; send the header Authorization: Bearer KEY"
    return Refusal(401, code, detail, {"WWW-Authenticate": "Bearer"})
