"""The web application of a review: its page, the images of the queue, and the answers of the reader.

Page and paths are those of the endpoint (`serving/api/review.py`).

The page shows images of people, so each request needs the token that the command prints. The browser gets it
as a cookie: other users of the machine, pages of other sites and DNS rebinding do not have it.
"""

from __future__ import annotations

import json
import secrets
from importlib import resources
from importlib.resources.abc import Traversable
from typing import TypeVar

from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from scalp_core.errors import ImageError, UserError
from scalp_core.labels.log import Answer
from scalp_core.review.neighbors import show_neighbors
from scalp_core.review.pictures import read_jpeg
from scalp_core.review.session import Session
from serving.http.headers import SECURITY_HEADERS

_MAX_BODY = 64 * 2**10
_TYPES = {".css": "text/css", ".js": "text/javascript"}

T = TypeVar("T")

_ADDRESS_NEEDED = "This review needs the address that `scalp review` printed, with its token.\n"


class RequestError(Exception):
    """A request that is answered with a problem: status, stable code, and one line for a person."""

    def __init__(self, status: int, code: str, detail: str) -> None:
        super().__init__(detail)
        self.status, self.code, self.detail = status, code, detail


def create_app(session: Session, token: str, port: int) -> Starlette:
    """Create the ASGI application of a review.

    Args:
        session: The reader's review.
        token: Secret that a request must have, as `?token=` of the page or as cookie.
        port: Port of the server, which distinguishes the cookies of several reviews on one machine.
    """
    web = resources.files("serving").joinpath("web")  # the endpoint has the same page
    folders = (web, web.joinpath("review"))
    files = {file.name: file for folder in folders for file in folder.iterdir() if _type_of(file)}

    async def page(_: Request) -> Response:
        return Response(web.joinpath("review", "review.html").read_bytes(), media_type="text/html")

    async def file(request: Request) -> Response:
        name = request.path_params["name"]
        if name not in files:  # a fixed list, so that a requested name never becomes a path
            raise HTTPException(404)
        return Response(files[name].read_bytes(), media_type=_type_of(files[name]))

    def describe(_: Request) -> Response:
        return JSONResponse(session.describe())

    def image(request: Request) -> Response:
        return JSONResponse(session.image(_known(session, request)))

    def picture(request: Request) -> Response:
        try:
            jpeg = read_jpeg(session.location(_known(session, request)))
        except ImageError as error:
            raise RequestError(422, error.code, error.message) from None
        return Response(jpeg, media_type="image/jpeg")

    async def reveal(request: Request) -> Response:
        image_id = _known(session, request)
        _check_json(request)
        try:
            await run_in_threadpool(session.reveal, image_id)
        except UserError as error:
            raise RequestError(503, "not_saved", str(error)) from None
        return JSONResponse({"saw_model": True})

    def heatmap(request: Request) -> Response:
        try:
            png = session.heatmap(_known(session, request))
        except ImageError as error:
            raise RequestError(422, error.code, error.message) from None
        return Response(_shown(png), media_type="image/png")

    def neighbors(request: Request) -> Response:
        alike = _shown(session.neighbors(_known(session, request)))
        return JSONResponse({"neighbors": show_neighbors(alike)})

    async def answer(request: Request) -> Response:
        image_id, given = _known(session, request), await _read_answer(request)
        try:
            return JSONResponse(await run_in_threadpool(session.answer, image_id, given))
        except UserError as error:
            raise RequestError(503, "not_saved", str(error)) from None

    routes = [
        Route("/", page),
        Route("/page/{name}", file),
        Route("/v1/review", describe),
        Route("/v1/review/images/{image_id}", image),
        Route("/v1/review/images/{image_id}/picture", picture),
        Route("/v1/review/images/{image_id}/answer", answer, methods=["POST"]),
        Route("/v1/review/images/{image_id}/reveal", reveal, methods=["POST"]),
        Route("/v1/review/images/{image_id}/heatmap", heatmap),
        Route("/v1/review/images/{image_id}/neighbors", neighbors),
    ]
    return Starlette(
        routes=routes,
        middleware=[Middleware(AccessMiddleware, token=token, cookie=f"scalp-review-{port}")],
        exception_handlers={RequestError: _refuse},
    )


class AccessMiddleware:
    """ASGI middleware: refuse requests without the token, and add security headers to all responses."""

    def __init__(self, app: ASGIApp, token: str, cookie: str) -> None:
        self._app = app
        self._token = token
        self._cookie = cookie
        self._headers = [(name.lower().encode(), value.encode()) for name, value in SECURITY_HEADERS.items()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *self._headers]
            await send(message)

        await self._select(Request(scope))(scope, receive, send_with_headers)

    def _select(self, request: Request) -> ASGIApp:
        if request.url.path == "/" and "token" in request.query_params:
            if not self._is_token(request.query_params["token"]):
                return PlainTextResponse(_ADDRESS_NEEDED, 403)
            response = RedirectResponse("/", 303)  # the token leaves the address bar
            # Lax, not strict: the address may be opened from a page of another site, such as a web terminal.
            response.set_cookie(self._cookie, self._token, httponly=True, samesite="lax")
            return response
        if self._is_token(request.cookies.get(self._cookie, "")):
            return self._app
        if request.url.path == "/":
            return PlainTextResponse(_ADDRESS_NEEDED, 403)
        return _problem(403, "wrong_token", _ADDRESS_NEEDED.strip())

    def _is_token(self, given: str) -> bool:
        return secrets.compare_digest(given.encode(), self._token.encode())


def _type_of(file: Traversable) -> str | None:
    return _TYPES.get("." + file.name.rpartition(".")[2])


def _known(session: Session, request: Request) -> str:
    image_id: str = request.path_params["image_id"]
    if image_id not in session:
        raise RequestError(404, "unknown_image", "the image is not in this queue; reload the page")
    return image_id


def _shown(content: T | None) -> T:
    if content is None:
        raise RequestError(409, "not_revealed", "the reader has not asked for the model's view of this image")
    return content


def _check_json(request: Request) -> None:
    # A page of another port of this machine has the cookie, but it cannot send JSON without permission.
    if request.headers.get("content-type") != "application/json":
        raise RequestError(415, "invalid_answer", "the request is not application/json")


async def _read_answer(request: Request) -> Answer:
    _check_json(request)
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > _MAX_BODY:
            raise RequestError(413, "invalid_answer", f"the answer has more than {_MAX_BODY:,} bytes")
    try:
        return Answer.model_validate(json.loads(body))
    except ValidationError as error:
        message = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise RequestError(422, "invalid_answer", f"invalid answer: {message}") from None
    except ValueError:
        raise RequestError(422, "invalid_answer", "the answer is not JSON") from None


async def _refuse(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)  # noqa: S101 -- for the type
    return _problem(error.status, error.code, error.detail)


def _problem(status: int, code: str, detail: str) -> Response:
    content = {"status": status, "code": code, "detail": detail}
    return JSONResponse(content, status, media_type="application/problem+json")
