"""Tar archives, plain or compressed by gzip, from untrusted sources.

Python's tarfile reads as much as a header requests, takes quadratic time on some pax headers, follows
negative sizes, and treats a damaged header as the end. Here the size of headers is bounded, and only the end
marker ends an archive.
"""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence

from scalp_core.archives.base import (
    MAX_MEMBERS,
    Member,
    Place,
    Placed,
    decode_name,
    no_member,
    too_many_bytes,
    too_many_members,
    unreadable,
)
from scalp_core.archives.byte_ranges import DecompressedFile, ReadAheadFile, open_decompressed, read_ranges
from scalp_core.errors import ImageError
from scalp_core.storage.errors import ArchiveError

# Bound on all headers of a member: pax headers, long names, maps of holes. Linux allows 4 KiB per path and
# 64 KiB per attribute.
MAX_HEADER_BYTES = 2**20
_PAX_RECORD = re.compile(rb"(\d{1,7}) [^=]+=")
# tarfile's patterns take quadratic time on a run of digits.
_LONG_NUMBER = re.compile(rb"\d{256}")
# After the end marker, tar pads to the size of a tape record, 10 KiB by default.
_MAX_PADDING = 2**20
_END_OF_FILES = 2**63
_BUFFER = 2**17
_PAX = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
_WITH_BODY = (*_PAX, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)

Entry = tuple[tarfile.TarInfo, "_Source"]
"""A header, and the file that holds its bytes from `offset_data` on."""


def stream_members(
    raw: io.RawIOBase, max_bytes: int, wanted: Callable[[str], bool]
) -> Iterator[tuple[Member, bytes | ImageError | None]]:
    """Read all members of a tar in one pass; those that are not wanted without their bytes.

    Args:
        raw: File of the tar; it may be sequential except for `seek(0)` at byte 6.
        max_bytes: Limit per member; a larger one is refused without reading it.
        wanted: Returns whether to read a member of this name.

    Raises:
        ArchiveError: the file is not a tar, cannot be read further, or holds more than `MAX_MEMBERS`.
    """
    for entry, file in _entries(raw):
        member = _member(entry, file)
        yield member, _read(entry, file, max_bytes) if wanted(member.name) else None


class Tar:
    """Tar: read once for its headers, then by range, or in another pass if it is compressed.

    Members before a damage can be read.
    """

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._members: list[Member] = []
        self._damage: ArchiveError | None = None
        self._places: dict[str, Place | ImageError | None] = {}
        self.is_compressed = False
        raw = ReadAheadFile(uri)
        try:
            for entry, file in _entries(raw):
                member = _member(entry, file)
                self._members.append(member)
                self._places[member.name] = _place(entry, file)
                self.is_compressed = isinstance(file.raw, DecompressedFile)
        except ArchiveError as error:
            self._damage = error
            last = self._members[-1].place if self._members else None
            if last and last.offset + last.length > raw.size:
                self._members.pop()
        self.cached_members = len(self._members)

    def members(self) -> Iterator[Member]:
        yield from self._members
        if self._damage:
            raise self._damage

    def read(self, names: Sequence[str], max_bytes: int) -> Iterator[Placed]:
        places = [self._find(name, max_bytes) for name in names]
        ranges = [(place.offset, place.offset + place.length) for place in places if isinstance(place, Place)]
        data = read_ranges(self._uri, ranges)
        in_stream = {name for name, place in zip(names, places, strict=True) if place is None}
        packed = self._read_packed(in_stream, max_bytes) if in_stream else {}
        for name, place in zip(names, places, strict=True):
            if place is None:
                yield Placed(packed[name])
            elif isinstance(place, ImageError):
                yield Placed(place)
            else:
                member = next(data)
                is_whole = len(member) == place.length
                yield Placed(member, place) if is_whole else Placed(unreadable(_truncated()))

    def _find(self, name: str, max_bytes: int) -> Place | ImageError | None:
        """Place or error of a member; None in a compressed tar."""
        if name not in self._places:
            return unreadable(self._damage) if self._damage else no_member()
        place = self._places[name]
        if isinstance(place, Place) and place.length > max_bytes:
            return too_many_bytes(place.length, max_bytes)
        return place

    def _read_packed(self, wanted: set[str], max_bytes: int) -> dict[str, bytes | ImageError]:
        """Read members of a compressed tar in one pass; of those that share a name it is the last."""
        contents: dict[str, bytes | ImageError] = {}
        missing = no_member()
        try:
            for entry, file in _entries(ReadAheadFile(self._uri)):
                if (name := _name(entry)) in wanted:
                    contents[name] = _read(entry, file, max_bytes)
        except ArchiveError as error:
            missing = unreadable(error)
        return {name: contents.get(name, missing) for name in wanted}


