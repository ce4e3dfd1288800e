"""What zips and tars have in common: members, their names and places, and why one is unavailable."""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple, Protocol

import numpy as np

from scalp_core.errors import ImageError
from scalp_core.storage.errors import ArchiveError

# An archive that is kept open takes 0.8 KiB of memory for each.
MAX_MEMBERS = 2_000_000

Compression = Literal["stored", "deflate"]


class Place(NamedTuple):
    """Bytes of a member inside its archive: one range request reads them, without the archive's table.

    Args:
        offset: of the first byte in the archive's file.
        length: in bytes, as they are stored.
        compression: how they are stored; `deflate` is a raw stream, as in zips.
    """

    offset: int
    length: int
    compression: Compression


class Member(NamedTuple):
    """One entry of an archive.

    Args:
        name: label, never used as a path.
        size: in bytes, as the archive claims.
        place: where its bytes are; None where only reading it tells, or where the archive is compressed.
    """

    name: str
    size: int
    place: Place | None = None


class Placed(NamedTuple):
    """The bytes of a member, or why they are unavailable, and where they are."""

    data: bytes | ImageError
    place: Place | None = None


class Archive(Protocol):
    """An archive that is kept open, because opening means reading its table of contents.

    Args:
        held: members that it keeps in memory, or that would take as much.
    """

    held: int

    def members(self) -> list[Member]:
        """All members in the order of the archive.

        Raises:
            ArchiveError: it cannot be read to its end.
        """
        ...

    def read(self, names: Sequence[str], max_bytes: int) -> Iterator[Placed]:
        """Each member of these names, in order. Of members that share a name it is the last."""
        ...


class SeenNames:
    """The names of an archive's members in 8 bytes each, to find those that a later member replaces."""

    def __init__(self) -> None:
        self._hashes = array("q")

    def add(self, name: str) -> None:
        self._hashes.append(hash(name))

    def shadowed(self) -> np.ndarray:
        """Positions of the members whose name a later one has, ascending; int64."""
        hashes = np.frombuffer(self._hashes, np.int64) if self._hashes else np.zeros(0, np.int64)
        order = np.argsort(hashes, kind="stable")
        return np.sort(order[:-1][hashes[order[:-1]] == hashes[order[1:]]])


def unpack(stored: bytes, place: Place, max_bytes: int) -> bytes | ImageError:
    """The bytes of a member from those that are stored at its place.

    They may be others than when the place was noted: `changed`.
    """
    if len(stored) < place.length:
        return ImageError("changed", "the archive ends before the place where the member was")
    if place.compression == "stored":
        return stored
    unpacker = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        data = unpacker.decompress(stored, max_bytes + 1)
    except zlib.error as error:
        return ImageError("changed", f"the archive holds other bytes where the member was ({error})")
    if len(data) > max_bytes:
        return too_many_bytes(len(data), max_bytes)
    return data if unpacker.eof else ImageError("changed", "the member does not end where it did")


def decoded(name: bytes) -> str:
    """A name that does not say its encoding: macOS writes UTF-8, Korean Windows cp949."""
    for encoding in ("utf-8", "cp949"):
        try:
            return name.decode(encoding)
        except UnicodeDecodeError:
            continue
    return name.decode("cp437")  # a sign for every byte


def too_many_bytes(size: int, max_bytes: int) -> ImageError:
    return ImageError("too_many_bytes", f"{size:,} bytes; the limit is {max_bytes:,}")


def too_many_members(limit: int = MAX_MEMBERS) -> ArchiveError:
    return ArchiveError(f"it holds more than {limit:,} members; divide it")


def no_member() -> ImageError:
    return ImageError("not_found", "the archive has no such member")


def unreadable(reason: object) -> ImageError:
    return ImageError("fetch_failed", f"the archive member cannot be read: {reason}")
