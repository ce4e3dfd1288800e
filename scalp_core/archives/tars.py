"""Tar archives, plain or compressed, from untrusted sources.

Python's tarfile reads as much as a header requests, takes quadratic time on some pax headers, follows
negative sizes, and treats a damaged header as the end. Here the size of headers is bounded, and only the end
marker ends an archive.
"""

from __future__ import annotations

import io
import re
import tarfile
import threading
from collections.abc import Iterator, Sequence

from scalp_core import storage
from scalp_core.archives.base import (
    MAX_MEMBERS,
    Member,
    Place,
    Placed,
    SeenNames,
    decode_name,
    no_member,
    too_many_bytes,
    too_many_members,
    unreadable,
)
from scalp_core.archives.byte_ranges import (
    DecompressedFile,
    ReadAheadFile,
    is_compressed,
    open_decompressed,
    read_ranges,
)
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


def stream_entries(uri: str) -> Iterator[Entry]:
    """Yield the regular files of a tar in one pass with read-ahead; read each before requesting the next.

    Raises:
        ArchiveError: the file is not a tar, cannot be read further, or holds more than `MAX_MEMBERS`.
    """
    return stream_file_entries(ReadAheadFile(uri))


def stream_file_entries(raw: io.RawIOBase) -> Iterator[Entry]:
    """Yield entries as `stream_entries` does; `raw` may be sequential except for `seek(0)` at byte 6."""
    for number, entry in enumerate(_entries(open_decompressed(raw))):
        if number == MAX_MEMBERS:
            raise too_many_members()
        yield entry


def place_of(entry: tarfile.TarInfo, file: _Source) -> Place | None:
    """Place of an entry's bytes; None in a compressed tar, and for a sparse file."""
    if isinstance(file.raw, DecompressedFile) or entry.issparse():
        return None
    return Place(entry.offset_data, entry.size, "stored")


def entry_name(entry: tarfile.TarInfo) -> str:
    return decode_name(entry.name.encode("utf-8", "surrogateescape"))


def read_entry(entry: tarfile.TarInfo, file: _Source, max_bytes: int) -> bytes | ImageError:
    """Read the bytes of the entry that `stream_entries` yielded last, or return its error."""
    if refusal := _refused(entry, max_bytes):
        return refusal
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


def _entries(raw: io.RawIOBase) -> Iterator[Entry]:
    """Yield the named regular files of a tar, without links, devices and folders."""
    with _Source(raw) as file:
        archive = _Tar(fileobj=file, tarinfo=_Header, encoding="utf-8", errors="surrogateescape")
        while entry := archive.next():
            if entry.isreg() and entry.name:
                yield entry, file
        if file.read(_MAX_PADDING).strip(b"\0"):
            raise ArchiveError("other data follow its end; if the file holds several tars, separate them")


def _refused(entry: tarfile.TarInfo, max_bytes: int) -> ImageError | None:
    if entry.issparse():
        return unreadable("it is a sparse file; pack it without --sparse")
    return too_many_bytes(entry.size, max_bytes) if entry.size > max_bytes else None


def _truncated() -> ArchiveError:
    return ArchiveError("it is truncated: its last member is incomplete; fetch it again")


def _damaged(archive: tarfile.TarFile, error: object) -> ArchiveError:
    if archive.offset == 0:
        return ArchiveError("it is not an archive of its kind or it is damaged; fetch it again")
    return ArchiveError(f"it is damaged after byte {archive.offset:,} ({error}); fetch it again")


def open_tar(uri: str) -> PlainTar | CompressedTar:
    """Open a tar for reading members by name; its first bytes show whether it is compressed."""
    with storage.open_file(uri) as file:
        start = storage.call_with_retries(uri, file.read_at, 6, 0)
    return CompressedTar(uri) if is_compressed(start) else PlainTar(uri)


class PlainTar:
    """Plain tar: read once for its headers, then by range. Members before a damage can be read."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._members: list[Member] = []
        self._damage: ArchiveError | None = None
        self._refused: dict[str, ImageError] = {}
        try:
            for entry, file in stream_entries(uri):
                name = entry_name(entry)
                self._members.append(Member(name, entry.size, place_of(entry, file)))
                if refusal := _refused(entry, entry.size):
                    self._refused[name] = refusal
                else:
                    self._refused.pop(name, None)
        except ArchiveError as error:
            self._damage = error
        self._places = {member.name: member.place for member in self._members}
        self.cached_members = len(self._members)

    def members(self) -> list[Member]:
        if self._damage:
            raise self._damage
        return self._members

    def read(self, names: Sequence[str], max_bytes: int) -> Iterator[Placed]:
        places = [self._place(name, max_bytes) for name in names]
        ranges = [(place.offset, place.offset + place.length) for place in places if isinstance(place, Place)]
        data = read_ranges(self._uri, ranges)
        for place in places:
            if isinstance(place, ImageError):
                yield Placed(place)
            else:
                member = next(data)
                yield (
                    Placed(member, place) if len(member) == place.length else Placed(unreadable(_truncated()))
                )

    def _place(self, name: str, max_bytes: int) -> Place | ImageError:
        if name in self._refused:
            return self._refused[name]
        place = self._places.get(name)
        if place is None:
            return unreadable(self._damage) if self._damage else no_member()
        return too_many_bytes(place.length, max_bytes) if place.length > max_bytes else place


class CompressedTar:
    """Compressed tar: reads on from the last member, or from the beginning for an earlier one.

    The first read costs one more pass, which finds names that several members share.
    """

    cached_members = 30_000  # its read-ahead takes the memory of so many members

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._position: Iterator[tuple[int, Entry]] = iter(())
        self._shadowed: frozenset[int] | None = None
        self._damage: ArchiveError | None = None
        self._lock = threading.Lock()

    def members(self) -> list[Member]:
        return [Member(entry_name(entry), entry.size) for entry, _ in stream_entries(self._uri)]

    def read(self, names: Sequence[str], max_bytes: int) -> Iterator[Placed]:
        with self._lock:
            if self._shadowed is None:
                self._shadowed = self._find_shadowed()
            contents = self._find(set(names), max_bytes)
            missing = unreadable(self._damage) if self._damage else no_member()
        for name in names:
            yield Placed(contents.get(name, missing))

    def _find_shadowed(self) -> frozenset[int]:
        """Numbers of the entries whose name a later entry has."""
        seen = SeenNames()
        try:
            for entry, _ in stream_entries(self._uri):
                seen.add(entry_name(entry))
        except ArchiveError as error:  # earlier members can be read
            self._damage = error
        return frozenset(seen.shadowed().tolist())

    def _find(self, wanted: set[str], max_bytes: int) -> dict[str, bytes | ImageError]:
        contents: dict[str, bytes | ImageError] = {}
        for from_beginning in (False, True):
            if from_beginning:
                self._position = enumerate(stream_entries(self._uri))
            try:
                for number, (entry, file) in self._position:
                    if (name := entry_name(entry)) in wanted and number not in (self._shadowed or ()):
                        contents[name] = read_entry(entry, file, max_bytes)
                        if len(contents) == len(wanted):
                            return contents
            except ArchiveError as error:
                self._damage = error
        return contents
