"""Patient and study of an image, from the header of its DICOM file, for clinical documents."""

from __future__ import annotations

from dataclasses import dataclass, fields

from scalp_core.images import codecs


@dataclass(frozen=True)
class Subject:
    """Patient, study and image, as in the DICOM file; "" for missing values."""

    PatientName: str
    PatientID: str
    PatientBirthDate: str
    PatientSex: str
    StudyInstanceUID: str
    StudyDate: str
    StudyTime: str
    StudyID: str
    AccessionNumber: str
    ReferringPhysicianName: str
    SeriesInstanceUID: str
    SOPInstanceUID: str
    SOPClassUID: str


KEYWORDS = tuple(field.name for field in fields(Subject))
"""Keywords of the DICOM attributes of a `Subject`."""


def read_subject(data: bytes) -> Subject | None:
    """Read patient and study of an image file; None if it is not a DICOM file that names study and image.

    Raises:
        ImageError: It is not an image, or its header cannot be read.
    """
    if codecs.detect_format(data) != "DICOM":
        return None
    from scalp_core.images import dicom  # pydicom takes a second to import

    subject = Subject(**dicom.read_header(data, KEYWORDS))
    return subject if subject.StudyInstanceUID and subject.SOPInstanceUID else None
