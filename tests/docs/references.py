"""Generate the references in docs/ from the code: `make docs`.

Each page in `PAGES` is generated as a whole, and names `make docs` in its head.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import typer
from fastapi import FastAPI
from pydantic import BaseModel
from ray.util.metrics import Metric
from typer.cli import get_docs_for_click

from jobs.cli.environment import EXIT_CODES, VARIABLES
from jobs.cli.main import app
from jobs.common.prometheus import GradeMetrics, TrainMetrics
from scalp_core.bundles.bundle import BundleSpec
from scalp_core.errors import IMAGE_CODES, IMAGE_FIXES
from scalp_core.inference.decision import REASONS
from scalp_core.models.recipe import Recipe
from scalp_core.results.schema import COLUMNS
from serving.api import batch, bulk, routes
from serving.http import openapi
from serving.http.problems import CODES, status_of_image
from serving.observability.metrics import GraderMetrics, ImageMetrics, RequestMetrics
from serving.settings import ModelSettings, Settings

ROOT = Path(__file__).resolve().parents[2]
_BOUNDS = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "to", "exclusiveMaximum": "below"}
_GENERATED = "`make docs` generates this page from the code."


# --- commands ----------------------------------------------------------------------------------------------


def commands() -> str:
    """Reference of all commands, without the hidden ones."""
    head = f"# Commands\n\nFor users of the command line. {_GENERATED}\n"
    head += "`scalp COMMAND --help` prints the same.\n\n"
    group = typer.main.get_command(app)
    _remove_hidden(group)
    index = [
        f"- [`scalp {name}`](#scalp-{name}): {command.help.splitlines()[0]}"
        for name, command in sorted(group.commands.items())
    ]
    page = get_docs_for_click(obj=group, ctx=typer.Context(group, info_name="scalp"), name="scalp")
    page = page[page.index("\n## ") :]
    page = re.sub(r"(?:^scalp [^\n]+\n+)+", _fence, page, flags=re.MULTILINE)
    page = re.sub(r"^Example: (scalp .+)$", r"Example: `\1`", page, flags=re.MULTILINE)
    return head + "\n".join(index) + "\n" + page


def _remove_hidden(group: Any) -> None:
    group.commands = {name: command for name, command in group.commands.items() if not command.hidden}
    for command in group.commands.values():
        if hasattr(command, "commands"):
            _remove_hidden(command)


def _fence(examples: re.Match[str]) -> str:
    return "```bash\n" + re.sub(r"\n+", "\n", examples[0]) + "```\n\n"


# --- settings and formats ----------------------------------------------------------------------------------


def settings() -> str:
    """Reference of the recipe and of the endpoint's settings."""
    return (
        f"""# Settings

For ML engineers and operators. {_GENERATED}
Training reads a recipe from `--recipe` and `--set`.
The endpoint reads its settings from `serving/config.yaml`, or from the file of `scalp serve --settings`.

## Recipe

Settings of `scalp train` and `scalp tune`.

{_model_tables(Recipe, "setting")}
## Endpoint

`args` of `serving/config.yaml`, and the file of `--settings`.

{_model_tables(Settings, "setting")}
## Model

`user_config` of the grader in `serving/config.yaml`: changes apply in place.

{_model_tables(ModelSettings, "setting")}""".rstrip()
        + "\n"
    )


def formats() -> str:
    """Reference of the result rows, their codes, and the bundle."""
    codes = [(f"`{code}`", _first_part(meaning), IMAGE_FIXES[code]) for code, meaning in IMAGE_CODES.items()]
    columns = [(f"`{name}`", _arrow_type(kind), text) for name, (kind, text) in COLUMNS.items()]
    return (
        f"""# Result rows and bundles

For people who read results or bundles with their own programs. {_GENERATED}

## Result rows

Columns of the Parquet files in `OUT/results` of `scalp grade`. The endpoint answers with the same fields as
JSON ([http.md](http.md)). [grading.md](grading.md) describes the run.

{_table(("column", "type", "content"), columns)}
## Error codes of images

`error_code` of a failed row, and `code` of a problem of the endpoint.

{_table(("code", "meaning", "action"), codes)}
## Reasons of referrals

Values of `refer_reasons` ([gates.md](gates.md#reasons-for-referral)).

{_table(("reason", "meaning"), ((f"`{name}`", text) for name, text in REASONS.items()))}
## Bundle

Fields of `bundle.json`, the contract of a bundle. Loading checks `schema_version` and the hash of each file
that is used. [model-card.md](model-card.md) describes the card that is written from it.

{_model_tables(BundleSpec, "field")}""".rstrip()
        + "\n"
    )


