"""Members of `.zip`, `.tar` and `.tar.gz` archives, read where they lie, local or in S3; never extracted.

A zip and a plain tar are read by range: one member costs its own bytes. A compressed tar can only be read
from its beginning, so it is read once, onwards, as long as members are asked for in its order. Members' names
are labels and are never used as paths; links and devices are no members.
"""

from __future__ import annotations

import io
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future

import pyarrow as pa

from scalp_core import storage
from scalp_core.archives import tars
from scalp_core.archives.base import Archive, Member, Place, Placed, too_many_bytes, unpack
from scalp_core.archives.byte_ranges import read_ranges
from scalp_core.archives.zips import Zip
from scalp_core.errors import ImageError
from scalp_core.storage.errors import ArchiveError

__all__ = [
    "ArchiveError",
    "Member",
    "Place",
    "Placed",
    "is_archive",
    "is_stream",
    "list_members",
    "open_zip_in_memory",
    "read_members",
    "read_placed",
    "read_places",
    "stream_members",
    "stream_members_of_file",
    "too_many_bytes",
]

ZIP_SUFFIX = ".zip"
SUFFIXES = (ZIP_SUFFIX, ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")

# What a process keeps open, as more is asked of the same one; the last may hold more members than this. A
# compressed tar holds 24 MiB, and there are few of them.
_OPEN_ARCHIVES = 512
_OPEN_MEMBERS = 500_000


def is_archive(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)


def is_stream(uri: str) -> bool:
    """Whether an archive has no table of contents, so that listing it means reading it."""
    return is_archive(uri) and not uri.lower().endswith(ZIP_SUFFIX)


def list_members(uri: str) -> list[Member]:
    """All members in the order of the archive; of those that share a name only the last can be read.

    Raises:
        UserError: it is missing, damaged, hostile or no archive.
    """
    with storage.explain_errors(uri):
        return storage.call_with_retries(uri, _opened, uri).members()


def stream_members(
    uri: str, max_bytes: int, wanted: Callable[[str], bool] = lambda _: True
) -> Iterator[tuple[Member, bytes | ImageError | None]]:
    """All members of a tar in one pass, in its order, each with its bytes or why they cannot be had.

    It is read ahead in pieces of 8 MiB; 24 MiB are held, and one member.

    Args:
        uri: of a tar, plain or compressed.
        max_bytes: of a member; what is larger is refused unread.
        wanted: whether a member of this name is read; of the others the bytes are None.

    Raises:
        UserError: the archive cannot be opened, or not be read on from here. Whether it may be later says
            `storage.is_transient`.
    """
    with storage.explain_errors(uri):
        yield from _entries(tars.stream(uri), max_bytes, wanted)


def stream_members_of_file(
    raw: io.RawIOBase, max_bytes: int, wanted: Callable[[str], bool]
) -> Iterator[tuple[Member, bytes | ImageError | None]]:
    """As `stream_members`, of a tar that is still coming; `tars.stream_raw` says what is asked of the file.

    Raises:
        ArchiveError: it is no tar, or cannot be read on.
    """
    return _entries(tars.stream_raw(raw), max_bytes, wanted)


def _entries(
    entries: Iterator[tars.Entry], max_bytes: int, wanted: Callable[[str], bool]
) -> Iterator[tuple[Member, bytes | ImageError | None]]:
    for entry, file in entries:
        name = tars.entry_name(entry)
        data = tars.read_entry(entry, file, max_bytes) if wanted(name) else None
        yield Member(name, entry.size, tars.place_of(entry, file)), data


def open_zip_in_memory(data: pa.Buffer, max_members: int) -> Zip:
    """A zip whose bytes are in memory.

    Raises:
        ArchiveError: it is no zip, damaged, hostile, or holds more members.
    """
    return Zip("archive.zip", data, max_members)


def read_members(uri: str, names: Sequence[str], max_bytes: int) -> Iterator[bytes | ImageError]:
    """The bytes of each member, in order, or why they are unavailable; see `read_placed`."""
    return (placed.data for placed in read_placed(uri, names, max_bytes))


def read_placed(uri: str, names: Sequence[str], max_bytes: int) -> Iterator[Placed]:
    """Each member by its name, in order, and where its bytes are. Fastest in the archive's order.

    Of a zip or a plain tar 16 MiB are held, and one member; of a compressed tar all that are requested.

    Raises:
        OSError: the archive itself cannot be read; `ArchiveError` when it is damaged, hostile or none.
    """
    yield from storage.call_with_retries(uri, _opened, uri).read(names, max_bytes)


def read_places(uri: str, places: Sequence[Place], max_bytes: int) -> Iterator[bytes | ImageError]:
    """The bytes of members by their places, in order, without opening the archive.

    Raises:
        OSError: storage refused.
    """
    sized = [place for place in places if place.length <= max_bytes]
    data = read_ranges(uri, [(place.offset, place.offset + place.length) for place in sized])
    for place in places:
        if place.length > max_bytes:
            yield too_many_bytes(place.length, max_bytes)
        else:
            yield unpack(next(data), place, max_bytes)


class _OpenArchives:
    """The archives that this process read last, by uri, size and time of change."""

    def __init__(self) -> None:
        self._archives: OrderedDict[tuple[str, str], Future[Archive]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, uri: str) -> Archive:
        file = next(storage.walk(uri), None)
        if file is None:
            raise FileNotFoundError(f"{uri} is an empty folder")
        key = (uri, file.version)
        with self._lock:
            opened = self._archives.get(key)
            is_first = opened is None
            if opened is None:
                opened = self._archives[key] = Future()
            self._archives.move_to_end(key)
        if is_first:  # the others wait for it
            self._open(key, opened)
        return opened.result()

    def _open(self, key: tuple[str, str], opened: Future[Archive]) -> None:
        uri, _ = key
        try:
            archive: Archive = Zip(uri) if uri.lower().endswith(ZIP_SUFFIX) else tars.open_tar(uri)
        except BaseException as error:
            with self._lock:
                self._archives.pop(key, None)
            opened.set_exception(error)
            return
        opened.set_result(archive)
        with self._lock:
            while len(self._archives) > 1 and self._are_many():
                self._archives.popitem(last=False)

    def _are_many(self) -> bool:
        opened = (archive.result().held for archive in self._archives.values() if archive.done())
        return len(self._archives) > _OPEN_ARCHIVES or sum(opened) > _OPEN_MEMBERS


_open_archives = _OpenArchives()


def _opened(uri: str) -> Archive:
    return _open_archives.get(uri)
