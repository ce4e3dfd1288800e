"""Markdown tables of pydantic models and of rows, for the generated references."""

from __future__ import annotations

import json
from typing import Any

from pydantic import BaseModel

_BOUNDS = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "to", "exclusiveMaximum": "below"}
GENERATED = "`make docs` generates this page from the code."


def first_part(meaning: str) -> str:
    """Meaning of an image's code, without the advice that some have."""
    return meaning.split("; ")[0]


def model_tables(model: type[BaseModel], heading: str) -> str:
    """Table of a model's fields, and one table per nested model, under the fields that have it."""
    schema = model.model_json_schema()
    definitions = schema.get("$defs", {})
    page = field_table(schema, heading)
    for name, part in definitions.items():
        owners = ", ".join(
            f"`{field}`"
            for owner in (schema, *definitions.values())
            for field, value in owner.get("properties", {}).items()
            if f"/{name}'" in str(value)
        )
        page += f"\n### {owners}\n\n{field_table(part, heading)}"
    return page


def field_table(schema: dict[str, Any], heading: str) -> str:
    """Table of the fields of a JSON schema."""
    rows = []
    for name, field in schema["properties"].items():
        default = (
            f"`{json.dumps(field['default'], ensure_ascii=False)}`" if "default" in field else "required"
        )
        if "$ref" in field:
            default = "below"
        text = "always null" if type_text(field) == "null" else field.get("description", "")
        rows.append((f"`{name}`", type_text(field), default, text))
    return table((heading, "type", "default", "meaning"), rows)


def type_text(field: dict[str, Any]) -> str:
    """Type of a field with its bounds, such as `integer, from 1 to 512`."""
    if "anyOf" in field:
        return " or ".join(type_text(kind) for kind in field["anyOf"])
    if "$ref" in field:
        return "fields"
    if "enum" in field or "const" in field:
        return " or ".join(f"`{value}`" for value in field.get("enum", [field.get("const")]))
    if field.get("type") == "array":
        kind = field.get("items") or field.get("prefixItems", [{}])[0]
        return f"list of {type_text(kind)}" if kind else "list"
    if "format" in field:
        return {"date-time": "time"}.get(field["format"], field["format"])
    bounds = [f"{word} {_number(field[key])}" for key, word in _BOUNDS.items() if key in field]
    return ", ".join(filter(None, [field.get("type", "any"), " ".join(bounds)]))


def _number(value: float) -> float:
    return int(value) if value == int(value) else value  # pydantic writes 4.0 for an integer


def table(headings: tuple[str, ...], rows: Any) -> str:
    lines = [headings, ["---"] * len(headings), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