def _first_part(meaning: str) -> str:
    """Meaning of an image's code, without the advice that some have."""
    return meaning.split("; ")[0]


def _arrow_type(kind: Any) -> str:
    names = {"list<item: double>": "list of double", "list<item: int8>": "list of int8"}
    names |= {"list<item: string>": "list of string", "timestamp[ms, tz=UTC]": "timestamp, ms, UTC"}
    return names.get(str(kind), str(kind))


# --- HTTP --------------------------------------------------------------------------------------------------


def http() -> str:
    """Reference of the routes, their schemas, and every problem code."""
    api = FastAPI(title="scalp", version="1", generate_unique_id_function=openapi.operation_id)
    for group in (routes.router, batch.router, bulk.router):
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
        f"### {name}\n\n{schemas[name].get('description', '')}\n\n{_field_table(schemas[name], 'field')}"
        for name in names
    )
    codes = [
        (", ".join(map(str, code.statuses)), f"`{name}`", code.meaning, code.fix)
        for name, code in CODES.items()
    ]
    images = [
        (str(status_of_image(code)), f"`{code}`", _first_part(meaning), IMAGE_FIXES[code])
        for code, meaning in IMAGE_CODES.items()
        if code in _ONLINE
    ]
    columns = ("status", "code", "meaning", "action")
    return (
        f"""# HTTP interface

For developers who call the endpoint. {_GENERATED}
`/openapi.json` of an endpoint has the same for programs.
[serving.md](serving.md#how-to-call-the-endpoint) has examples.

Routes below `/v1/` need a key as `Authorization: Bearer KEY`, if the endpoint has keys. HEAD works wherever
GET does. Each answer has the header `X-Request-ID`; a client may set it.

## Routes

{sections}
## Problem codes

A refusal is `application/problem+json` with a stable `code`, one line in `detail`, and `request_id`. HAProxy
answers two requests in HTML without an id: 400 for a malformed or large head, 408 for a slow head.
`Retry-After` is the number of seconds to wait.

{_table(columns, codes)}
### Codes of images

An image that cannot be graded has one of these codes. In a batch it is `error_code` of the image's line.

{_table(columns, images)}
## Schemas

{tables}""".rstrip()
        + "\n"
    )


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
            _type(parameter["schema"]),
            f"`{json.dumps(parameter['schema']['default'])}`" if "default" in parameter["schema"] else "",
            parameter.get("description", ""),
        )
        for parameter in operation.get("parameters", ())
    ]
    if parameters:
        parts.append(_table(("parameter", "in", "type", "default", "meaning"), parameters))
    if body := operation.get("requestBody"):
        parts.append(f"Body: {', '.join(f'`{kind}`' for kind in body['content'])}.\n")
    answers, problems = [], []
    for status, response in operation["responses"].items():
        if openapi.PROBLEM_MEDIA_TYPE in response.get("content", {}):
            problems.append(status)
            continue
        kinds = response.get("content", {"no body": {}})
        answers.append(
            f"{status} with " + " or ".join(f"`{kind}`{_schema_links(kinds[kind])}" for kind in kinds)
        )
    parts.append(f"Answers: {'; '.join(answers)}. Problems: {', '.join(problems)}.\n")
    return "\n".join(parts)


def _schema_links(content: dict[str, Any]) -> str:
    names = dict.fromkeys(re.findall(r"#/components/schemas/(\w+)", json.dumps(content)))
    return f" ({', '.join(f'[{name}](#{name.lower()})' for name in names)})" if names else ""


# --- metrics, environment ----------------------------------------------------------------------------------


