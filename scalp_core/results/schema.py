"""Result rows: one for each photograph put in, graded or failed with a reason."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa

from scalp_core import storage
from scalp_core.bundles.bundle import BundleSpec
from scalp_core.datasets.manifest import image_id
from scalp_core.inference.decision import make_gradings
from scalp_core.storage import parquet

RESULTS_FOLDER = "results"

SCHEMA = pa.schema(
    {
        "image_id": pa.string(),  # `manifest.image_id`; null where the bytes were unavailable
        "location_id": pa.string(),  # `manifest.location_id`: each row has its own
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
        "computed_by": pa.string(),  # device, precision, runtime, versions; null of a failed row
        "graded_at": pa.timestamp("ms", tz="UTC"),
    }
)


@dataclass(frozen=True)
class Signature:
    """What the rows of one run have in common.

    Args:
        model_version: names the exact weights.
        computed_by: names the device, precision, runtime and versions.
    """

    model_version: str
    computed_by: str


def result_table(
    rows: dict[str, np.ndarray], logits: np.ndarray, spec: BundleSpec, signature: Signature
) -> pa.Table:
    """Rows of `SCHEMA` from what loading left of photographs, and the model's answers.

    Args:
        rows: `location_id, uri, member, sha256, notes, error_code, error` strings and `statistics` float
            (N, K); `error_code` is empty where a photograph could be read.
        logits: float (N, 4); of no meaning where it could not.
        spec: the bundle's contract.
        signature: of the rows.
    """
    at, computed = datetime.now(UTC), {"computed_by": signature.computed_by}
    found = []
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
            "graded_at": at,
        }
        row |= {"error_code": code, "error": rows["error"][index]} if code else computed | vars(grading)
        found.append(row)
    return pa.Table.from_pylist(found, schema=SCHEMA)


def read_results(folder: str, columns: list[str] | None = None) -> pa.Table:
    """All result rows of a `results` folder; an empty table when there are none."""
    files = [uri for uri in storage.list_files(folder) if uri.endswith(".parquet")]
    tables = [parquet.read(uri, columns) for uri in files]
    return pa.concat_tables(tables) if tables else SCHEMA.empty_table().select(columns or SCHEMA.names)
