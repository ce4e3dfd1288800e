"""Terms of clinical documents: local codes of a result, and its sentences for people.

No standard terminology has codes for grades of micro-keratin, so scalp has its own; docs/clinical-formats.md
lists them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from uuid import UUID, uuid5

from scalp_core.errors import IMAGE_CODES
from scalp_core.grades import GRADE_NAMES
from scalp_core.inference.decision import REASONS

SYSTEM = "urn:scalp:codes"
"""Code system of the local codes in FHIR."""

SCHEME = "99SCALP"
"""Coding scheme of the local codes in DICOM, where private schemes begin with 99."""

REPORT, GRADE, SEVERITY, PLAUSIBLE, REFER, REASON, FAILURE = (
    "report", "grade", "expected-severity", "plausible-grade", "refer", "refer-reason", "not-graded",
)  # fmt: skip

CODES = {
    REPORT: "automated grading of micro-keratin on an image of the scalp",
    GRADE: "grade of micro-keratin (fine flaking)",
    SEVERITY: "expected severity, 0 to 3",
    PLAUSIBLE: "grade of the grade set",
    REFER: "whether a person should look at the image",
    REASON: "why a person should look at the image",
    FAILURE: "why the image has no grade",
    "yes": "yes",
    "no": "no",
    **{f"grade-{grade}": name for grade, name in enumerate(GRADE_NAMES)},
    **{f"probability-{grade}": f"probability of the grade {name}" for grade, name in enumerate(GRADE_NAMES)},
    **REASONS,
    **IMAGE_CODES,
}
"""Meaning of each local code; codes of reasons and errors are those of result rows."""

_NAMESPACE = UUID("6b0f4c0e-6c1f-5d0b-9d0e-6a0a5b3f1c58")
_WARNING = "Made by an AI model without a person's review. Not a diagnosis."
_SYNTHETIC = "The model was trained on synthetic images; not for clinical use."


def make_uuid(row: Mapping[str, Any], part: str) -> UUID:
    """Return the identifier of a part of a row's document: the same in each export of the row."""
    return uuid5(_NAMESPACE, f"{row['location_id']} {row['model_version']} {row['graded_at']} {part}")


def conclude(row: Mapping[str, Any]) -> str:
    """Write a row's result as sentences."""
    if row["status"] == "failed":
        return f"Not graded: {IMAGE_CODES[row['error_code']]} ({row['error_code']})."
    names = [GRADE_NAMES[grade] for grade in row["grade_set"]]
    sentences = [f"Micro-keratin: {row['grade_name']} ({row['grade']} of 0 to 3)."]
    if len(names) > 1:
        sentences.append(f"Plausible: {names[0]} to {names[-1]}.")
    if row["refer"]:
        reasons = "; ".join(f"{REASONS[reason]} ({reason})" for reason in row["refer_reasons"])
        sentences.append(f"A person should look at this image: {reasons}.")
    return " ".join(sentences)


def describe_origin(row: Mapping[str, Any], synthetic: bool) -> str:
    """Write what made a row, and what it is not."""
    computed = f", {row['computed_by']}" if row["computed_by"] else ""
    warnings = [_WARNING, _SYNTHETIC] if synthetic else [_WARNING]
    return " ".join([*warnings, f"Model: {row['model_version']}{computed}."])
