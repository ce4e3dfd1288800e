"""Read members of `.zip`, `.tar` and `.tar.gz` archives in place, local or in S3, without extracting them.

A zip and a plain tar are read by range: a member costs only its own bytes. A compressed tar is sequential: it
is read once if members are requested in its order. Names of members are labels and not used as paths. Links
and devices are skipped.
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

# Archives that a process keeps open for later reads; the last one may have more members than this. An open
# compressed tar takes 24 MiB.
_OPEN_ARCHIVES = 512
_OPEN_MEMBERS = 500_000


def is_archive(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)


def is_stream(uri: str) -> bool:
    """Whether an archive has no table of contents, so that listing it reads all of it."""
    return is_archive(uri) and not uri.lower().endswith(ZIP_SUFFIX)


def list_members(uri: str) -> list[Member]:
    """List all members in the order of the archive; of those that share a name only the last can be read.

    Raises:
        UserError: the archive is missing, damaged or hostile, or not an archive.
    """
    with storage.explain_errors(uri):
        return storage.call_with_retries(uri, _opened, uri).members()


def stream_members(
    uri: str, max_bytes: int, wanted: Callable[[str], bool] = lambda _: True
) -> Iterator[tuple[Member, bytes | ImageError | None]]:
    """Read all members of a tar in one pass, in its order, each with its bytes or an error.

    Reads ahead in pieces of 8 MiB; memory is bounded by 24 MiB and one member.

    Args:
        uri: Tar archive to read, plain or compressed.
        max_bytes: Limit per member; a larger one is refused without reading it.
        wanted: Returns whether to read a member of this name; the bytes of others are None.

    Raises:
        UserError: the archive cannot be opened or read further; `storage.is_transient` separates an
            unavailable server from damage.
    """
    with storage.explain_errors(uri):
        yield from _entries(tars.stream_entries(uri), max_bytes, wanted)


def stream_members_of_file(
    raw: io.RawIOBase, max_bytes: int, wanted: Callable[[str], bool]
) -> Iterator[tuple[Member, bytes | ImageError | None]]:
    """Read all members as `stream_members` does, from a tar that is still being received.

    Args:
        raw: File of the tar; `tars.stream_file_entries` documents what it must support.
        max_bytes: Limit per member.
        wanted: Returns whether to read a member of this name.

    Raises:
        ArchiveError: the file is not a tar, or cannot be read further.
    """
    return _entries(tars.stream_file_entries(raw), max_bytes, wanted)


def _entries(
    entries: Iterator[tars.Entry], max_bytes: int, wanted: Callable[[str], bool]
) -> Iterator[tuple[Member, bytes | ImageError | None]]:
    for entry, file in entries:
        name = tars.entry_name(entry)
        data = tars.read_entry(entry, file, max_bytes) if wanted(name) else None
        yield Member(name, entry.size, tars.place_of(entry, file)), data


def open_zip_in_memory(data: pa.Buffer, max_members: int) -> Zip:
    """Open a zip whose bytes are in memory.

    Raises:
        ArchiveError: the data are not a zip, damaged or hostile, or have more members.
    """
    return Zip("archive.zip", data, max_members)


def read_members(uri: str, names: Sequence[str], max_bytes: int) -> Iterator[bytes | ImageError]:
    """Read the bytes of each member, in order, or an error for it; see `read_placed`."""
    return (placed.data for placed in read_placed(uri, names, max_bytes))


def read_placed(uri: str, names: Sequence[str], max_bytes: int) -> Iterator[Placed]:
    """Read members by name, in order, with the places of their bytes. Fastest in the archive's order.

    Memory is bounded by 16 MiB and one member; for a compressed tar by all requested members.

    Raises:
        OSError: the archive cannot be read; `ArchiveError` if it is damaged, hostile or not an archive.
    """
    yield from storage.call_with_retries(uri, _opened, uri).read(names, max_bytes)


def read_places(uri: str, places: Sequence[Place], max_bytes: int) -> Iterator[bytes | ImageError]:
    """Read members by their places, in order, without opening the archive.

    Raises:
        OSError: storage failed.
    """
    sized = [place for place in places if place.length <= max_bytes]
    data = read_ranges(uri, [(place.offset, place.offset + place.length) for place in sized])
    for place in places:
        if place.length > max_bytes:
            yield too_many_bytes(place.length, max_bytes)
        else:
            yield unpack(next(data), place, max_bytes)


class _OpenArchives:
    """Cache of the archives that this process read last, by uri and version of the file."""

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
        if is_first:  # other threads wait for it
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
        opened = (archive.result().cached_members for archive in self._archives.values() if archive.done())
        return len(self._archives) > _OPEN_ARCHIVES or sum(opened) > _OPEN_MEMBERS


_open_archives = _OpenArchives()


def _opened(uri: str) -> Archive:
    return _open_archives.get(uri)
