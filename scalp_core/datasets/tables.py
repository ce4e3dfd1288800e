"""Read a CSV or Parquet of `uri, label, member, group` and grades of symptoms as a source of images."""

from __future__ import annotations

import io
import re
import unicodedata
from collections.abc import Generator, Iterator
from contextlib import closing, suppress
from itertools import chain
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from scalp_core import storage
from scalp_core.datasets.manifest import likeliest_grade
from scalp_core.errors import UserError
from scalp_core.grades import SYMPTOM_IDS, Grade, parse_grade

TABLE_SUFFIXES = (".csv", ".parquet")
COLUMNS = ("uri", "member", "label", "group")
# Names of the column of each symptom: that of scalp, and that of AI Hub's label files.
SYMPTOM_COLUMNS = {name: (name, f"value_{number}") for number, name in enumerate(SYMPTOM_IDS, 1)}
# Columns of a manifest: byte range of a member, and the hash of its bytes.
PLACE_COLUMNS = ("byte_offset", "byte_length", "compression", "sha256")

_ENCODINGS = ("utf-8-sig", "cp949")
_PIECE = 2**20
# The uris of a manifest are relative to its data directory.
_IN_A_MANIFEST = re.compile("/manifest/split=[^/]+$")
_NO_LABEL = ("", "na", "n/a", "nan", "null", "none")


def is_table(source: str) -> bool:
    return source.lower().endswith(TABLE_SUFFIXES)


def find_columns(table: str) -> dict[str, str]:
    """Find the columns among `COLUMNS` and `SYMPTOM_COLUMNS` in a table, with their spelling in the table.

    Raises:
        UserError: the file is not a table, lacks `uri`, or has two columns of one symptom.
    """
    with closing(_batches(table)) as batches:
        first = next(batches, None)
    return {} if first is None else _columns(table, first.schema)


def read_rows(table: str) -> Iterator[dict[str, Any]]:
    """Read a table as rows of `scan.LISTED`.

    Raises:
        UserError: the file is not a table, lacks `uri`, or has two columns of one symptom.
    """
    folder = _IN_A_MANIFEST.sub("", table.rsplit("/", 1)[0])
    for batch in _batches(table):
        wanted = _columns(table, batch.schema)
        if set(PLACE_COLUMNS) <= set(batch.schema.names):
            wanted |= {name: name for name in PLACE_COLUMNS}
            wanted |= {name: name for name in batch.schema.names if name == "soft_label"}
        for row in batch.select(list(wanted.values())).to_pylist():
            yield _row({key: row[name] for key, name in wanted.items()}, folder, wanted)


def unicode_forms(text: str) -> list[str]:
    """Return the other Unicode forms of a name: macOS decomposes Korean (NFD), others compose it (NFC)."""
    forms = (unicodedata.normalize("NFC", text), unicodedata.normalize("NFD", text))
    return [form for form in dict.fromkeys(forms) if form != text]


def _columns(table: str, schema: pa.Schema) -> dict[str, str]:
    spellings = {name.lower(): name for name in schema.names}
    if "uri" not in spellings:
        raise UserError(
            f"{table} has no column uri, only {', '.join(schema.names)}; "
            "give it the columns uri, label and, optionally, member and group"
        )
    columns = {key: spellings[key] for key in COLUMNS if key in spellings}
    for symptom, names in SYMPTOM_COLUMNS.items():
        present = [spellings[name] for name in names if name in spellings]
        if len(present) > 1:
            raise UserError(
                f"{table} has two columns of one symptom, {present[0]} and {present[1]}; keep one of them"
            )
        if present:
            columns[symptom] = present[0]
    return columns


def _row(row: dict[str, Any], folder: str, names: dict[str, str]) -> dict[str, Any]:
    uri = str(row["uri"] or "").strip()
    # Relative uris start at the table's folder, so that a folder can be moved with its table.
    full = uri if "://" in uri or uri.startswith("/") else storage.join(folder, uri)
    code, error = (None, None) if uri else ("not_found", "the row has no uri")
    try:
        label = _parse_label("label", row.get("label"))
        labels = [_parse_label(names.get(symptom, symptom), row.get(symptom)) for symptom in SYMPTOM_IDS]
    except ValueError as problem:
        label, labels, code, error = None, [], "bad_label", str(problem)
    soft = row.get("soft_label")
    return {
        "uri": full,
        "member": str(row["member"]) if row.get("member") else None,
        "bytes": None,
        "code": code,
        "error": error,
        "kind": "photograph",
        "label": likeliest_grade(soft) if soft else label,
        "labels": labels if any(grade is not None for grade in labels) else None,
        "soft_label": soft,
        "group": None if row.get("group") in (None, "") else str(row["group"]),
        **{name: row.get(name) for name in PLACE_COLUMNS},
    }


def _parse_label(column: str, value: Any) -> Grade | None:
    """Parse a cell of a label; None for an empty one.

    Raises:
        ValueError: it is not a grade.
    """
    text = "" if value is None else str(value).strip()
    grade = parse_grade(text.removesuffix(".0"))  # pandas writes integers next to empty cells as floats
    if grade is None and text.lower() not in _NO_LABEL:
        raise ValueError(f"{column} {text!r} is not a grade: 0 to 3, or a grade's name")
    return grade


def _batches(table: str) -> Generator[pa.RecordBatch, None, None]:
    is_csv = not table.lower().endswith(".parquet")
    encoding = _encoding(table) if is_csv else ""
    with storage.explain_errors(table), _open(table) as file:
        try:
            if is_csv:
                read = pyarrow.csv.ReadOptions(encoding=encoding)
                yield from pyarrow.csv.open_csv(file, read_options=read, convert_options=_as_text())
            else:
                yield from pq.ParquetFile(file).iter_batches(10_000)
        except pa.ArrowInvalid as error:
            raise UserError(f"{table} cannot be read as a table: {error}; export it again") from error


def _open(table: str) -> io.BufferedReader:
    """Open a file whose reads are retried while the server is unavailable."""
    return io.BufferedReader(storage.call_with_retries(table, storage.open_raw, table), _PIECE)


def _as_text() -> pyarrow.csv.ConvertOptions:
    """Read columns as text: Arrow's type inference turns "007" into 7 and "NA" into null."""
    known = chain(COLUMNS, *SYMPTOM_COLUMNS.values())
    names = {spelt for name in known for spelt in (name, name.upper(), name.capitalize())}
    return pyarrow.csv.ConvertOptions(
        column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=True, null_values=[""]
    )


def _encoding(table: str) -> str:
    """Detect the encoding of a CSV by reading it once: UTF-8 or cp949 (Excel in Korea).

    Raises:
        UserError: the file is in another encoding.
    """
    with storage.explain_errors(table):
        for encoding in _ENCODINGS:
            with io.TextIOWrapper(_open(table), encoding, newline="") as text, suppress(UnicodeDecodeError):
                while text.read(_PIECE):
                    pass
                return encoding.removesuffix("-sig")
    raise UserError(f"{table} is neither UTF-8 nor cp949 (Korean Windows); save it as CSV UTF-8")
