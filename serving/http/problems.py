"""Error responses as `application/problem+json` (RFC 9457) with a stable `code`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from http import HTTPStatus

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.routing import Match, Route

from scalp_core.errors import ImageError
from serving.http import request_context
from serving.http.openapi import PROBLEM_MEDIA_TYPE as MEDIA_TYPE
from serving.schemas.grading import Problem

_UNPROCESSABLE = 422  # its name in http.HTTPStatus changed with Python 3.13
_STATUS_OF_IMAGE_CODE = {
    "too_many_bytes": 413,
    "not_an_image": 415,
    "unsupported_format": 415,
    "unsupported_mode": 415,
}
# Codes and details of the router's refusals.
_ROUTER = {
    404: ("not_found", "the path does not exist; /openapi.json lists the paths"),
    405: ("method_not_allowed", "the path does not allow this method; see the Allow header"),
}


class Refusal(HTTPException):
    """Exception that ends a request with a problem, also from inside the reading of a body."""

    def __init__(self, status: int, code: str, detail: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(status, detail, headers)
        self.code = code


def forbidden(scope: str) -> Refusal:
    """The refusal of a key without a scope; the message names the scope alone."""
    return Refusal(403, "forbidden", f"the key lacks the scope {scope}; ask the operator for it")


def refuse_image(error: ImageError) -> Refusal:
    """The refusal of an image that cannot be graded."""
    return Refusal(_STATUS_OF_IMAGE_CODE.get(error.code, _UNPROCESSABLE), error.code, error.message)


def problem(status: int, code: str, detail: str, headers: Mapping[str, str] | None = None) -> Response:
    """A problem response to the current request."""
    request = request_context.current()
    request.problem = code
    body = Problem(
        title=HTTPStatus(status).phrase,
        status=status,
        detail=detail,
        code=code,
        request_id=request.request_id,
    )
    return Response(body.model_dump_json(), status, headers, MEDIA_TYPE)


def refusal_response(error: HTTPException) -> Response:
    """Convert a refusal, or an exception of the router or the form parser, to a problem."""
    if isinstance(error, Refusal):
        code, detail = error.code, error.detail
    else:
        code, detail = _ROUTER.get(error.status_code, ("bad_request", error.detail))
    return problem(error.status_code, code, detail, error.headers)  # Allow, for a wrong method


def install(api: FastAPI, routes: Sequence[Route] = ()) -> None:
    """Install exception handlers: each refusal of `api`, the router and the form parser is a problem."""

    @api.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> Response:
        if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
            error.headers = {"Allow": _methods(request, routes)}
        return refusal_response(error)

    @api.exception_handler(RequestValidationError)
    async def _validation(_request: Request, error: RequestValidationError) -> Response:
        # Without FastAPI's message, which echoes the request.
        messages = "; ".join(f"{entry['loc'][-1]}: {entry['msg']}" for entry in error.errors())
        return problem(_UNPROCESSABLE, "bad_field", f"{messages}; /openapi.json describes the fields")


def _methods(request: Request, routes: Sequence[Route]) -> str:
    """Methods that the path allows, of all its routes; Starlette reports those of the first route only."""
    matching = [route for route in routes if route.matches(request.scope)[0] is not Match.NONE]
    allowed = {method for route in matching for method in route.methods or ()}
    return ", ".join(sorted(allowed | ({"HEAD"} if "GET" in allowed else set())))
