"""Common parts of zip and tar readers: members, their names and places, and errors."""

from __future__ import annotations

import zlib
from typing import Literal, NamedTuple

from scalp_core.errors import ImageError
from scalp_core.storage.errors import ArchiveError

# An open archive takes 0.8 KiB of memory per member.
MAX_MEMBERS = 2_000_000

Compression = Literal["stored", "deflate"]


class Place(NamedTuple):
    """Byte range of a member in its archive: one range request reads it, without the table of contents."""

    offset: int  # position of the first byte in the archive's file
    length: int  # stored length in bytes
    compression: Compression  # compression of the stored bytes; `deflate` is a raw stream, as in zips


class Member(NamedTuple):
    """One entry of an archive."""

    name: str  # label, never used as a path
    size: int  # size in bytes according to the archive
    # Place of its bytes; None in a compressed tar, and in a zip before the member is read
    place: Place | None = None


class Placed(NamedTuple):
    """The bytes of a member or its error, and their place in the archive."""

    data: bytes | ImageError
    place: Place | None = None


def unpack(stored: bytes, place: Place, max_bytes: int) -> bytes | ImageError:
    """Decompress the stored bytes of a member.

    The archive may have changed after its place was recorded: error `changed`.
    """
    if len(stored) < place.length:
        return ImageError("changed", "the archive ends before the member's place")
    if place.compression == "stored":
        return stored
    unpacker = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        data = unpacker.decompress(stored, max_bytes + 1)
    except zlib.error as error:
        return ImageError("changed", f"the archive has other bytes at the member's place ({error})")
    if len(data) > max_bytes:
        return too_many_bytes(len(data), max_bytes)
    return data if unpacker.eof else ImageError("changed", "the member has another length than before")


def decode_name(name: bytes) -> str:
    """Decode a name without a declared encoding: macOS writes UTF-8, Korean Windows cp949."""
    for encoding in ("utf-8", "cp949"):
        try:
            return name.decode(encoding)
        except UnicodeDecodeError:
            continue
    return name.decode("cp437")  # has a character for every byte


def too_many_bytes(size: int, max_bytes: int) -> ImageError:
    return ImageError("too_many_bytes", f"{size:,} bytes; the limit is {max_bytes:,}")


def too_many_members(limit: int = MAX_MEMBERS) -> ArchiveError:
    return ArchiveError(f"it holds more than {limit:,} members; divide it")


def no_member() -> ImageError:
    return ImageError("not_found", "the archive has no such member")


def unreadable(reason: object) -> ImageError:
    return ImageError("fetch_failed", f"the archive member cannot be read: {reason}")