def metrics() -> str:
    """Reference of the Prometheus metrics."""
    parts = [
        ("Endpoint", "Labels of Ray: `application`, `deployment`, `replica`, `NodeAddress`.",
         (RequestMetrics(), ImageMetrics(), GraderMetrics())),
        ("Training", "The label `run` is the last path component of RUN. `scalp tune` exports no metrics.",
         (TrainMetrics("run", 1, 1),)),
        ("Bulk grading", "The label `run` is the last path component of OUT. Without Ray there are none.",
         (GradeMetrics("out", 1, 0),)),
    ]  # fmt: skip
    sections = "\n".join(
        f"## {heading}\n\n{text}\n\n"
        + _table(
            ("name", "type", "labels", "meaning"),
            (_metric_row(metric) for group in groups for metric in _metrics_of(group)),
        )
        for heading, text, groups in parts
    )
    return (
        f"""# Metrics

For operators. {_GENERATED}
Ray's agent on each node exports them in the Prometheus format. [serving.md](serving.md#metrics) and
[operations.md](operations.md#metrics-of-training-and-grading) describe how to read them.

{sections}""".rstrip()
        + "\n"
    )


def _metrics_of(group: Any) -> Iterator[Metric]:
    """Metrics that an object creates; a run's gauges may be keys of its values."""
    found = [*vars(group).values(), *getattr(group, "_values", ())]
    yield from dict.fromkeys(metric for metric in found if isinstance(metric, Metric))


def _metric_row(metric: Metric) -> tuple[str, ...]:
    kind = type(metric).__name__.lower()
    name = f"ray_{metric.info['name']}" + ("_total" if kind == "counter" else "")
    return (
        f"`{name}`",
        kind,
        ", ".join(f"`{key}`" for key in metric.info["tag_keys"]),
        metric.info["description"],
    )


def environment() -> str:
    """Reference of the environment variables and exit codes."""
    sections = "\n".join(
        f"### {program}\n\n"
        + _table(("variable", "meaning"), ((f"`{name}`", text) for name, text in names.items()))
        for program, names in VARIABLES.items()
    )
    return (
        f"""# Environment variables and exit codes

For operators, and for people who call `scalp` from programs. {_GENERATED}

## Environment variables

{sections}
## Exit codes

`scalp submit` and `scalp jobs logs` have the exit code of the job.

{_table(("code", "meaning"), ((str(code), text) for code, text in EXIT_CODES.items()))}""".rstrip()
        + "\n"
    )


# --- tables ------------------------------------------------------------------------------------------------


def _model_tables(model: type[BaseModel], heading: str) -> str:
    """Table of a model's fields, and one table per nested model, under the fields that have it."""
    schema = model.model_json_schema()
    definitions = schema.get("$defs", {})
    page = _field_table(schema, heading)
    for name, part in definitions.items():
        owners = ", ".join(
            f"`{field}`"
            for owner in (schema, *definitions.values())
            for field, value in owner.get("properties", {}).items()
            if f"/{name}'" in str(value)
        )
        page += f"\n### {owners}\n\n{_field_table(part, heading)}"
    return page


def _field_table(schema: dict[str, Any], heading: str) -> str:
    rows = []
    for name, field in schema["properties"].items():
        default = (
            f"`{json.dumps(field['default'], ensure_ascii=False)}`" if "default" in field else "required"
        )
        if "$ref" in field:
            default = "below"
        text = "always null" if _type(field) == "null" else field.get("description", "")
        rows.append((f"`{name}`", _type(field), default, text))
    return _table((heading, "type", "default", "meaning"), rows)


def _type(field: dict[str, Any]) -> str:
    """Type of a field with its bounds, such as `integer, from 1 to 512`."""
    if "anyOf" in field:
        return " or ".join(_type(kind) for kind in field["anyOf"])
    if "$ref" in field:
        return "fields"
    if "enum" in field or "const" in field:
        return " or ".join(f"`{value}`" for value in field.get("enum", [field.get("const")]))
    if field.get("type") == "array":
        kind = field.get("items") or field.get("prefixItems", [{}])[0]
        return f"list of {_type(kind)}" if kind else "list"
    if "format" in field:
        return {"date-time": "time"}.get(field["format"], field["format"])
    bounds = [f"{word} {field[key]}" for key, word in _BOUNDS.items() if key in field]
    return ", ".join(filter(None, [field.get("type", "any"), " ".join(bounds)]))


def _table(headings: tuple[str, ...], rows: Any) -> str:
    lines = [headings, ["---"] * len(headings), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


PAGES: dict[Path, Callable[[], str]] = {
    ROOT / f"docs/{page.__name__}.md": page
    for page in (commands, settings, http, formats, metrics, environment)
}

if __name__ == "__main__":
    for path, generate in PAGES.items():
        path.write_text(generate(), encoding="utf-8")
