"""Complete FastAPI's `/openapi.json` with security, problems and headers."""

from __future__ import annotations

from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

PROBLEM_MEDIA_TYPE = "application/problem+json"

TAGS = [
    {"name": "grade", "description": "Images of the request, graded online."},
    {"name": "bulk", "description": "Prefixes and archives in storage, graded as jobs."},
    {"name": "probes", "description": "Probes for load balancers and Kubernetes, without a key."},
]
_TEMPLATE = "#/components/schemas/{model}"
_SECURITY = "key"
# Statuses that routes do not declare: of HAProxy, the connection, the authorization and the limits.
_OF_ALL = (400, 429, 431, 500, 503)
_WITH_A_KEY = (401, 403, 504)
_WITH_A_BODY = (408, 413)
_TEXT = {"schema": {"type": "string"}}
_HEADERS = {
    "X-Request-ID": {"description": "id of the request, or a new id", **_TEXT},
    "Retry-After": {"description": "seconds to wait", "schema": {"type": "integer", "minimum": 1}},
    "WWW-Authenticate": {"description": "`Bearer`", **_TEXT},
}
_OF_STATUS = {401: "WWW-Authenticate", 429: "Retry-After", 503: "Retry-After"}


def reference(model: type[BaseModel]) -> dict[str, str]:
    """`$ref` to the schema of a model; pass the model to `install`."""
    return {"$ref": _TEMPLATE.format(model=model.__name__)}


def operation_id(route: APIRoute) -> str:
    """Operation id of a route: the name of its function, after the group bulk: `bulk_start`."""
    group = str(route.tags[0]) if route.tags else ""
    return f"bulk_{route.name}" if group == "bulk" else route.name


def install(api: FastAPI, problem: type[BaseModel], models: Sequence[type[BaseModel]], keys: bool) -> None:
    """Install a complete OpenAPI description in `api`.

    Args:
        problem: Schema of refusals.
        models: Further schemas that routes use by `reference`.
        keys: Whether requests below `/v1/` need a key.
    """

    def document() -> dict[str, Any]:
        if api.openapi_schema is None:
            schema = get_openapi(title=api.title, version=api.version, routes=api.routes, tags=TAGS)
            _complete(schema, problem, models, keys)
            api.openapi_schema = schema
        return api.openapi_schema

    api.openapi = document  # type: ignore[method-assign]


def _complete(
    schema: dict[str, Any], problem: type[BaseModel], models: Sequence[type[BaseModel]], keys: bool
) -> None:
    components = schema.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    _, definitions = models_json_schema(
        [(model, "serialization") for model in (problem, *models)], ref_template=_TEMPLATE
    )
    schemas |= definitions["$defs"]
    for unused in ("HTTPValidationError", "ValidationError"):  # FastAPI's refusals are problems here
        schemas.pop(unused, None)
    if keys:
        components["securitySchemes"] = {
            _SECURITY: {"type": "http", "scheme": "bearer", "description": "A key of `scalp keys new`."}
        }
    for path, operations in schema["paths"].items():
        for operation in operations.values():
            _complete_operation(operation, path.startswith("/v1/"), keys, reference(problem))


def _complete_operation(
    operation: dict[str, Any], is_closed: bool, keys: bool, problem: dict[str, str]
) -> None:
    if keys and is_closed:
        operation["security"] = [{_SECURITY: []}]
    responses = operation["responses"]
    if "HTTPValidationError" in str(responses.get("422")):
        del responses["422"]
    statuses = _OF_ALL + (_WITH_A_KEY if is_closed else ())
    statuses += _WITH_A_BODY if "requestBody" in operation else ()
    for status in statuses:
        content = {PROBLEM_MEDIA_TYPE: {"schema": problem}}
        responses.setdefault(str(status), {"description": HTTPStatus(status).phrase, "content": content})
    for status, response in responses.items():
        names = ["X-Request-ID", *([_OF_STATUS[int(status)]] if int(status) in _OF_STATUS else [])]
        response["headers"] = {name: _HEADERS[name] for name in names} | response.get("headers", {})
    operation["responses"] = dict(sorted(responses.items()))
