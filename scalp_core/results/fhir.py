"""Result rows as FHIR: an Observation and a DiagnosticReport, in a transaction that a server takes once.

The resources are valid in FHIR R4, R4B and R5.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from scalp_core.results.clinical_terms import (
    CODES,
    GRADE,
    PLAUSIBLE,
    REASON,
    REFER,
    REPORT,
    SEVERITY,
    SYSTEM,
    conclude,
    describe_origin,
    make_uuid,
)
from scalp_core.results.subjects import Subject

_URI = "urn:ietf:rfc3986"
_TERMINOLOGY = "http://terminology.hl7.org/CodeSystem"
_DIGITS = 6

Resource = dict[str, Any]


def make_fhir_bundle(row: Mapping[str, Any], synthetic: bool, subject: Subject | None = None) -> Resource:
    """Make the FHIR transaction of a result row.

    A server that has the result already does not store it again.

    Args:
        row: Row of `schema.SCHEMA`.
        synthetic: Whether the model was trained on synthetic images.
        subject: Patient and study; None for a document without them.
    """
    resources = {"Observation": _observation(row, synthetic), "DiagnosticReport": _report(row)}
    entries: list[Resource] = []
    for kind, resource in resources.items():
        uri = f"urn:uuid:{make_uuid(row, kind)}"
        common: Resource = {
            "resourceType": kind,
            "meta": {"security": [_coding(f"{_TERMINOLOGY}/v3-ObservationValue", "AIAST")]},
            "identifier": [{"system": _URI, "value": uri}],
            "status": "preliminary" if row["status"] == "graded" else "cancelled",
            "issued": row["graded_at"].isoformat(),
        }
        if subject and subject.PatientID:
            common["subject"] = {"type": "Patient", "identifier": {"value": subject.PatientID}}
        request = {"method": "POST", "url": kind, "ifNoneExist": f"identifier={_URI}|{uri}"}
        entries.append({"fullUrl": uri, "resource": common | resource, "request": request})
    if subject:
        study = {"system": "urn:dicom:uid", "value": f"urn:oid:{subject.StudyInstanceUID}"}
        entries[0]["resource"]["derivedFrom"].append({"type": "ImagingStudy", "identifier": study})
    return {"resourceType": "Bundle", "type": "transaction", "entry": entries}


def _observation(row: Mapping[str, Any], synthetic: bool) -> Resource:
    image = {"system": "urn:scalp:image-id", "value": row["image_id"] or row["location_id"]}
    resource: Resource = {
        "code": _concept(GRADE),
        "device": {"identifier": {"system": "urn:scalp:model-version", "value": row["model_version"]}},
        "derivedFrom": [{"identifier": image}],
        "note": [{"text": describe_origin(row, synthetic)}],
    }
    if row["status"] == "failed":
        absent = _coding(f"{_TERMINOLOGY}/data-absent-reason", "error")
        coding = [absent, *_concept(row["error_code"])["coding"]]
        return resource | {"dataAbsentReason": {"coding": coding, "text": CODES[row["error_code"]]}}
    probabilities = {f"probability-{grade}": value for grade, value in enumerate(row["probabilities"])}
    numbers = probabilities | {SEVERITY: row["expected_severity"]}
    components = [(code, {"valueQuantity": _number(value)}) for code, value in numbers.items()]
    components += [
        (PLAUSIBLE, {"valueCodeableConcept": _concept(f"grade-{grade}")}) for grade in row["grade_set"]
    ]
    components.append((REFER, {"valueBoolean": row["refer"]}))
    components += [(REASON, {"valueCodeableConcept": _concept(reason)}) for reason in row["refer_reasons"]]
    return resource | {
        "valueCodeableConcept": _concept(f"grade-{row['grade']}"),
        "component": [{"code": _concept(code)} | value for code, value in components],
    }


def _report(row: Mapping[str, Any]) -> Resource:
    result = {"reference": f"urn:uuid:{make_uuid(row, 'Observation')}"}
    return {"code": _concept(REPORT), "result": [result], "conclusion": conclude(row)}


def _concept(code: str) -> Resource:
    return {"coding": [{"system": SYSTEM, "code": code, "display": CODES[code]}]}


def _coding(system: str, code: str) -> Resource:
    return {"system": system, "code": code}


def _number(value: float) -> Resource:
    return {"value": round(value, _DIGITS), "system": "http://unitsofmeasure.org", "code": "1"}
