"""Result rows as lines of JSON, and as CSV for spreadsheets."""

from __future__ import annotations

import json
from datetime import date
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

# A member of an archive may be called =HYPERLINK(...), which a spreadsheet would run; a quote hides it.
_FORMULA = r"\A([=+\-@＝＋－＠\t\r\n])"


def json_lines(batch: pa.RecordBatch) -> bytes:
    """One line of JSON per row; times in ISO 8601."""
    return "".join(f"{json_text(row)}\n" for row in batch.to_pylist()).encode()


def json_text(value: Any) -> str:
    """JSON; times in ISO 8601, other types that JSON lacks as text."""
    return json.dumps(value, ensure_ascii=False, default=_plain)


def _plain(value: Any) -> str:
    return value.isoformat() if isinstance(value, date) else str(value)


def flat_schema(schema: pa.Schema) -> pa.Schema:
    """Columns of a CSV: lists become text."""
    return pa.schema([(field.name, pa.string() if _is_text(field.type) else field.type) for field in schema])


def flat_batch(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Rows of a CSV for spreadsheets: lists become `a;b;c`, and no text is a formula."""
    columns = [_flat(column) for column in batch.columns]
    return pa.record_batch(columns, schema=flat_schema(batch.schema))


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_string(kind)


def _flat(column: pa.Array) -> pa.Array:
    if pa.types.is_list(column.type):
        column = pc.binary_join(column.cast(pa.list_(pa.string())), ";")
    if not pa.types.is_string(column.type):
        return column
    return pc.replace_substring_regex(column, _FORMULA, r"'\1")
