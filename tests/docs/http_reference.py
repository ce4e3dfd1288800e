"""Generate docs/http.md from the routes of the endpoint, their schemas, and the problem codes."""

from __future__ import annotations

import json
import re
from typing import Any

from fastapi import FastAPI

from scalp_core.errors import IMAGE_CODES, IMAGE_FIXES
from serving.api.routes import ROUTERS
from serving.http import openapi
from serving.http.problems import CODES, status_of_image
from tests.docs.tables import GENERATED, field_table, first_part, table, type_text


def http() -> str:
    """Reference of the routes, their schemas, and every problem code."""
    api = FastAPI(title="scalp", version="1", generate_unique_id_function=openapi.operation_id)
    for group in ROUTERS:
        api.include_router(group)
    openapi.install(api, keys=True)
    document = api.openapi()
    schemas = document["components"]["schemas"]
    sections = "\n".join(
        _route(method, path, operation)
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
    )
    names = [name for name in schemas if "properties" in schemas[name]]
    tables = "\n".join(
        f"### {name}\n\n{schemas[name].get('description', '')}\n\n{field_table(schemas[name], 'field')}"
        for name in names
    )
    codes = [
        (", ".join(map(str, code.statuses)), f"`{name}`", code.meaning, code.fix)
        for name, code in CODES.items()
    ]
    images = [
        (str(status_of_image(code)), f"`{code}`", first_part(meaning), IMAGE_FIXES[code])
        for code, meaning in IMAGE_CODES.items()
        if code in _ONLINE
    ]
    columns = ("status", "code", "meaning", "action")
    return f"""# HTTP interface

For developers who call the endpoint. {GENERATED}
`/openapi.json` of an endpoint has the same for programs.
[serving.md](serving.md#how-to-call-the-endpoint) has examples.

Routes below `/v1/` and `/v2/models/` need a key as `Authorization: Bearer KEY`, if the endpoint has keys.
HEAD works wherever GET does. Each answer has the header `X-Request-ID`; a client may set it.

## Routes

{sections}
## Problem codes

A refusal is `application/problem+json` with a stable `code`, one line in `detail`, and `request_id`. HAProxy
answers two requests in HTML without an id: 400 for a malformed or large head, 408 for a slow head.
`Retry-After` is the number of seconds to wait. Routes below `/v2` answer `{{"error": "…"}}` with the same
statuses, as the Open Inference Protocol wants, and with the code in `X-Problem-Code`; HAProxy answers with
a problem that has `error` too. [serving.md](serving.md#grpc) has the statuses of gRPC.

{table(columns, codes)}
### Codes of images

An image that cannot be graded has one of these codes. In a batch it is `error_code` of the image's line.

{table(columns, images)}
## Schemas

{tables}"""


# Codes that the bytes of a request can have; the others are about storage.
_ONLINE = {
    "empty", "too_many_bytes", "not_an_image", "unsupported_format", "unsupported_mode", "too_many_pixels",
    "too_many_scans", "truncated", "corrupt", "nested_archive", "bad_name", "changed", "internal_error",
}  # fmt: skip


def _route(method: str, path: str, operation: dict[str, Any]) -> str:
    """Section of one route."""
    parts = [f"### `{method.upper()} {path}`\n", operation["description"], ""]
    parameters = [
        (
            f"`{parameter['name']}`",
            parameter["in"],
            type_text(parameter["schema"]),
            f"`{json.dumps(parameter['schema']['default'])}`" if "default" in parameter["schema"] else "",
            parameter.get("description", ""),
        )
        for parameter in operation.get("parameters", ())
    ]
    if parameters:
        parts.append(table(("parameter", "in", "type", "default", "meaning"), parameters))
    if body := operation.get("requestBody"):
        parts.append(f"Body: {', '.join(f'`{kind}`' for kind in body['content'])}.\n")
    answers, problems = [], []
    for number, response in operation["responses"].items():
        if int(number) >= 400:
            problems.append(number)
            continue
        kinds = response.get("content", {"no body": {}})
        answers.append(
            f"{number} with " + " or ".join(f"`{kind}`{_schema_links(kinds[kind])}" for kind in kinds)
        )
    parts.append(f"Answers: {'; '.join(answers)}. Problems: {', '.join(problems)}.\n")
    return "\n".join(parts)


def _schema_links(content: dict[str, Any]) -> str:
    names = dict.fromkeys(re.findall(r"#/components/schemas/(\w+)", json.dumps(content)))
    return f" ({', '.join(f'[{name}](#{name.lower()})' for name in names)})" if names else ""
