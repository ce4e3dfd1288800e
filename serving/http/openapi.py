"""Complete FastAPI's `/openapi.json` with security, problems and headers."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from cluster.haproxy import CLOSED_PATHS, OPEN_INFERENCE_PATH
from serving.schemas.grading import EndLine, FailedLine, Problem
from serving.schemas.inference import InferRequest, OpenInferenceError

BATCH_SIZE = "X-Batch-Size"
PROBLEM_MEDIA_TYPE = "application/problem+json"

_TAGS = [
    {"name": "grade", "description": "Images of the request, graded online."},
    {"name": "bulk", "description": "Prefixes and archives in storage, graded as jobs."},
    {"name": "review", "description": "Referred images of a bulk run, answered by people."},
    {"name": "open inference", "description": "The Open Inference Protocol v2 of KServe and Triton."},
    {"name": "probes", "description": "Probes for load balancers and Kubernetes, without a key."},
]
_TEMPLATE = "#/components/schemas/{model}"
_BY_REFERENCE: tuple[tuple[type[BaseModel], str], ...] = (
    (Problem, "serialization"),
    (FailedLine, "serialization"),
    (EndLine, "serialization"),
    (OpenInferenceError, "serialization"),
    (InferRequest, "validation"),
)
# Statuses that routes do not declare: of HAProxy, the authorization and the limits.
_OF_ALL = (400, 429, 500, 503)
_WITH_A_KEY = (401, 403, 504)
_WITH_A_BODY = (408, 413)
_TEXT = {"schema": {"type": "string"}}
_REQUEST_ID = {"X-Request-ID": {"description": "id of the request, or a new id", **_TEXT}}
_WAIT = {"Retry-After": {"description": "seconds to wait", "schema": {"type": "integer", "minimum": 1}}}
_HEADERS = {401: {"WWW-Authenticate": {"description": "`Bearer`", **_TEXT}}, 429: _WAIT, 503: _WAIT}


def reference(model: type[BaseModel]) -> dict[str, str]:
    """`$ref` to the schema of a route, or of a model in `_BY_REFERENCE`."""
    return {"$ref": _TEMPLATE.format(model=model.__name__)}


def problem_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Responses of a route for problems with these statuses."""
    content = {PROBLEM_MEDIA_TYPE: {"schema": reference(Problem)}}
    return {status: {"description": HTTPStatus(status).phrase, "content": content} for status in statuses}


def _open_inference_errors() -> dict[str, Any]:
    """Contents of an error response of the Open Inference Protocol; HAProxy sends a problem with `error`."""
    kinds: dict[str, type[BaseModel]] = {"application/json": OpenInferenceError, PROBLEM_MEDIA_TYPE: Problem}
    return {kind: {"schema": reference(model)} for kind, model in kinds.items()}


def operation_id(route: APIRoute) -> str:
    """Operation id of a route: the name of its function, after the group bulk: `bulk_start`."""
    return f"bulk_{route.name}" if "bulk" in route.tags else route.name


def install(api: FastAPI, keys: bool) -> None:
    """Install a complete OpenAPI description in `api`.

    Args:
        keys: Whether requests below `CLOSED_PATHS` need a key.
    """

    def document() -> dict[str, Any]:
        if api.openapi_schema is None:
            schema = get_openapi(title=api.title, version=api.version, routes=api.routes, tags=_TAGS)
            api.openapi_schema = _complete(schema, keys)
        return api.openapi_schema

    api.openapi = document  # type: ignore[method-assign]


def _complete(schema: dict[str, Any], keys: bool) -> dict[str, Any]:
    components = schema["components"]
    components["schemas"] |= models_json_schema(_BY_REFERENCE, ref_template=_TEMPLATE)[1]["$defs"]  # type: ignore[arg-type]
    for unused in ("HTTPValidationError", "ValidationError"):  # FastAPI's refusals are problems here
        components["schemas"].pop(unused, None)
    if keys:
        key = {"type": "http", "scheme": "bearer", "description": "A key of `scalp keys new`."}
        components["securitySchemes"] = {"key": key}
    for path, operations in schema["paths"].items():
        is_closed = path.startswith(CLOSED_PATHS)
        for operation in operations.values():
            if keys and is_closed:
                operation["security"] = [{"key": []}]
            statuses = _OF_ALL + _WITH_A_KEY * is_closed + _WITH_A_BODY * ("requestBody" in operation)
            responses = operation["responses"]
            if "HTTPValidationError" in str(responses.get("422")):
                del responses["422"]
            responses = {
                str(status): found for status, found in problem_responses(*statuses).items()
            } | responses
            for status, response in responses.items():
                headers = _REQUEST_ID | _HEADERS.get(int(status), {})
                response["headers"] = headers | response.get("headers", {})
                if int(status) >= 400 and f"{path}/".startswith(OPEN_INFERENCE_PATH):
                    response["content"] = _open_inference_errors()
            operation["responses"] = dict(sorted(responses.items()))
    return schema
