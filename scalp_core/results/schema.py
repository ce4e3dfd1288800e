"""Schema of result rows: one row per image, graded or failed with a reason."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa

from scalp_core.bundles.bundle import BundleSpec
from scalp_core.datasets.manifest import image_id
from scalp_core.inference.decision import make_gradings

RESULTS_FOLDER = "results"

SCHEMA = pa.schema(
    {
        "image_id": pa.string(),  # `manifest.image_id`; null if the bytes were unavailable
        "location_id": pa.string(),  # `manifest.location_id`: unique per row
        "uri": pa.string(),
        "member": pa.string(),
        "sha256": pa.string(),
        "status": pa.string(),  # graded or failed
        "error_code": pa.string(),
        "error": pa.string(),
        "grade": pa.int8(),
        "grade_name": pa.string(),
        "probabilities": pa.list_(
            pa.float64()
        ),  # four; not of fixed size, because Parquet cannot read nulls of it
        "expected_severity": pa.float64(),
        "grade_set": pa.list_(pa.int8()),
        "unlikeness": pa.float64(),  # flagged above 1; null for bundles without gates
        "refer": pa.bool_(),
        "refer_reasons": pa.list_(pa.string()),
        "notes": pa.list_(pa.string()),
        "model_version": pa.string(),
        "computed_by": pa.string(),  # device, precision, runtime, versions; null in failed rows
        "graded_at": pa.timestamp("ms", tz="UTC"),
    }
)


@dataclass(frozen=True)
class Signature:
    """Columns with the same value in all rows of a run."""

    model_version: str  # identifies the exact weights
    computed_by: str  # device, precision, runtime and versions


def result_table(
    rows: dict[str, np.ndarray], logits: np.ndarray, spec: BundleSpec, signature: Signature
) -> pa.Table:
    """Build rows of `SCHEMA` from the columns of loaded images and the logits of the model.

    Args:
        rows: Strings `location_id, uri, member, sha256, notes, error_code, error`, and `statistics` float
            (N, K); `error_code` is empty if the image could be read.
        logits: float (N, 4), meaningless for rows with an `error_code`.
        spec: Contract of the bundle.
        signature: Columns with the same value in all rows.
    """
    graded_at, computed = datetime.now(UTC), {"computed_by": signature.computed_by}
    result_rows = []
    for index, grading in enumerate(make_gradings(logits, rows["statistics"], spec)):
        code, sha256 = rows["error_code"][index], rows["sha256"][index] or None
        row = {
            "image_id": sha256 and image_id(sha256),
            "location_id": rows["location_id"][index],
            "uri": rows["uri"][index],
            "member": rows["member"][index] or None,
            "sha256": sha256,
            "status": "failed" if code else "graded",
            "notes": rows["notes"][index].split(),
            "model_version": signature.model_version,
            "graded_at": graded_at,
        }
        row |= {"error_code": code, "error": rows["error"][index]} if code else computed | vars(grading)
        result_rows.append(row)
    return pa.Table.from_pylist(result_rows, schema=SCHEMA)
