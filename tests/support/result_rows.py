"""Handmade result tables of `scalp grade`, without a model and without Ray."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa

from scalp_core import storage
from scalp_core.datasets.locations import Location
from scalp_core.datasets.manifest import location_id
from scalp_core.grades import GRADE_NAMES
from scalp_core.results.schema import SCHEMA
from scalp_core.storage import parquet

AT = datetime(2026, 11, 25, 12, tzinfo=UTC)


def row(
    uri: str, member: str | None = None, grade: int = 1, sure: float = 0.7, **changes: Any
) -> dict[str, Any]:
    """Make a graded row whose likeliest grade has the probability `sure`."""
    probabilities = np.full(4, (1 - sure) / 3)
    probabilities[grade] = sure
    found = {
        "image_id": "0" * 20,
        "location_id": location_id(Location(uri, member)),
        "uri": uri,
        "member": member,
        "sha256": "0" * 64,
        "status": "graded",
        "grade": grade,
        "grade_name": GRADE_NAMES[grade],
        "probabilities": probabilities.tolist(),
        "expected_severity": float(probabilities @ np.arange(4)),
        "grade_set": [grade],
        "unlikeness": 0.5,
        "refer": False,
        "refer_reasons": [],
        "notes": [],
        "model_version": "made",
        "computed_by": "cpu fp32 openvino 2026.3, scalp 0.1.0",
        "graded_at": AT,
    }
    return found | changes


def referred(uri: str, *reasons: str, **changes: Any) -> dict[str, Any]:
    return row(uri, refer=True, refer_reasons=list(reasons), **changes)


def failed(uri: str, code: str, error: str = "it is broken", member: str | None = None) -> dict[str, Any]:
    kept = {"location_id", "uri", "member", "model_version", "graded_at"}
    found = {name: value for name, value in row(uri, member).items() if name in kept}
    return found | {"status": "failed", "error_code": code, "error": error, "notes": []}


def write(folder: str, rows: list[dict[str, Any]], files: int = 2) -> None:
    """Write rows in order to `folder/part-….parquet`."""
    table, size = pa.Table.from_pylist(rows, schema=SCHEMA), -(-len(rows) // files)
    for number in range(files):
        uri = storage.join(folder, f"part-{number:05d}.parquet")
        parquet.write(uri, table.slice(number * size, size))


def read_results(folder: str) -> pa.Table:
    """Read all rows of a `results` folder, each file by itself; an empty table if it has no files."""
    files = [uri for uri in storage.list_files(folder) if uri.endswith(".parquet")]
    return pa.concat_tables(map(parquet.read, files)) if files else SCHEMA.empty_table()
