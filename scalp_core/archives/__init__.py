"""Read members of `.zip`, `.tar` and `.tar.gz` archives in place, local or in S3, without extracting them.

A zip and a plain tar are read by range: a member costs only its own bytes. A compressed tar is sequential:
reading some of its members reads all of it. Names of members are labels and not used as paths. Links and
devices are skipped.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence

import cachetools

from scalp_core import storage
from scalp_core.archives import tars
from scalp_core.archives.base import Member, Place, Placed, too_many_bytes, unpack
from scalp_core.archives.byte_ranges import ReadAheadFile, read_ranges
from scalp_core.archives.tars import Tar
from scalp_core.archives.zips import Zip
from scalp_core.errors import ImageError
from scalp_core.storage.errors import ArchiveError

__all__ = [
    "Member", "Place", "Placed", "is_archive", "is_stream", "list_members", "read_placed", "read_places",
    "stream_members", "too_many_bytes",
]  # fmt: skip

ZIP_SUFFIX = ".zip"
SUFFIXES = (ZIP_SUFFIX, ".tar", ".tar.gz", ".tgz")
# Recognized, so that each such archive is reported, and refused by its content.
_REFUSED_SUFFIXES = (".tar.bz2", ".tbz2", ".tbz", ".tar.xz", ".txz", ".tar.zst", ".tzst")

# Members of the archives that a process keeps open for later reads; each archive counts as at least `_LEAST`,
# and as all of them at most.
_OPEN_MEMBERS = 500_000
_LEAST = 1_000


def is_archive(name: str) -> bool:
    return name.lower().endswith((*SUFFIXES, *_REFUSED_SUFFIXES))


def is_stream(uri: str) -> bool:
    """Whether an archive has no table of contents, so that listing it reads all of it."""
    return is_archive(uri) and not uri.lower().endswith(ZIP_SUFFIX)


def list_members(uri: str, random_access: bool = False) -> Iterator[Member]:
    """List all members in the order of the archive; of those that share a name only the last can be read.

    Args:
        uri: Archive to list.
        random_access: Refuse a compressed tar, whose members have no places.

    Raises:
        UserError: the archive is missing, damaged or hostile, or not an archive. A damaged tar raises after
            the members before the damage.
    """
    with storage.explain_errors(uri):
        archive = _opened(uri)
        if random_access and archive.is_compressed:
            raise ArchiveError(
                "it is compressed as a whole, so that images cannot be read in another order; unpack it, or "
                "repack it as .zip or plain .tar"
            )
        yield from archive.members()


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
        yield from tars.stream_members(ReadAheadFile(uri), max_bytes, wanted)


def read_placed(uri: str, names: Sequence[str], max_bytes: int) -> Iterator[Placed]:
    """Read members by name, in order, with the places of their bytes. Fastest in the archive's order.

    Memory is bounded by 16 MiB and one member; for a compressed tar by all requested members.

    Raises:
        OSError: the archive cannot be read; `ArchiveError` if it is damaged, hostile or not an archive.
    """
    yield from _opened(uri).read(names, max_bytes)


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


@cachetools.cached(
    cachetools.LRUCache(
        _OPEN_MEMBERS, lambda archive: min(max(archive.cached_members, _LEAST), _OPEN_MEMBERS)
    ),
    condition=threading.Condition(),  # other threads wait for the one that opens an archive
)
def _open(uri: str, _version: str) -> Zip | Tar:
    return Zip(uri) if uri.lower().endswith(ZIP_SUFFIX) else Tar(uri)


def _open_present(uri: str) -> Zip | Tar:
    for file in storage.walk(uri):
        return _open(uri, file.version)
    raise FileNotFoundError(f"{uri} is an empty folder")


def _opened(uri: str) -> Zip | Tar:
    return storage.call_with_retries(uri, _open_present, uri)
