"""Everything a source holds, object by object: first listed, in shards, then examined, shard by shard.

An object is a file, or a member of an archive. A compressed or plain tar has no table of contents, so it is
listed as one object and becomes its members when it is examined, in one pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from itertools import chain, islice
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from scalp_core import aihub, archives, codecs, near_duplicates, sources, storage
from scalp_core.errors import IMAGE_CODES, ImageError, UserError
from scalp_core.grades import parse_grade
from scalp_core.sources import Location

TABLE_SUFFIXES = (".csv", ".parquet")

LISTED = pa.schema(
    {
        "uri": pa.string(),
        "member": pa.string(),
        "bytes": pa.int64(),
        "code": pa.string(),  # why it cannot be examined; null if it can
        "error": pa.string(),
        "kind": pa.string(),  # photograph for a table's row, whatever its name; else the name tells
        "label": pa.int8(),  # of a table's row
        "group": pa.string(),
    }
)

EXAMINED = pa.schema(
    {
        "uri": pa.string(),
        "member": pa.string(),
        "kind": pa.string(),  # photograph, label, meta, other, archive
        "bytes": pa.int64(),
        "code": pa.string(),  # of errors.IMAGE_CODES, or of OBJECT_CODES; null where nothing is wrong
        "error": pa.string(),
        "stem": pa.string(),
        "part": pa.string(),
        "symptom": pa.int8(),
        "folder_grade": pa.int8(),
        "class_grade": pa.int8(),
        "given_label": pa.int8(),
        "given_group": pa.string(),
        "site": pa.string(),
        "device": pa.string(),
        "session": pa.string(),
        "captured_at": pa.timestamp("ms", tz="UTC"),
        "position": pa.string(),
        "sha256": pa.string(),
        "width": pa.int32(),
        "height": pa.int32(),
        "hash": pa.uint64(),  # perceptual
        "thumbnail": pa.binary(near_duplicates.THUMBNAIL_BYTES),
        "values": pa.list_(pa.int8()),
        "sex": pa.string(),
        "age": pa.string(),
    }
)

# What can be wrong with an object beside errors.IMAGE_CODES.
OBJECT_CODES = {
    "bad_label": "the label file does not hold six grades, or the table's label is no grade",
    "bad_meta": "the META file is no JSON object",
    "shadowed_member": "a later member of the archive has the same name",
}

T = TypeVar("T")

_MAX_JSON_BYTES = 2**20
_PAGES_TO_LOOK_AT = 5
_MANY_ROOTS = 64
_LISTING_THREADS = 16
_FETCH_THREADS = 8
_PIECE = 64


@dataclass(frozen=True)
class Root:
    """A piece of a source that is listed by one task.

    Args:
        uri: file, folder or prefix.
        whole: with all that lies below; else only the files directly in it.
    """

    uri: str
    whole: bool = True


# Guessing types, Arrow would take "007" for a number, and "mild" below numbers for an error.
_AS_TEXT = pyarrow.csv.ConvertOptions(
    column_types={
        spelt: pa.string()
        for name in ("uri", "member", "label", "group")
        for spelt in (name, name.upper(), name.capitalize())
    },
    strings_can_be_null=True,
)


def is_table(source: str) -> bool:
    return source.lower().endswith(TABLE_SUFFIXES)


def roots(source: str) -> list[Root]:
    """Divides a source for tasks that list beside each other: its folders, or those in them if they are few.

    Raises:
        UserError: it is missing, or storage refused.
    """
    source = storage.absolute(source)
    if storage.is_file(source):
        if not (is_table(source) or archives.is_archive(source) or sources.is_photograph(source)):
            raise UserError(
                f"{source} is no folder, archive ({', '.join(archives.SUFFIXES)}), table "
                f"({', '.join(TABLE_SUFFIXES)}) or photograph; name one of these"
            )
        return [Root(source)]
    found: list[Root] = []
    level = [source]
    for _ in range(2):
        if len(level) > _MANY_ROOTS:
            break
        below: list[str] = []
        for folder in level:
            has_files, folders = _look(folder)
            if folders is None:
                found.append(Root(folder))
                continue
            found += [Root(folder, whole=False)] if has_files else []
            below += folders
        level = below
    return found + [Root(folder) for folder in level]


def _look(folder: str) -> tuple[bool, list[str] | None]:
    """Whether there are files directly in a folder, and the folders in it; None where that takes too long."""
    has_files, folders = False, []
    for number, (files, some) in enumerate(storage.children(folder)):
        if number == _PAGES_TO_LOOK_AT:  # a flat prefix of millions: one task lists it
            return True, None
        if any(_as_utf8(name) != name for name in some):  # no name to hand to another process
            return True, None
        has_files = has_files or bool(files)
        folders += some
    return has_files, sorted(folders)


def list_root(root: Root) -> Iterator[dict[str, Any]]:
    """Rows of `LISTED`: every object of a piece of a source, as it is found, in constant memory.

    Raises:
        UserError: storage refused, or a table lacks its columns.
    """
    if is_table(root.uri) and storage.is_file(root.uri):
        yield from _table_rows(root.uri)
        return
    direct = (file for files, _ in storage.children(root.uri) for file in files)
    files = storage.walk(root.uri) if root.whole else direct
    with ThreadPoolExecutor(_LISTING_THREADS) as pool:  # a table of contents is a few requests to S3
        for some in _batched(files, _LISTING_THREADS):  # all their members are held
            each = pool.map if any(archives.is_archive(file.uri) for file in some) else map
            yield from chain.from_iterable(each(_file_rows, some))


def _file_rows(file: storage.StoredFile) -> list[dict[str, Any]]:
    name = _as_utf8(file.uri)
    if name != file.uri:
        return [_listed(name, None, file.size, "bad_name", "rename it, for example with convmv -f cp949")]
    if not archives.is_archive(file.uri) or archives.is_stream(file.uri):
        return [_listed(file.uri, None, file.size)]
    try:
        members = archives.list_members(file.uri)
    except UserError as error:
        if storage.is_transient(error):  # a server that is away is no damage
            raise
        return [_listed(file.uri, None, file.size, "bad_archive", str(error))]
    if not members:
        return [_listed(file.uri, None, file.size)]
    last = {member.name: index for index, member in enumerate(members)}
    return [
        _listed(file.uri, name, size, _member_code(name, last[name] == index))
        for index, (name, size) in enumerate(members)
    ]


def _as_utf8(name: str) -> str:
    r"""A name as it can be written down; another than `name` if its bytes are not UTF-8 (`\xb9` for each).

    Different names stay different, but for one that holds such a backslash of its own.
    """
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _member_code(name: str, readable: bool) -> str | None:
    if not readable:
        return "shadowed_member"
    return "nested_archive" if archives.is_archive(name) else None


def _listed(
    uri: str, member: str | None, size: int | None, code: str | None = None, error: str | None = None
) -> dict[str, Any]:
    error = error or ((IMAGE_CODES | OBJECT_CODES)[code] if code else None)
    return {"uri": uri, "member": member, "bytes": size, "code": code, "error": error}


def _table_rows(table: str) -> Iterator[dict[str, Any]]:
    folder = table.rsplit("/", 1)[0]
    for batch in _table_batches(table):
        columns = {name.lower(): name for name in batch.schema.names}
        if "uri" not in columns:
            raise UserError(
                f"{table} has no column uri, only {', '.join(batch.schema.names)}; "
                "give it the columns uri, label and, if you like, member and group"
            )
        wanted = {key: columns[key] for key in ("uri", "member", "label", "group") if key in columns}
        for row in batch.select(list(wanted.values())).to_pylist():
            yield _table_row({key: row[name] for key, name in wanted.items()}, folder)


def _table_row(row: dict[str, Any], folder: str) -> dict[str, Any]:
    uri = str(row["uri"] or "").strip()
    # Relative uris are below the table, so that a folder can be moved with its table.
    full = uri if "://" in uri or uri.startswith("/") else storage.join(folder, uri)
    missing = (None, None) if uri else ("not_found", "the row names no uri")
    listed = _listed(full, str(row["member"]) if row.get("member") else None, None, *missing)
    text = "" if row.get("label") is None else str(row["label"]).strip()
    label = parse_grade(text.removesuffix(".0"))  # pandas makes floats of integers beside empty cells
    if text and label is None:
        listed |= {"code": "bad_label", "error": f"label {text!r} is no grade: 0 to 3, or a grade's name"}
    group = None if row.get("group") in (None, "") else str(row["group"])
    return listed | {"kind": "photograph", "label": label, "group": group}


def _table_batches(table: str) -> Iterator[pa.RecordBatch]:
    with storage.explained(table), storage.open_file(table) as file:
        try:
            if table.lower().endswith(".parquet"):
                yield from pq.ParquetFile(file).iter_batches(10_000)
            else:
                yield from pyarrow.csv.open_csv(file, convert_options=_AS_TEXT)
        except pa.ArrowInvalid as error:
            raise UserError(f"{table} cannot be read as a table: {error}; write it again") from error


def examine(rows: list[dict[str, Any]], base: str) -> Iterator[pa.Table]:
    """Reads, hashes and decodes listed objects: tables of `EXAMINED`, at most a few hundred rows each.

    Args:
        rows: of `LISTED`.
        base: start of the uris that says nothing about grades; what lies above the source.
    """
    plain = []
    for row in rows:
        if not (row["code"] or row["member"] or row.get("kind")) and archives.is_stream(row["uri"]):
            yield from _examine_stream(row, base)
        else:
            plain.append(row)
    for some in _batched(plain, _PIECE * _FETCH_THREADS):
        # Members of one archive stay together; pieces are fetched and decoded beside each other.
        pieces = list(_batched(some, _PIECE))
        with ThreadPoolExecutor(_FETCH_THREADS) as pool:
            examined = pool.map(lambda piece: _examine_piece(piece, base), pieces)
            yield _table(chain.from_iterable(examined))


def _examine_piece(rows: Iterable[dict[str, Any]], base: str) -> list[dict[str, Any]]:
    rows = list(rows)
    wanted = [not row["code"] and (row.get("kind") or _kind(_name(row))) in _CONTENT for row in rows]
    locations = [
        Location(row["uri"], row["member"]) for row, is_wanted in zip(rows, wanted, strict=True) if is_wanted
    ]
    data = sources.read_photographs(locations, codecs.MAX_BYTES)  # a few in memory at a time
    return [
        _examined(row, next(data) if is_wanted else None, base)
        for row, is_wanted in zip(rows, wanted, strict=True)
    ]


def _examine_stream(row: dict[str, Any], base: str) -> Iterator[pa.Table]:
    """A tar in one pass. Of members that share a name only the last can be read: the first are shadowed."""
    seen: dict[str, int] = {}
    found: list[dict[str, Any]] = []
    damage = None
    try:
        for member, data in archives.stream(
            row["uri"], codecs.MAX_BYTES, lambda name: _kind(name) in _CONTENT
        ):
            if member.name in seen:
                first = seen[member.name]
                shadowed = _listed(row["uri"], member.name, found[first]["bytes"], "shadowed_member")
                found[first] = _examined(shadowed, None, base)
            seen[member.name] = len(found)
            listed = _listed(row["uri"], member.name, member.size, _member_code(member.name, readable=True))
            found.append(_examined(listed, data, base))
    except UserError as error:
        if storage.is_transient(error):
            raise
        damage = _listed(row["uri"], None, row["bytes"], "bad_archive", str(error))
    if damage or not found:
        found.append(_examined(damage or row, None, base))
    for some in _batched(found, _PIECE * _FETCH_THREADS):
        yield _table(some)


def _table(rows: Iterable[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist(list(rows), schema=EXAMINED)


def _name(row: dict[str, Any]) -> str:
    return row["member"] or row["uri"]


def _kind(name: str) -> str:
    base = name.rsplit("/", 1)[-1]
    if sources.is_photograph(name):
        return "photograph"
    if archives.is_archive(name):
        return "archive"
    if base.lower().endswith(".json") and not base.startswith("."):
        return "meta" if base.endswith(aihub.META_SUFFIX) else "label"
    return "other"


def _examined(row: dict[str, Any], data: bytes | ImageError | None, base: str) -> dict[str, Any]:
    name = _name(row)
    path = row["uri"].removeprefix(base) + (f"/{row['member']}" if row["member"] else "")
    folders, stem = aihub.read_folders(path.rpartition("/")[0]), aihub.stem_of(name)
    examined = {
        "uri": row["uri"],
        "member": row["member"],
        "kind": row.get("kind") or _kind(name),
        "bytes": row["bytes"],
        "code": row["code"],
        "error": row["error"],
        "stem": stem,
        "part": folders.part,
        "symptom": folders.symptom,
        "folder_grade": folders.grade,
        "class_grade": folders.class_grade,
        "given_label": row.get("label"),
        "given_group": row.get("group"),
    }
    shot = aihub.read_stem(stem)
    examined |= vars(shot) if shot else {}
    if data is None or examined["code"] or examined["kind"] not in _CONTENT:
        return examined
    if isinstance(data, ImageError):
        return examined | {"code": data.code, "error": data.message}
    try:
        return examined | {"bytes": len(data)} | _CONTENT[examined["kind"]](data)
    except ImageError as error:
        return examined | {"code": error.code, "error": error.message}
    except ValueError as error:
        if examined["kind"] == "label" and folders.symptom is None and b'"value_' not in data:
            return examined | {"kind": "other"}  # some JSON that was never meant to be a label
        return examined | {"code": f"bad_{examined['kind']}", "error": str(error)}


def _photograph(data: bytes) -> dict[str, Any]:
    width, height = codecs.picture_size(data)
    fingerprint, thumbnail = near_duplicates.signature(data)
    return {
        "sha256": sha256(data).hexdigest(),
        "width": width,
        "height": height,
        "hash": fingerprint,
        "thumbnail": thumbnail,
    }


def _label(data: bytes) -> dict[str, Any]:
    return {"values": aihub.read_label(data[: _MAX_JSON_BYTES + 1])}


def _meta(data: bytes) -> dict[str, Any]:
    return {name: value for name, value in aihub.read_meta(data[: _MAX_JSON_BYTES + 1]).items() if value}


_CONTENT = {"photograph": _photograph, "label": _label, "meta": _meta}


def _batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while some := list(islice(iterator, size)):
        yield some
