"""Result rows as DICOM structured reports: Comprehensive SR of template TID 1500, by highdicom."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any
from uuid import UUID

from highdicom.sr import (
    AlgorithmIdentification,
    CodedConcept,
    ComprehensiveSR,
    DeviceObserverIdentifyingAttributes,
    Measurement,
    MeasurementReport,
    MeasurementsAndQualitativeEvaluations,
    ObservationContext,
    ObserverContext,
    QualitativeEvaluation,
    RelationshipTypeValues,
    SourceImageForMeasurementGroup,
    TextContentItem,
    TrackingIdentifier,
)
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes
from pydicom.uid import UID, VLPhotographicImageStorage
from pydicom.valuerep import DA, DT, TM

from scalp_core.results.clinical_terms import (
    CODES,
    FAILURE,
    GRADE,
    PLAUSIBLE,
    REASON,
    REFER,
    REPORT,
    SCHEME,
    SEVERITY,
    conclude,
    describe_origin,
    make_uuid,
)
from scalp_core.results.subjects import KEYWORDS, Subject

_DIGITS = 6
_MAX_MEANING = 64  # characters of a code's meaning


def make_structured_report(row: Mapping[str, Any], synthetic: bool, subject: Subject | None = None) -> bytes:
    """Make the DICOM file of a result row: an unverified, preliminary report.

    Args:
        row: Row of `schema.SCHEMA`.
        synthetic: Whether the model was trained on synthetic images.
        subject: Patient, study and image that the report refers to; None for a report without them, which is
            a study of its own.

    Raises:
        Exception: Of pydicom, for values of the subject that DICOM forbids.
    """
    is_graded = row["status"] == "graded"
    report = ComprehensiveSR(
        evidence=[_evidence(row, subject)],
        content=_content(row, synthetic, subject),
        series_instance_uid=_uid(make_uuid(row, "series")),
        series_number=1,
        sop_instance_uid=_uid(make_uuid(row, "report")),
        instance_number=1,
        manufacturer="scalp",
        manufacturer_model_name=row["model_version"][:64],
        series_description="Result of an AI model, not a diagnosis",
        is_complete=is_graded,
        specific_character_set="ISO_IR 192",
    )
    # The time of the grading: each export of a row is the same report.
    graded_at = row["graded_at"].replace(tzinfo=None)
    report.ContentDate = report.InstanceCreationDate = DA(graded_at.date())
    report.ContentTime = report.InstanceCreationTime = TM(graded_at.time())
    report.ContributingEquipmentSequence[0].ContributionDateTime = DT(graded_at)
    if subject is None:  # the image that the report refers to does not exist in an archive
        for name in ("CurrentRequestedProcedureEvidenceSequence", "PertinentOtherEvidenceSequence"):
            if name in report:
                delattr(report, name)
    buffer = io.BytesIO()
    report.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def _content(row: Mapping[str, Any], synthetic: bool, subject: Subject | None) -> MeasurementReport:
    device = DeviceObserverIdentifyingAttributes(
        uid=_uid(make_uuid({**row, "location_id": "", "graded_at": ""}, "device")),
        name="scalp",
        model_name=row["model_version"],
    )
    observer = ObserverContext(observer_type=codes.DCM.Device, observer_identifying_attributes=device)
    group = MeasurementsAndQualitativeEvaluations(
        tracking_identifier=TrackingIdentifier(
            uid=_uid(make_uuid(row, "group")), identifier=row["image_id"] or row["location_id"]
        ),
        finding_type=_code(GRADE),
        algorithm_id=AlgorithmIdentification("scalp", row["model_version"]),
        measurements=_measurements(row),
        qualitative_evaluations=[
            QualitativeEvaluation(_code(name), _code(value)) for name, value in _evaluations(row)
        ],
        source_images=[SourceImageForMeasurementGroup(subject.SOPClassUID, subject.SOPInstanceUID)]
        if subject
        else None,
    )
    report = MeasurementReport(
        observation_context=ObservationContext(observer_device_context=observer),
        procedure_reported=_code(REPORT),
        imaging_measurements=[group],
    )
    for text in (conclude(row), describe_origin(row, synthetic)):
        comment = TextContentItem(codes.DCM.Comment, text, RelationshipTypeValues.CONTAINS)
        report[0].ContentSequence.append(comment)
    return report


def _measurements(row: Mapping[str, Any]) -> list[Measurement] | None:
    if row["status"] == "failed":
        return None
    numbers = {f"probability-{grade}": value for grade, value in enumerate(row["probabilities"])}
    numbers[SEVERITY] = row["expected_severity"]
    return [
        Measurement(_code(code), round(value, _DIGITS), codes.UCUM.NoUnits) for code, value in numbers.items()
    ]


def _evaluations(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    if row["status"] == "failed":
        return [(FAILURE, row["error_code"])]
    return [
        (GRADE, f"grade-{row['grade']}"),
        *((PLAUSIBLE, f"grade-{grade}") for grade in row["grade_set"]),
        (REFER, "yes" if row["refer"] else "no"),
        *((REASON, reason) for reason in row["refer_reasons"]),
    ]


def _evidence(row: Mapping[str, Any], subject: Subject | None) -> Dataset:
    """The image's patient, study and identifiers, in the form that highdicom copies them from."""
    image = Dataset()
    image.SpecificCharacterSet = "ISO_IR 192"
    for name in KEYWORDS:
        setattr(image, name, getattr(subject, name) if subject else "")
    if subject is None:
        image.SOPClassUID = VLPhotographicImageStorage
        for name in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID"):
            setattr(image, name, _uid(make_uuid(row, f"image {name}")))
    return image


def _code(code: str) -> CodedConcept:
    return CodedConcept(code, SCHEME, CODES[code][:_MAX_MEANING])


def _uid(uuid: UUID) -> UID:
    return UID(f"2.25.{uuid.int}")
