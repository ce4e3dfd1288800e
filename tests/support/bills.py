"""Validate bills of materials against the schema of CycloneDX 1.6."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import cyclonedx.schema
import jsonschema_rs

_SCHEMAS = Path(cyclonedx.schema.__file__).parent / "_res"
_REFERENCED = ("cryptography-defs", "jsf-0.82", "spdx")


def errors(bill: Any) -> list[str]:
    """Errors of a bill, also of formats such as IRIs and in fields that the schema does not name."""
    return [error.message for error in _validator().iter_errors(bill)]


@cache
def _validator() -> jsonschema_rs.Draft7Validator:
    registry = jsonschema_rs.Registry(
        [(f"http://cyclonedx.org/schema/{name}.SNAPSHOT.schema.json", _schema(name)) for name in _REFERENCED]
    )
    return jsonschema_rs.Draft7Validator(_schema("bom-1.6"), validate_formats=True, registry=registry)


def _schema(name: str) -> Any:
    return json.loads((_SCHEMAS / f"{name}.SNAPSHOT.schema.json").read_text(encoding="utf-8"))
