"""List all objects of a source: files and members of archives. `examination` reads them.

An object is a file, or a member of an archive. A tar has no table of contents: listing its members reads its
headers.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from typing import Any, TypeVar

import pyarrow as pa

from scalp_core import archives, storage
from scalp_core.datasets import locations, tables
from scalp_core.datasets.tables import TABLE_SUFFIXES, is_table
from scalp_core.errors import IMAGE_CODES, UserError
from scalp_core.images import signature
from scalp_core.labels.decisions import LEFT_OUT

_log = logging.getLogger(__name__)

LISTED = pa.schema(
    {
        "uri": pa.string(),
        "member": pa.string(),
        "bytes": pa.int64(),
        "code": pa.string(),  # reason why it cannot be examined; null if it can
        "error": pa.string(),
        "kind": pa.string(),  # photograph for a table's row; null: by the name
        "label": pa.int8(),  # label, grades of the six symptoms and group in a table's row
        "labels": pa.list_(pa.int8()),
        "soft_label": pa.list_(pa.float32()),  # as in a manifest's row; `label` is its likeliest grade
        "group": pa.string(),
        "version": pa.string(),  # version of the file, which changes with its content
        "byte_offset": pa.int64(),  # these four: as in a manifest's row
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
        "code": pa.string(),  # one of errors.IMAGE_CODES or OBJECT_CODES; null without an error
        "error": pa.string(),
        "stem": pa.string(),
        "part": pa.string(),
        "symptom": pa.int8(),
        "folder_grade": pa.int8(),
        "class_grade": pa.int8(),
        "given_label": pa.int8(),
        "given_labels": pa.list_(pa.int8()),
        "soft_label": pa.list_(pa.float32()),
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
        "turned_hash": pa.uint64(),  # equal for all mirrorings and rotations
        "thumbnail": pa.binary(signature.THUMBNAIL_BYTES),
        "values": pa.list_(pa.int8()),
        "sex": pa.string(),
        "age": pa.string(),
        "byte_offset": pa.int64(),  # place of a member's bytes; see `archives.Place`
        "byte_length": pa.int64(),
        "compression": pa.string(),
        "synthetic": pa.bool_(),  # whether an image has `SYNTHETIC_MARK`
    }
)

SYNTHETIC_MARK = b"drawn by scalp synth"
"""Comment in each JPEG of `scalp synth`."""

# Error codes of objects in addition to errors.IMAGE_CODES.
OBJECT_CODES = {
    "bad_label": "the label file does not hold six grades, or the table's label is not a grade",
    "bad_meta": "the META file is not a JSON object",
    "shadowed_member": "a later member of the archive has the same name",
    "already_in_data": "the extended data has this image; its label there counts",
    **LEFT_OUT,
}

T = TypeVar("T")

# One task lists a flat prefix of millions of files; a driver holds at most so many names of folders.
_MAX_LISTED_FILES = 5_000
_MANY_ROOTS = 64
_MOST_ROOTS = 100_000
_LISTING_THREADS = 16


@dataclass(frozen=True)
class Root:
    """A piece of a source that is listed by one task."""

    uri: str  # file, folder or prefix
    whole: bool = True  # whether to list it recursively; else only the files directly in it
    # Real path of a local folder; links out of it are refused. Empty for no bound
    within: str = ""


def divide_source(source: str, links: bool = True) -> list[Root]:
    """Divide a source into folders for listing in parallel; few folders are divided one level deeper.

    Args:
        source: File, folder or prefix.
        links: Whether links may lead out of a local folder; else such a link is a row with a code.

    Raises:
        UserError: the source is missing, or storage failed.
    """
    source = storage.absolute(source)
    within = "" if links or storage.is_s3(source) else source  # resolved above
    if storage.is_file(source):
        if not (is_table(source) or archives.is_archive(source) or locations.is_image_name(source)):
            raise UserError(
                f"{source} is not a folder, archive ({', '.join(archives.SUFFIXES)}), table "
                f"({', '.join(TABLE_SUFFIXES)}) or image; give one of these"
            )
        return [Root(source, within=within)]
    pieces: list[Root] = []
    level = [source]
    for _ in range(2):
        if len(level) > _MANY_ROOTS:
            break
        below: list[str] = []
        for folder in level:
            has_files, folders = _list_folders(folder, _MOST_ROOTS - len(below), within)
            if folders is None:
                pieces.append(Root(folder, within=within))
                continue
            pieces += [Root(folder, whole=False, within=within)] if has_files else []
            below += folders
        level = below
    return pieces + [Root(folder, within=within) for folder in level]


def _list_folders(folder: str, most: int, within: str) -> tuple[bool, list[str] | None]:
    """Whether a folder has files directly in it, and its folders; None if there are too many of either."""
    files, folders = 0, []
    for page_files, page_folders in storage.list_children(folder, within or None):
        files += len(page_files)
        folders += page_folders
        if files > _MAX_LISTED_FILES or len(folders) > most:
            return True, None
        if any(_as_utf8(name) != name for name in page_folders):  # cannot be sent to another process
            return True, None
    return files > 0, sorted(folders)


def list_root(root: Root, open_tars: bool = False) -> Iterator[dict[str, Any]]:
    """List the objects of a piece of a source as rows of `LISTED`, in constant memory.

    Args:
        root: Piece of a source.
        open_tars: Whether to list the members of tars, and refuse compressed ones; else a tar is one object.

    Raises:
        UserError: storage failed, or a table lacks its columns.
    """
    if is_table(root.uri) and storage.is_file(root.uri):
        yield from tables.read_rows(root.uri)
        return
    within = root.within or None
    direct = (file for files, _ in storage.list_children(root.uri, within) for file in files)
    files = storage.walk(root.uri, within) if root.whole else direct
    with ThreadPoolExecutor(_LISTING_THREADS) as pool:  # a table of contents is a few requests to S3
        for chunk in batched(files, _LISTING_THREADS):  # all their members are in memory
            run = pool.map if any(archives.is_archive(file.uri) for file in chunk) else map
            yield from chain.from_iterable(run(partial(_file_rows, open_tars), chunk))


def _file_rows(open_tars: bool, file: storage.StoredFile) -> list[dict[str, Any]]:
    try:
        return [row | {"version": file.version} for row in _rows_of_file(file, open_tars)]
    except UserError:  # storage failed, which ends the listing
        raise
    except Exception as error:
        return [internal_error(listed_row(_as_utf8(file.uri), None, file.size), error)]


def _rows_of_file(file: storage.StoredFile, open_tars: bool) -> list[dict[str, Any]]:
    name = _as_utf8(file.uri)
    if name != file.uri:
        error = "the file's name is not UTF-8; rename it, for example with convmv -f cp949"
        return [listed_row(name, None, file.size, "bad_name", error)]
    if file.is_outside:
        return [listed_row(file.uri, None, None, "outside_link")]
    if file.size is None:
        return [listed_row(file.uri, None, None, "not_found", "a link to a missing file")]
    if not archives.is_archive(file.uri) or (archives.is_stream(file.uri) and not open_tars):
        return [listed_row(file.uri, None, file.size)]
    members: list[archives.Member] = []
    damage = []
    try:
        for member in archives.list_members(file.uri, random_access=open_tars):
            members.append(member)
    except UserError as error:
        if storage.is_transient(error):  # an unavailable server is not damage
            raise
        damage = [listed_row(file.uri, None, file.size, "bad_archive", str(error))]
    if not members:
        return damage or [listed_row(file.uri, None, file.size)]
    last = {member.name: index for index, member in enumerate(members)}
    rows = [_member_row(file.uri, member, last[member.name] == index) for index, member in enumerate(members)]
    return rows + damage


def _member_row(uri: str, member: archives.Member, is_readable: bool) -> dict[str, Any]:
    code = "nested_archive" if archives.is_archive(member.name) else None
    row = listed_row(uri, member.name, member.size, code if is_readable else "shadowed_member")
    if place := member.place:
        row |= {"byte_offset": place.offset, "byte_length": place.length, "compression": place.compression}
    return row


def internal_error(row: dict[str, Any], error: Exception) -> dict[str, Any]:
    """Return a row for an object that raised an unexpected error, so that the run continues."""
    _log.warning("%s: unexpected %r", name_of(row), error, exc_info=error)
    return row | {"code": "internal_error", "error": f"{type(error).__name__}: {error}"[:1000]}


def _as_utf8(name: str) -> str:
    r"""Return a name as valid UTF-8; other bytes are written as `\xb9`."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def listed_row(
    uri: str, member: str | None, size: int | None, code: str | None = None, error: str | None = None
) -> dict[str, Any]:
    error = error or ((IMAGE_CODES | OBJECT_CODES)[code] if code else None)
    return {"uri": uri, "member": member, "bytes": size, "code": code, "error": error}


def name_of(row: dict[str, Any]) -> str:
    return row["member"] or row["uri"]


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch
