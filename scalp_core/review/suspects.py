"""Images whose labels are likely wrong, of `scalp audit-labels`, as rows of a review."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from scalp_core import storage
from scalp_core.errors import UserError
from scalp_core.evaluation.label_errors import SUSPECTS_FILE
from scalp_core.grades import NUM_GRADES, SYMPTOM_IDS
from scalp_core.review.groups import Place
from scalp_core.storage import parquet

REASON = "suspect_label"
"""Reason of the review of these images, in the words of the page."""

_SUMMARY_FILE = "summary.json"
_KEPT = ("image_id", "sha256", "uri", "member", "probabilities")


def read_suspects(audit: str) -> tuple[str, pa.Table, dict[Place, str]]:
    """Read the images with suspect labels, the likeliest errors first.

    Args:
        audit: Output directory of `scalp audit-labels`.

    Returns:
        The symptom of the labels; rows with the columns of `referrals`, without the labels, which a reader
        must not see; and the groups of the images.

    Raises:
        UserError: The audit is not finished, of an older version, or found no suspect label.
    """
    summary = storage.read_json(storage.join(audit, _SUMMARY_FILE))
    if summary is None:
        raise UserError(f"{audit} is not finished; run the same scalp audit-labels command again")
    uri = storage.join(audit, SUSPECTS_FILE)
    suspects = parquet.read(uri)
    if "sha256" not in suspects.column_names:
        raise UserError(
            f"{uri} has no column sha256, because an older version of scalp graded the images; run scalp "
            "train --folds into a new directory, then scalp audit-labels"
        )
    if not suspects.num_rows:
        raise UserError(f"{audit} has no suspect label to review; name another directory")
    probabilities = np.array(suspects["probabilities"].to_pylist())
    grades = probabilities.argmax(axis=1)
    columns = {name: suspects[name] for name in _KEPT} | {
        "grade": pa.array(grades, pa.int8()),
        "expected_severity": pa.array(probabilities @ np.arange(NUM_GRADES)),
        "grade_set": pa.array([[grade] for grade in grades.tolist()], pa.list_(pa.int8())),
        "refer_reasons": pa.array([[REASON]] * len(grades)),
        "model_version": pa.array([summary.get("model_version")] * len(grades), pa.string()),
    }
    places = zip(suspects["uri"].to_pylist(), suspects["member"].to_pylist(), strict=True)
    groups = dict(zip(places, suspects["group"].to_pylist(), strict=True))
    return summary.get("symptom", SYMPTOM_IDS[0]), pa.table(columns), groups
