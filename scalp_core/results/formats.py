"""Export formats of result rows: JSON lines, and CSV for spreadsheets."""

from __future__ import annotations

import json
from datetime import date
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

# An archive member may be named =HYPERLINK(...), which a spreadsheet would execute; a quote prevents it.
_FORMULA = r"\A([=+\-@＝＋－＠\t\r\n])"


def json_lines(batch: pa.RecordBatch) -> bytes:
    """Serialize one line of JSON per row; times in ISO 8601."""
    return "".join(f"{json_text(row)}\n" for row in batch.to_pylist()).encode()


def json_text(value: Any) -> str:
    """Serialize a value as JSON; times in ISO 8601, other unsupported types as text."""
    return json.dumps(value, ensure_ascii=False, default=_plain)


def _plain(value: Any) -> str:
    return value.isoformat() if isinstance(value, date) else str(value)


def flat_schema(schema: pa.Schema) -> pa.Schema:
    """Convert a schema for CSV: lists and structs become text."""
    return pa.schema([(field.name, pa.string() if _is_text(field.type) else field.type) for field in schema])


def flat_batch(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Convert rows for CSV: lists become `a;b;c`, structs JSON; text that looks like a formula is quoted."""
    columns = [_flat(column) for column in batch.columns]
    return pa.record_batch(columns, schema=flat_schema(batch.schema))


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_struct(kind) or pa.types.is_string(kind)


def _flat(column: pa.Array) -> pa.Array:
    if pa.types.is_list(column.type):
        column = pc.binary_join(column.cast(pa.list_(pa.string())), ";")
    if pa.types.is_struct(column.type):
        texts = [None if value is None else json_text(value) for value in column.to_pylist()]
        column = pa.array(texts, pa.string())
    if not pa.types.is_string(column.type):
        return column
    return pc.replace_substring_regex(column, _FORMULA, r"'\1")
