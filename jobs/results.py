"""Result rows: one for each photograph put in, graded or failed with a reason."""

from __future__ import annotations

import uuid
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa

from jobs.images import Columns
from scalp_core import storage
from scalp_core.bundle import BundleSpec
from scalp_core.grading import gradings

RESULTS_FOLDER = "results"

RESULT_SCHEMA = pa.schema(
    {
        "image_id": pa.string(),
        "uri": pa.string(),
        "member": pa.string(),
        "sha256": pa.string(),
        "status": pa.string(),  # graded or failed
        "error_code": pa.string(),
        "error": pa.string(),
        "grade": pa.int8(),
        "grade_name": pa.string(),
        "probabilities": pa.list_(pa.float64()),  # four; Parquet cannot read nulls of a fixed size back
        "expected_severity": pa.float64(),
        "grade_set": pa.list_(pa.int8()),
        "unlikeness": pa.float64(),  # above 1 is flagged; null of bundles without gates
        "refer": pa.bool_(),
        "refer_reasons": pa.list_(pa.string()),
        "notes": pa.list_(pa.string()),
        "model_version": pa.string(),
        "graded_at": pa.timestamp("ms", tz="UTC"),
    }
)


class WriteResults:
    """Writes each batch as one Parquet file, whole or not at all, and returns what is in it."""

    def __init__(self, out: str, spec: BundleSpec, model_version: str) -> None:
        self._out = out
        self._spec = spec
        self._model_version = model_version

    def __call__(self, batch: Columns) -> Columns:
        rows = result_rows(batch, self._spec, self._model_version)
        name = f"part-{uuid.uuid4().hex}.parquet"
        table = pa.Table.from_pylist(rows, schema=RESULT_SCHEMA)
        storage.write_parquet(storage.join(self._out, RESULTS_FOLDER, name), table)
        failed = sum(row["status"] == "failed" for row in rows)
        return {"graded": np.array([len(rows) - failed]), "failed": np.array([failed])}


def result_rows(batch: Columns, spec: BundleSpec, model_version: str) -> list[dict[str, Any]]:
    """Result rows from the columns that `with_logits` leaves."""
    at = datetime.now(UTC)
    rows = []
    for index, grading in enumerate(gradings(batch["logits"], batch["statistics"], spec)):
        code = batch["error_code"][index]
        row = {
            "image_id": batch["image_id"][index],
            "uri": batch["uri"][index],
            "member": batch["member"][index] or None,
            "sha256": batch["sha256"][index] or None,
            "status": "failed" if code else "graded",
            "notes": batch["notes"][index].split(),
            "model_version": model_version,
            "graded_at": at,
        }
        row |= {"error_code": code, "error": batch["error"][index]} if code else vars(grading)
        rows.append(row)
    return rows


def read_results(folder: str, columns: list[str] | None = None) -> pa.Table:
    """All result rows of a `results` folder; an empty table when there are none."""
    files = [uri for uri in storage.list_files(folder) if uri.endswith(".parquet")]
    tables = [storage.read_parquet(uri, columns) for uri in files]
    return (
        pa.concat_tables(tables)
        if tables
        else RESULT_SCHEMA.empty_table().select(columns or RESULT_SCHEMA.names)
    )