def _entries(raw: io.RawIOBase) -> Iterator[Entry]:
    """Yield the named regular files of a tar, without links, devices and folders."""
    count = 0
    with _Source(open_decompressed(raw)) as file:
        archive = _Tar(fileobj=file, tarinfo=_Header, encoding="utf-8", errors="surrogateescape")
        while entry := archive.next():
            if not (entry.isreg() and entry.name):
                continue
            if count == MAX_MEMBERS:
                raise too_many_members()
            count += 1
            yield entry, file
        if file.read(_MAX_PADDING).strip(b"\0"):
            raise ArchiveError("other data follow its end; if the file holds several tars, separate them")


def _name(entry: tarfile.TarInfo) -> str:
    return decode_name(entry.name.encode("utf-8", "surrogateescape"))


def _member(entry: tarfile.TarInfo, file: _Source) -> Member:
    place = _place(entry, file)
    return Member(_name(entry), entry.size, place if isinstance(place, Place) else None)


def _place(entry: tarfile.TarInfo, file: _Source) -> Place | ImageError | None:
    """Place of an entry's bytes; None in a compressed tar; an error for a sparse file."""
    if entry.issparse():
        return unreadable("it is a sparse file; pack it without --sparse")
    return None if isinstance(file.raw, DecompressedFile) else Place(entry.offset_data, entry.size, "stored")


def _read(entry: tarfile.TarInfo, file: _Source, max_bytes: int) -> bytes | ImageError:
    """Read the bytes of the entry that `_entries` yielded last, or return its error."""
    if isinstance(error := _place(entry, file), ImageError):
        return error
    if entry.size > max_bytes:
        return too_many_bytes(entry.size, max_bytes)
    file.seek(entry.offset_data)
    data = file.read(entry.size)
    if len(data) < entry.size:
        raise _truncated()
    return data


class _Source(io.BufferedReader):
    """File for tarfile, which bounds the bytes that a header may request."""

    def __init__(self, raw: io.RawIOBase) -> None:
        super().__init__(raw, _BUFFER)
        self._left: int | None = None  # bytes left for this header; None outside of headers
        self._body_of: bytes | None = None  # type of the header whose body comes next

    def begin_header(self) -> None:
        self._left, self._body_of = MAX_HEADER_BYTES, None

    def end_header(self) -> None:
        self._left = None

    def read(self, size: int | None = -1, /) -> bytes:
        if self._left is None:
            return super().read(size)
        requested = -1 if size is None else size
        self._left -= requested
        if requested < 0 or self._left < 0:
            raise ArchiveError(f"a header is longer than {MAX_HEADER_BYTES:,} bytes; the archive is refused")
        data = super().read(requested)
        if self._body_of in _PAX:
            _check_pax(data)
        is_header = self._body_of is None and requested == tarfile.BLOCKSIZE
        self._body_of = data[156:157] if is_header and data[156:157] in _WITH_BODY else None
        return data


def _check_pax(body: bytes) -> None:
    """Refuse a pax header with gaps, on which tarfile takes quadratic time and memory."""
    at = 0
    body = body.rstrip(b"\0")
    while at < len(body):
        record = _PAX_RECORD.match(body, at)
        length = int(record[1]) if record else 0
        if not record or at + length > len(body) or at + length < record.end():
            raise ArchiveError("a pax header is damaged; fetch it again")
        at += length
    if _LONG_NUMBER.search(body):
        raise ArchiveError("a pax header holds a number of more than 255 digits; the archive is refused")


class _Header(tarfile.TarInfo):
    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> tarfile.TarInfo:  # type: ignore[override]
        """Raise on a damaged header, which tarfile treats as the end of the archive."""
        try:
            return super().fromtarfile(archive)
        except tarfile.HeaderError as error:
            if str(error) == "end of file header":
                raise
            if str(error) == "empty header" and archive.offset:
                raise ArchiveError(
                    "it ends without an end marker, so it is probably truncated; fetch it again"
                ) from None
            raise _damaged(archive, error) from None


class _Tar(tarfile.TarFile):
    fileobj: _Source

    def next(self) -> tarfile.TarInfo | None:
        self.fileobj.begin_header()
        try:
            entry = super().next()
        except OSError:  # an ArchiveError, or from storage
            raise
        except tarfile.ReadError as error:
            raise _truncated() if "unexpected end" in str(error) else _damaged(self, error) from error
        except Exception as error:  # invalid numbers, endlessly nested headers
            raise _damaged(self, error) from error
        finally:
            self.fileobj.end_header()
        self.members.clear()  # type: ignore[attr-defined]  # tarfile keeps every header
        self.pax_headers = {}  # unused here, and global headers accumulate
        if entry and not (0 <= entry.size < _END_OF_FILES and entry.offset_data <= self.offset):
            raise _damaged(self, f"a size of {entry.size:,} bytes")
        return entry


def _truncated() -> ArchiveError:
    return ArchiveError("it is truncated: its last member is incomplete; fetch it again")


def _damaged(archive: tarfile.TarFile, error: object) -> ArchiveError:
    if archive.offset == 0:
        return ArchiveError("it is not an archive of its kind or it is damaged; fetch it again")
    return ArchiveError(f"it is damaged after byte {archive.offset:,} ({error}); fetch it again")
