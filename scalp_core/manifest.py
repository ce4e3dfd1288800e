"""The manifest: one row a photograph, where it is and what is known of it. Data in, everything follows."""

from __future__ import annotations

import hashlib
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from scalp_core import storage
from scalp_core.errors import UserError
from scalp_core.storage import Location

MANIFEST_FILE = "manifest.parquet"
PARTS = ("train", "val", "test")

SCHEMA = pa.schema(
    {
        "image_id": pa.string(),
        "uri": pa.string(),
        "member": pa.string(),
        "sha256": pa.string(),
        "width": pa.int32(),
        "height": pa.int32(),
        "label": pa.int8(),
        "labels": pa.list_(pa.int8()),  # six symptoms, in the order of grades.SYMPTOMS
        "site": pa.string(),
        "device": pa.string(),
        "captured_at": pa.timestamp("ms", tz="UTC"),
        "position": pa.string(),
        "group": pa.string(),
        "split": pa.string(),
        "source_note": pa.string(),
    }
)


def location_id(location: Location) -> str:
    """Names a photograph by where it is, before its bytes are known: unique among the rows of a job."""
    return hashlib.sha256(str(location).encode()).hexdigest()[:20]


def write_manifest(data: str, rows: list[dict[str, Any]]) -> pa.Table:
    """Writes the rows to `data/manifest.parquet` and returns them as a table."""
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    storage.write_parquet(storage.join(data, MANIFEST_FILE), table)
    return table


def read_manifest(data: str) -> pa.Table:
    """Reads and checks a prepared data directory.

    Raises:
        UserError: there is no manifest, or it is not one, or its parts leak into each other.
    """
    uri = storage.join(storage.absolute(data), MANIFEST_FILE)
    if not storage.exists(uri):
        raise UserError(f"{data} has no {MANIFEST_FILE}; make one with: scalp prepare SOURCE {data}")
    table = storage.read_parquet(uri)
    missing = [name for name in SCHEMA.names if name not in table.column_names]
    if missing:
        raise UserError(f"{uri} lacks the columns {', '.join(missing)}; run scalp prepare again")
    table = table.select(SCHEMA.names).cast(SCHEMA)
    check_parts(table)
    return table


def manifest_sha256(data: str) -> str:
    """Hash of the manifest file: the same data, the same hash."""
    return hashlib.sha256(storage.read(storage.join(storage.absolute(data), MANIFEST_FILE))).hexdigest()


def part(table: pa.Table, name: str) -> pa.Table:
    """The labelled rows of one part.

    Raises:
        UserError: the part is empty.
    """
    rows = table.filter((pc.field("split") == name) & pc.field("label").is_valid())
    if not rows.num_rows:
        known = sorted({value for value in table["split"].to_pylist() if value})
        raise UserError(f"the manifest has no labelled photograph in part {name!r}; it has {known}")
    return rows


def check_parts(table: pa.Table) -> None:
    """Refuses parts that share a group or a content: what is learned there would be tested here.

    Raises:
        UserError: names the first value that is in two parts.
    """
    for column, what in (("group", "group"), ("sha256", "content hash")):
        seen: dict[str, str] = {}
        for value, name in zip(table[column].to_pylist(), table["split"].to_pylist(), strict=True):
            if value is None or name is None:
                continue
            if seen.setdefault(value, name) != name:
                raise UserError(
                    f"the split leaks: {what} {value} is in both {seen[value]} and {name}; "
                    "run scalp prepare again instead of editing the split"
                )
