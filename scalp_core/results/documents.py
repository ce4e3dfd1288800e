"""Write clinical documents of result rows into one file: FHIR as lines of JSON, or a zip of DICOM SR.

`scalp grade --write` writes those of all rows to `OUT/documents`; `scalp results --write` writes those of
selected rows to a file of the user.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import IO, Any, Literal

import pyarrow as pa

from scalp_core import storage
from scalp_core.datasets.locations import location_of, read_images
from scalp_core.errors import ImageError, UserError
from scalp_core.grades import SYMPTOM_IDS, name_symptom
from scalp_core.images.codecs import MAX_BYTES
from scalp_core.results.progress import SUMMARY_FILE
from scalp_core.results.subjects import Subject, read_subject

Document = Literal["fhir", "dicom-sr"]

SUFFIXES: dict[Document, str] = {"fhir": ".ndjson", "dicom-sr": ".zip"}
"""Suffix of the file, by the kind of its documents."""

DOCUMENTS_FOLDER = "documents"
"""Folder below the output directory of `scalp grade` with the documents of all rows."""

_EPOCH = (1980, 1, 1, 0, 0, 0)  # the same rows make the same file

Rows = Iterator[tuple[Mapping[str, Any], Subject | None]]


def documents_uri(out: str, kind: Document) -> str:
    """Name the file with the documents of all rows of a run."""
    return storage.join(out, DOCUMENTS_FOLDER, f"{kind}{SUFFIXES[kind]}")


def check_documents(kind: Document, out: str, symptom: str | None) -> None:
    """Check, without writing, that documents of a run can be made on this machine.

    Args:
        kind: Kind of the documents.
        out: Output directory of the run, for the error.
        symptom: Symptom of the grades, one of `SYMPTOM_IDS`; None for runs of versions that had one symptom.

    Raises:
        UserError: The grades are of a symptom without codes, or highdicom is not installed.
    """
    if symptom not in (None, SYMPTOM_IDS[0]):
        raise UserError(
            f"--write {kind}: the grades of {out} are of {name_symptom(symptom)}, and documents have codes "
            f"of micro-keratin alone; write the rows with: scalp results {out} --output FILE.csv"
        )
    if kind == "dicom-sr":
        _import_report_maker()


def plan_documents(out: str, wanted: Sequence[Document], symptom: str) -> list[Document]:
    """Return the kinds of documents that the run in `out` has, by its summary, and those that it shall get.

    Args:
        out: Output directory of the run, perhaps without a run yet.
        wanted: Kinds that are asked for.
        symptom: Symptom of the grades, one of `SYMPTOM_IDS`.

    Raises:
        UserError: As for `check_documents`, or a file of that name exists that no run made.
    """
    had = (storage.read_json(storage.join(out, SUMMARY_FILE)) or {}).get("documents", [])
    kinds = [*had, *(kind for kind in SUFFIXES if kind in wanted and kind not in had)]
    for kind in kinds:
        check_documents(kind, out, symptom)
        if kind not in had and storage.exists(uri := documents_uri(out, kind)):
            raise UserError(f"{uri} exists, and --write did not make it; move it away")
    return kinds


def export_documents(
    kind: Document, out: str, batches: Iterable[pa.RecordBatch], uri: str, patients: bool = False
) -> int:
    """Atomically write one document per row of a finished run to a file.

    Args:
        kind: Kind of the documents.
        out: Output directory of the run.
        batches: Rows of the run, of `schema.SCHEMA`.
        uri: File to write, local or `s3://`.
        patients: As for `write_documents`.

    Returns:
        Number of documents.

    Raises:
        UserError: As for `check_documents` and `write_documents`.
    """
    run = storage.read_json(storage.join(out, SUMMARY_FILE)) or {}
    check_documents(kind, out, run.get("symptom"))
    with storage.new_file(uri) as file:
        return write_documents(kind, batches, file, bool(run.get("synthetic")), patients)


def write_documents(
    kind: Document, batches: Iterable[pa.RecordBatch], file: IO[bytes], synthetic: bool, patients: bool
) -> int:
    """Write one document per row.

    Args:
        kind: Kind of the documents.
        batches: Rows of `schema.SCHEMA`.
        file: File to write to.
        synthetic: Whether the model was trained on synthetic images.
        patients: Whether to copy patient and study from DICOM files, which are read again.

    Returns:
        Number of documents.

    Raises:
        UserError: A file that names the patient cannot be read again, or has invalid patient data; or
            highdicom is not installed.
    """
    rows = _with_subjects(batches) if patients else ((row, None) for row in _rows(batches))
    return _write_fhir(rows, file, synthetic) if kind == "fhir" else _write_reports(rows, file, synthetic)


def _write_fhir(rows: Rows, file: IO[bytes], synthetic: bool) -> int:
    from scalp_core.results.fhir import make_fhir_bundle

    count = 0
    for row, subject in rows:
        document = make_fhir_bundle(row, synthetic, subject)
        file.write(json.dumps(document, ensure_ascii=False).encode() + b"\n")
        count += 1
    return count


def _import_report_maker() -> Callable[[Mapping[str, Any], bool, Subject | None], bytes]:
    try:
        from scalp_core.results.dicom_sr import make_structured_report
    except ModuleNotFoundError:
        raise UserError(
            "--write dicom-sr needs highdicom, which is not installed; install the extra scalp[clinical]"
        ) from None
    return make_structured_report


def _write_reports(rows: Rows, file: IO[bytes], synthetic: bool) -> int:
    make_report, count = _import_report_maker(), 0
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for row, subject in rows:
            try:
                report = make_report(row, synthetic, subject)
            except Exception as error:
                if subject is None:
                    raise
                # The exception may quote the patient's data.
                raise UserError(
                    f"{location_of(row)} has patient or study data that DICOM forbids "
                    f"({type(error).__name__}); correct the file, or omit --patients"
                ) from None
            archive.writestr(zipfile.ZipInfo(f"{row['location_id']}.dcm", _EPOCH), report)
            count += 1
    return count


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
