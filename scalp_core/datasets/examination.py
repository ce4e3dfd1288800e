"""Examine the objects of a source: read, hash and decode each, into rows of `scan.EXAMINED`.

An unexpected error fails one object: its row has an error code and the message.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from itertools import chain
from typing import Any

import pyarrow as pa

from scalp_core import archives
from scalp_core.archives import Placed
from scalp_core.datasets import aihub, tables
from scalp_core.datasets import locations as datasets_locations
from scalp_core.datasets.locations import Location, location_of
from scalp_core.datasets.scan import (
    EXAMINED,
    SYNTHETIC_MARK,
    batched,
    internal_error,
    name_of,
)
from scalp_core.errors import ImageError
from scalp_core.images import codecs, signature

_READ_KINDS = ("photograph", "label", "meta")
_MAX_JSON_BYTES = 2**20
_HEAD_BYTES = 2**12
_FETCH_THREADS = 8
_PIECE = 64

Content = Callable[[str, bytes], dict[str, Any]]
"""Decodes the bytes of an object; `read_content`, or its call in another process."""


def read_content(kind: str, data: bytes) -> dict[str, Any]:
    """Decode the bytes of an image, label or META file to columns of `EXAMINED`.

    Raises:
        ImageError: an image cannot be decoded.
        ValueError: a label or META file is invalid.
    """
    if kind == "photograph":
        width, height = codecs.picture_size(data)
        sizes = {"sha256": sha256(data).hexdigest(), "width": width, "height": height}
        return sizes | signature.compute_signature(data)._asdict()
    text = data[: _MAX_JSON_BYTES + 1]
    if kind == "label":
        return {"values": aihub.read_label(text)}
    return {name: value for name, value in aihub.read_meta(text).items() if value}


@dataclass(frozen=True)
class Examination:
    """Settings for examining objects."""

    base: str  # start of the uris above the source, which is not searched for grades
    content: Content = read_content  # decodes the bytes of an object


def examine(rows: list[dict[str, Any]], settings: Examination) -> Iterator[pa.Table]:
    """Read, hash and decode rows of `LISTED`; yields tables of `EXAMINED` with at most 512 rows each."""
    for chunk in batched(rows, _PIECE * _FETCH_THREADS):
        # Members of one archive stay together; pieces are fetched and decoded in parallel.
        pieces = list(batched(chunk, _PIECE))
        with ThreadPoolExecutor(_FETCH_THREADS) as pool:
            examined = pool.map(lambda piece: _examine_piece(piece, settings), pieces)
            yield _table(chain.from_iterable(examined))


def _examine_piece(rows: Iterable[dict[str, Any]], settings: Examination) -> list[dict[str, Any]]:
    rows = list(rows)
    wanted = [not row["code"] and (row.get("kind") or _kind(name_of(row))) in _READ_KINDS for row in rows]
    locations = [location_of(row) for row, is_wanted in zip(rows, wanted, strict=True) if is_wanted]
    placed = datasets_locations.read_placed(locations, codecs.MAX_BYTES)  # a few in memory at a time
    examined = []
    for row, is_wanted in zip(rows, wanted, strict=True):
        content = next(placed) if is_wanted else None
        if content and row.get("kind") and _is_missing(content):
            row, content = _find_other_spelling(row, content, settings.base)
        examined.append(_examine_row(row, content, settings))
    return examined


def _is_missing(placed: Placed) -> bool:
    return isinstance(placed.data, ImageError) and placed.data.code == "not_found"


def _find_other_spelling(row: dict[str, Any], missing: Placed, base: str) -> tuple[dict[str, Any], Placed]:
    """Find the file or member of a table's row under another Unicode form of its name."""
    below = row["uri"].removeprefix(base)
    uris = [row["uri"], *(row["uri"].removesuffix(below) + other for other in tables.unicode_forms(below))]
    members = [row["member"], *(tables.unicode_forms(row["member"]) if row["member"] else ())]
    for uri in uris:
        for member in members:
            (content,) = datasets_locations.read_placed([Location(uri, member)], codecs.MAX_BYTES)
            if not _is_missing(content):
                return row | {"uri": uri, "member": member}, content
    return row, missing


def _table(rows: Iterable[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist(list(rows), schema=EXAMINED)


def _kind(name: str) -> str:
    base = name.rsplit("/", 1)[-1]
    if datasets_locations.is_image_name(name):
        return "photograph"
    if archives.is_archive(name):
        return "archive"
    if base.lower().endswith(".json") and not base.startswith("."):
        return "meta" if base.endswith(aihub.META_SUFFIX) else "label"
    return "other"


def _examine_row(row: dict[str, Any], placed: Placed | None, settings: Examination) -> dict[str, Any]:
    """Examine one object to a row of `EXAMINED`; an unexpected error becomes the code of the row."""
    try:
        return _examine_object(row, placed, settings)
    except Exception as error:
        known = {name: row[name] for name in ("uri", "member", "bytes")}
        return internal_error(known | {"kind": row.get("kind") or _kind(name_of(row))}, error)


def _examine_object(row: dict[str, Any], placed: Placed | None, settings: Examination) -> dict[str, Any]:
    name = name_of(row)
    path = row["uri"].removeprefix(settings.base) + (f"/{row['member']}" if row["member"] else "")
    folders, stem = aihub.read_folders(path.rpartition("/")[0]), aihub.stem_of(name)
    examined = {column: row[column] for column in ("uri", "member", "bytes", "code", "error")} | {
        "kind": row.get("kind") or _kind(name),
        "stem": stem,
        "part": folders.part,
        "symptom": folders.symptom,
        "folder_grade": folders.grade,
        "class_grade": folders.class_grade,
        "given_label": row.get("label"),
        "given_labels": row.get("labels"),
        "soft_label": row.get("soft_label"),
        "given_group": row.get("group"),
    }
    shot = aihub.read_stem(stem)
    examined |= vars(shot) if shot else {}
    if placed is None or examined["code"] or examined["kind"] not in _READ_KINDS:
        return examined
    data, place = placed
    if isinstance(data, ImageError):
        return examined | {"code": data.code, "error": data.message}
    examined |= {"bytes": len(data), "synthetic": SYNTHETIC_MARK in data[:_HEAD_BYTES]}
    if place:
        examined |= {
            "byte_offset": place.offset,
            "byte_length": place.length,
            "compression": place.compression,
        }
    try:
        return examined | settings.content(examined["kind"], data)
    except ImageError as error:
        return examined | {"code": error.code, "error": error.message}
    except ValueError as error:
        if examined["kind"] == "photograph":
            raise
        if examined["kind"] == "label" and folders.symptom is None and b'"value_' not in data:
            return examined | {"kind": "other"}  # a JSON file that is not a label
        return examined | {"code": f"bad_{examined['kind']}", "error": str(error)}
