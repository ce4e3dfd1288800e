"""Write clinical documents of result rows into one file: FHIR as lines of JSON, or a zip of DICOM SR."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from typing import IO, Any, Literal

import pyarrow as pa

from scalp_core.datasets.locations import location_of, read_images
from scalp_core.errors import ImageError, UserError
from scalp_core.images.codecs import MAX_BYTES
from scalp_core.results.subjects import Subject, read_subject

Document = Literal["fhir", "dicom-sr"]

SUFFIXES: dict[Document, str] = {"fhir": ".ndjson", "dicom-sr": ".zip"}
"""Suffix of the file, by the kind of its documents."""

_EPOCH = (1980, 1, 1, 0, 0, 0)  # the same rows make the same file

Rows = Iterator[tuple[Mapping[str, Any], Subject | None]]


def write_documents(
    kind: Document, batches: Iterable[pa.RecordBatch], file: IO[bytes], synthetic: bool, patients: bool
) -> None:
    """Write one document per row.

    Args:
        kind: Kind of the documents.
        batches: Rows of `schema.SCHEMA`.
        file: File to write to.
        synthetic: Whether the model was trained on synthetic images.
        patients: Whether to copy patient and study from DICOM files, which are read again.

    Raises:
        UserError: A file that names the patient cannot be read again, or has invalid patient data; or
            highdicom is not installed.
    """
    rows = _with_subjects(batches) if patients else ((row, None) for row in _rows(batches))
    if kind == "fhir":
        _write_fhir(rows, file, synthetic)
    else:
        _write_reports(rows, file, synthetic)


def _write_fhir(rows: Rows, file: IO[bytes], synthetic: bool) -> None:
    from scalp_core.results.fhir import make_fhir_bundle

    for row, subject in rows:
        document = make_fhir_bundle(row, synthetic, subject)
        file.write(json.dumps(document, ensure_ascii=False).encode() + b"\n")


def _write_reports(rows: Rows, file: IO[bytes], synthetic: bool) -> None:
    try:
        from scalp_core.results.dicom_sr import make_structured_report
    except ModuleNotFoundError:
        raise UserError(
            "--write dicom-sr needs highdicom, which is not installed; install the extra scalp[clinical]"
        ) from None
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for row, subject in rows:
            try:
                report = make_structured_report(row, synthetic, subject)
            except Exception as error:
                if subject is None:
                    raise
                # The exception may quote the patient's data.
                raise UserError(
                    f"{location_of(row)} has patient or study data that DICOM forbids "
                    f"({type(error).__name__}); correct the file, or omit --patients"
                ) from None
            archive.writestr(zipfile.ZipInfo(f"{row['location_id']}.dcm", _EPOCH), report)


def _rows(batches: Iterable[pa.RecordBatch]) -> Iterator[Mapping[str, Any]]:
    for batch in batches:
        yield from batch.to_pylist()


def _with_subjects(batches: Iterable[pa.RecordBatch]) -> Rows:
    for batch in batches:
        rows = batch.to_pylist()
        # Failed images too: a report of a failure belongs to the patient.
        for row, data in zip(rows, read_images([location_of(row) for row in rows], MAX_BYTES), strict=True):
            yield row, _subject(row, data)


def _subject(row: Mapping[str, Any], data: bytes | ImageError) -> Subject | None:
    try:
        if isinstance(data, ImageError):
            raise data
        return read_subject(data)
    except ImageError as error:
        if row["status"] == "failed":
            return None
        raise UserError(f"{location_of(row)} cannot be read again ({error}); omit --patients") from None
