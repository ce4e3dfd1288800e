"""DICOM files that tests write: photographs of a patient, readable and not."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    UID,
    DermoscopicPhotographyImageStorage,
    ExplicitVRLittleEndian,
    JPEGBaseline8Bit,
    generate_uid,
)

PATIENT = ("Kim^Haneul", "P-4711", "19800101", "Clinic of Seoul", "A2LEBJJDE00060O")
"""Values of the header that must not leave it."""

_ROOT = "1.2.826.0.1.3680043.8.498."


def dicom(
    content: np.ndarray | bytes | None,
    size: tuple[int, int] | None = None,
    syntax: str | None = None,
    fragments: int = 1,
    **changes: Any,
) -> bytes:
    """Write a DICOM file of one photograph.

    Args:
        content: uint8 (height, width, 3) of uncompressed RGB, a JPEG file, or None for no pixels.
        size: Width and height in the header; required for a JPEG.
        syntax: Transfer syntax; default by `content`.
        fragments: Number of fragments of a JPEG.
        changes: Further attributes of the header; None removes one.
    """
    is_jpeg = isinstance(content, bytes)
    width, height = size or (content.shape[1::-1] if isinstance(content, np.ndarray) else (8, 8))
    dataset = Dataset()
    name, identity, born, institution, serial = PATIENT
    dataset.PatientName, dataset.PatientID, dataset.PatientBirthDate = name, identity, born
    dataset.PatientSex, dataset.InstitutionName, dataset.DeviceSerialNumber = "F", institution, serial
    dataset.StudyDate, dataset.StudyTime, dataset.AccessionNumber, dataset.StudyID = (
        "20261101",
        "1200",
        "",
        "7",
    )
    dataset.ReferringPhysicianName = "Lee^Doctor"
    dataset.SOPClassUID = DermoscopicPhotographyImageStorage
    dataset.SOPInstanceUID = generate_uid(_ROOT, entropy_srcs=["instance", str(size)])
    dataset.StudyInstanceUID = generate_uid(_ROOT, entropy_srcs=["study"])
    dataset.SeriesInstanceUID = generate_uid(_ROOT, entropy_srcs=["series"])
    dataset.Modality = "DMS"
    dataset.Rows, dataset.Columns, dataset.SamplesPerPixel = height, width, 3
    dataset.PhotometricInterpretation = "YBR_FULL_422" if is_jpeg else "RGB"
    dataset.PlanarConfiguration, dataset.PixelRepresentation = 0, 0
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 8, 8, 7
    if isinstance(content, bytes):
        dataset.PixelData = encapsulate([content], fragments_per_frame=fragments)
        dataset["PixelData"].VR = "OB"
        dataset["PixelData"].is_undefined_length = True
    elif content is not None:
        dataset.PixelData = content.tobytes() + b"\0" * (content.size % 2)
        dataset["PixelData"].VR = "OB"
    for keyword, value in changes.items():
        if value is None:
            delattr(dataset, keyword)
        else:
            setattr(dataset, keyword, value)
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = (
        dataset.SOPClassUID,
        dataset.SOPInstanceUID,
    )
    default = JPEGBaseline8Bit if is_jpeg else ExplicitVRLittleEndian
    meta.TransferSyntaxUID = UID(syntax) if syntax else default
    dataset.file_meta = meta
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()
