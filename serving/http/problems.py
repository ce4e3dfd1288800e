"""Error responses as `application/problem+json` (RFC 9457) with a stable `code`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import NamedTuple

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.routing import Match, Route

from scalp_core.errors import ImageError
from serving.http import request_context
from serving.http.openapi import PROBLEM_MEDIA_TYPE as MEDIA_TYPE
from serving.schemas.grading import Problem
from serving.schemas.inference import OpenInferenceError

PROBLEM_CODE = "X-Problem-Code"
"""Header of an error of the Open Inference Protocol, whose body has no code."""

_UNPROCESSABLE = 422  # its name in http.HTTPStatus changed with Python 3.13
_STATUS_OF_IMAGE_CODE = {
    "too_many_bytes": 413,
    "not_an_image": 415,
    "unsupported_format": 415,
    "unsupported_mode": 415,
}


class Code(NamedTuple):
    """Meaning of a problem code. Clients read the codes, so they stay as they are."""

    statuses: tuple[int, ...]
    meaning: str
    fix: str


_KEY = "send a valid key as the header `Authorization: Bearer KEY`; the operator has keys"
_LATER = "send it again after the seconds of `Retry-After`"
_SOON = "try again in a few seconds"
_DIVIDE = "divide the batch, or grade it by `POST /v1/bulk`"

CODES = {
    "bad_form": Code((400,), "the form cannot be read", "send `multipart/form-data` as browsers and curl do"),
    "bad_request": Code((400,), "the request is not valid HTTP or JSON", "correct the request"),
    "bad_inference_request": Code(
        (400,),
        "the request does not follow the Open Inference Protocol, or does not fit the model",
        "see `GET /v2/models/scalp`",
    ),
    "no_key": Code((401,), "the request has no key", _KEY),
    "wrong_key": Code((401,), "the key is unknown", _KEY),
    "expired_key": Code((401,), "the key has expired", "ask the operator for a new key"),
    "forbidden": Code(
        (403,), "the key lacks a scope, which `detail` names", "ask the operator for the scope"
    ),
    "not_open": Code(
        (403,),
        "the endpoint has no keys, and accepts only requests from the same machine",
        "as operator, start it with `--keys FILE`",
    ),
    "wrong_host": Code(
        (403,),
        "the endpoint has no keys, and the Host is not a name of the same machine",
        "use `http://localhost`; as operator behind a proxy that authenticates, use `--allow-anonymous`",
    ),
    "cross_origin": Code(
        (403,),
        "the page of another site sent the request",
        "send it from a program or from the endpoint's page",
    ),
    "source_not_allowed": Code(
        (403,),
        "the source of a bulk run is not below an allowed prefix",
        "use a prefix of `--bulk-source` and of the key's scope `bulk:PREFIX`",
    ),
    "not_found": Code((404,), "the path does not exist", "see `/openapi.json`"),
    "unknown_model": Code((404,), "the path names another model or version", "see `GET /v2/models/scalp`"),
    "bulk_not_offered": Code(
        (404,), "bulk runs are turned off", "as operator, set `--bulk-source` and `--bulk-out`"
    ),
    "review_not_offered": Code(
        (404,), "no review is turned on", "as operator, set `--review` and `--review-labels`"
    ),
    "unknown_image": Code((404,), "the image is not in the caller's review", "open `GET /v1/review` again"),
    "no_such_job": Code((404,), "no run has this id, or another key owns it", "use an id of `GET /v1/bulk`"),
    "no_report_yet": Code((404,), "the report is written at the end of the run", "wait for `succeeded`"),
    "no_results_yet": Code((404,), "the rows are written at the end of the run", "wait for `succeeded`"),
    "method_not_allowed": Code((405,), "the path does not allow the method", "use one of the header `Allow`"),
    "slow_body": Code((408,), "the body came too slowly", "send it faster, or in smaller parts"),
    "bundle_changed": Code(
        (409,),
        "the files of the bundle differ from the loaded model",
        "as operator, deploy the bundle again, then send the request again",
    ),
    "not_revealed": Code(
        (409,),
        "the reader has not asked for the model's view of the image, or none is offered",
        "send `POST …/reveal` first; as operator, set `review.bundle`",
    ),
    "too_many_bytes": Code((413,), "the body is larger than the limit", _DIVIDE),
    "too_many_pixels": Code((413,), "the images of a batch have too many pixels together", _DIVIDE),
    "too_many_photographs": Code((413,), "the batch has too many images", _DIVIDE),
    "unsupported_body": Code(
        (415,), "the Content-Type of the body is not supported", "use one of those in `detail`"
    ),
    "no_file": Code((422,), "the request has no image", "send it as the field `file`, or as the body"),
    "several_files": Code((422,), "the request has several images", "use `/v1/grade/batch`"),
    "mixed_batch": Code((422,), "the form has images and an archive", "send one of the two"),
    "bad_archive": Code((422,), "the archive cannot be read", "send a whole zip, tar or tar.gz"),
    "bad_field": Code((422,), "a field or parameter is invalid", "see `detail` and `/openapi.json`"),
    "bad_cursor": Code((422,), "the cursor does not belong to these rows", "use `next` of a page"),
    "no_heatmap": Code((422,), "the architecture of the model has no heatmaps", "omit `heatmap`"),
    "no_store": Code((422,), "the endpoint keeps no images", "omit `keep`; as operator, set `--store`"),
    "too_many_requests": Code((429,), "the key or address sent too many requests", _LATER),
    "pixel_budget": Code((429,), "the key used up its megapixels per minute", _LATER),
    "too_many_jobs": Code((429,), "too many bulk runs are active", _LATER),
    "internal": Code(
        (500,), "an unexpected error; the log has its reason", "report it with the `request_id`"
    ),
    "bad_gateway": Code((502,), "the replica ended before its answer did", _SOON),
    "overloaded": Code((503,), "too many requests wait", _LATER),
    "not_ready": Code((503,), "no model answers yet", _SOON),
    "model_changes": Code((503,), "the model is being replaced", _SOON),
    "model_unavailable": Code((503,), "no model answered the request of a bulk run", _LATER),
    "jobs_unavailable": Code((503,), "Ray's Job API does not answer", "try again later"),
    "storage_unavailable": Code(
        (503,),
        "the storage of a bulk run failed, as `detail` says, or that of the review",
        "send the request again later; as operator, see the log",
    ),
    "too_slow": Code((504,), "no answer in time", "try again; as operator, look at the load"),
}
"""Problems of requests. An image that cannot be graded has a code of `IMAGE_CODES`."""

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
    return Refusal(status_of_image(error.code), error.code, error.message)


def status_of_image(code: str) -> int:
    """HTTP status for an image that cannot be graded."""
    return _STATUS_OF_IMAGE_CODE.get(code, _UNPROCESSABLE)


def problem(status: int, code: str, detail: str, headers: Mapping[str, str] | None = None) -> Response:
    """A problem response to the current request, in the form of its protocol."""
    request = request_context.current()
    request.problem = code
    if request.is_open_inference:
        error = OpenInferenceError(error=detail).model_dump_json()
        return Response(error, status, {**(headers or {}), PROBLEM_CODE: code}, "application/json")
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
