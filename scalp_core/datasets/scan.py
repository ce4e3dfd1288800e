"""Everything a source holds, object by object: listed here, in shards, and examined by `examination`.

An object is a file, or a member of an archive. A compressed or plain tar has no table of contents, so it is
listed as one object and becomes its members when it is examined, in one pass.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, TypeVar

import pyarrow as pa

from scalp_core import archives, storage
from scalp_core.datasets import locations, tables
from scalp_core.datasets.tables import TABLE_SUFFIXES, is_table
from scalp_core.errors import IMAGE_CODES, UserError
from scalp_core.images import signature

_log = logging.getLogger(__name__)

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
        "version": pa.string(),  # of the file; it changes with the content
        "byte_offset": pa.int64(),  # of a row of a manifest, as there
        "byte_length": pa.int64(),
        "compression": pa.string(),
        "sha256": pa.string(),
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
        "hash": pa.uint64(),  # perceptual; null for an image of one color
        "turned_hash": pa.uint64(),  # the same for all mirrorings and rotations
        "thumbnail": pa.binary(signature.THUMBNAIL_BYTES),
        "values": pa.list_(pa.int8()),
        "sex": pa.string(),
        "age": pa.string(),
        "byte_offset": pa.int64(),  # where a member's bytes are in its archive; `archives.Place`
        "byte_length": pa.int64(),
        "compression": pa.string(),
    }
)

# What can be wrong with an object beside errors.IMAGE_CODES.
OBJECT_CODES = {
    "bad_label": "the label file does not hold six grades, or the table's label is no grade",
    "bad_meta": "the META file is no JSON object",
    "shadowed_member": "a later member of the archive has the same name",
}

T = TypeVar("T")

# A flat prefix of millions of files is listed by one task; of folders, a driver holds so many names.
_FILES_TO_LOOK_AT = 5_000
_MANY_ROOTS = 64
_MOST_ROOTS = 100_000
_LISTING_THREADS = 16


@dataclass(frozen=True)
class Root:
    """A piece of a source that is listed by one task.

    Args:
        uri: file, folder or prefix.
        whole: with all that lies below; else only the files directly in it.
        within: real path of a local folder; links out of it are refused. Empty for no bound.
    """

    uri: str
    whole: bool = True
    within: str = ""


def divide_source(source: str, links: bool = True) -> list[Root]:
    """Divides a source for tasks that list beside each other: its folders, or those in them if they are few.

    Args:
        source: file, folder or prefix.
        links: links of a local folder may lead out of it; else each that does is a row with a code.

    Raises:
        UserError: it is missing, or storage refused.
    """
    source = storage.absolute(source)
    within = "" if links or storage.is_s3(source) else source  # resolved above
    if storage.is_file(source):
        if not (is_table(source) or archives.is_archive(source) or locations.is_image_name(source)):
            raise UserError(
                f"{source} is no folder, archive ({', '.join(archives.SUFFIXES)}), table "
                f"({', '.join(TABLE_SUFFIXES)}) or photograph; name one of these"
            )
        return [Root(source, within=within)]
    found: list[Root] = []
    level = [source]
    for _ in range(2):
        if len(level) > _MANY_ROOTS:
            break
        below: list[str] = []
        for folder in level:
            has_files, folders = _look(folder, _MOST_ROOTS - len(below), within)
            if folders is None:
                found.append(Root(folder, within=within))
                continue
            found += [Root(folder, whole=False, within=within)] if has_files else []
            below += folders
        level = below
    return found + [Root(folder, within=within) for folder in level]


def _look(folder: str, most: int, within: str) -> tuple[bool, list[str] | None]:
    """Whether files are directly in a folder, and the folders in it; None for too many of either."""
    files, folders = 0, []
    for some_files, some_folders in storage.list_children(folder, within or None):
        files += len(some_files)
        folders += some_folders
        if files > _FILES_TO_LOOK_AT or len(folders) > most:
            return True, None
        if any(_as_utf8(name) != name for name in some_folders):  # no name to hand to another process
            return True, None
    return files > 0, sorted(folders)


def list_root(root: Root) -> Iterator[dict[str, Any]]:
    """Rows of `LISTED`: every object of a piece of a source, as it is found, in constant memory.

    Raises:
        UserError: storage refused, or a table lacks its columns.
    """
    if is_table(root.uri) and storage.is_file(root.uri):
        yield from tables.read_rows(root.uri)
        return
    within = root.within or None
    direct = (file for files, _ in storage.list_children(root.uri, within) for file in files)
    files = storage.walk(root.uri, within) if root.whole else direct
    with ThreadPoolExecutor(_LISTING_THREADS) as pool:  # a table of contents is a few requests to S3
        for some in batched(files, _LISTING_THREADS):  # all their members are held
            each = pool.map if any(archives.is_archive(file.uri) for file in some) else map
            yield from chain.from_iterable(each(_file_rows, some))


def _file_rows(file: storage.StoredFile) -> list[dict[str, Any]]:
    try:
        return [row | {"version": file.version} for row in _rows_of_file(file)]
    except UserError:  # storage refused, which ends the listing
        raise
    except Exception as error:
        return [internal_error(listed_row(_as_utf8(file.uri), None, file.size), error)]


def _rows_of_file(file: storage.StoredFile) -> list[dict[str, Any]]:
    name = _as_utf8(file.uri)
    if name != file.uri:
        return [listed_row(name, None, file.size, "bad_name", "rename it, for example with convmv -f cp949")]
    if file.is_outside:
        return [listed_row(file.uri, None, None, "outside_link")]
    if file.size is None:
        return [listed_row(file.uri, None, None, "not_found", "a link to a file that is not there")]
    if not archives.is_archive(file.uri) or archives.is_stream(file.uri):
        return [listed_row(file.uri, None, file.size)]
    try:
        members = archives.list_members(file.uri)
    except UserError as error:
        if storage.is_transient(error):  # an unavailable server is not damage
            raise
        return [listed_row(file.uri, None, file.size, "bad_archive", str(error))]
    if not members:
        return [listed_row(file.uri, None, file.size)]
    last = {member.name: index for index, member in enumerate(members)}
    return [
        listed_row(file.uri, member.name, member.size, member_code(member.name, last[member.name] == index))
        for index, member in enumerate(members)
    ]


def internal_error(row: dict[str, Any], error: Exception) -> dict[str, Any]:
    """A row for an object that raised what nobody expected: it must not end the run."""
    _log.warning("%s: unexpected %r", name_of(row), error, exc_info=error)
    return row | {"code": "internal_error", "error": f"{type(error).__name__}: {error}"[:1000]}


def _as_utf8(name: str) -> str:
    r"""A name as it can be written down; another than `name` if its bytes are not UTF-8 (`\xb9` for each).

    Different names stay different, but for one that holds such a backslash of its own.
    """
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def member_code(name: str, readable: bool) -> str | None:
    if not readable:
        return "shadowed_member"
    return "nested_archive" if archives.is_archive(name) else None


def listed_row(
    uri: str, member: str | None, size: int | None, code: str | None = None, error: str | None = None
) -> dict[str, Any]:
    error = error or ((IMAGE_CODES | OBJECT_CODES)[code] if code else None)
    return {"uri": uri, "member": member, "bytes": size, "code": code, "error": error}


def name_of(row: dict[str, Any]) -> str:
    return row["member"] or row["uri"]


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while some := list(islice(iterator, size)):
        yield some
