"""Schema of result rows: one row per image, graded or failed with a reason."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa

from scalp_core.bundles.contract import BundleSpec
from scalp_core.datasets.manifest import image_id
from scalp_core.grades import SYMPTOM_IDS
from scalp_core.inference.decision import make_gradings

RESULTS_FOLDER = "results"

_SYMPTOM_GRADE = pa.struct(
    [("grade", pa.int8()), ("grade_name", pa.string()), ("probabilities", pa.list_(pa.float64()))]
)
COLUMNS: dict[str, tuple[pa.DataType, str]] = {
    "image_id": (
        pa.string(),
        "start of `sha256`, as in manifests and in answers of the endpoint: use it to join them; null if the "
        "bytes were unavailable",
    ),
    "location_id": (pa.string(), "hash of `uri` and `member`: unique per row, and the same in each run"),
    "uri": (pa.string(), "the file, or the archive of a member"),
    "member": (pa.string(), "name in the archive; null for a file"),
    "sha256": (pa.string(), "hash of the bytes; null if they were unavailable"),
    "status": (pa.string(), "`graded` or `failed`"),
    "error_code": (pa.string(), "why it failed, for programs; null in graded rows"),
    "error": (pa.string(), "why it failed, for people; null in graded rows"),
    "grade": (pa.int8(), "the likeliest grade: 0 good, 1 mild, 2 moderate, 3 severe"),
    "grade_name": (pa.string(), "name of the grade"),
    # Not of fixed size, because Parquet cannot read nulls of such lists.
    "probabilities": (pa.list_(pa.float64()), "calibrated probabilities of the four grades, with the sum 1"),
    "expected_severity": (pa.float64(), "mean of the grades weighted by their probabilities, 0 to 3"),
    "grade_set": (
        pa.list_(pa.int8()),
        "neighboring grades that contain the true grade with the coverage that the bundle promises",
    ),
    "unlikeness": (
        pa.float64(),
        "distance from the images of the train split: above 1 is flagged; null for bundles without gates",
    ),
    "refer": (pa.bool_(), "whether a person should look at the image"),
    "refer_reasons": (pa.list_(pa.string()), "why, as codes"),
    "other_symptoms": (
        pa.struct([(name, _SYMPTOM_GRADE) for name in SYMPTOM_IDS]),
        "grade, its name and probabilities of each other symptom that the bundle grades, such as "
        "`other_symptoms.dandruff.grade`; null for bundles of one symptom",
    ),
    "notes": (pa.list_(pa.string()), "changes during decoding, such as rotation to upright"),
    "model_version": (pa.string(), "run and hash of the exact weights"),
    "computed_by": (
        pa.string(),
        "device, precision, runtime and versions: equal in all graded rows of an output directory; null in "
        "failed rows",
    ),
    "graded_at": (pa.timestamp("ms", tz="UTC"), "time in UTC"),
}
"""Type and meaning of each column."""

SCHEMA = pa.schema({name: kind for name, (kind, _) in COLUMNS.items()})


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
        logits: float (N, 4 S), of the S symptoms of the bundle, meaningless for rows with an `error_code`.
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
