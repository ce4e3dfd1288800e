"""Tars, plain or packed, from people who are not trusted.

tarfile reads what a header asks for, takes quadratic time on some pax headers, follows sizes backwards, and
takes a damaged header for the end. Here a header gets no more than an honest one needs, and only the end's
mark is an end.
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
    decoded,
    no_member,
    too_many_bytes,
    too_many_members,
    unreadable,
)
from scalp_core.archives.byte_ranges import Ahead, Unpacked, is_packed, read_ranges, unpacked
from scalp_core.errors import ImageError
from scalp_core.storage.errors import ArchiveError

# All that precedes a member: pax headers, long names, maps of holes. Linux allows 4 KiB to a path and 64 KiB
# to an attribute.
MAX_HEADER_BYTES = 2**20
_PAX_RECORD = re.compile(rb"(\d{1,7}) [^=]+=")
# tarfile's patterns look at a run of digits once for each of its digits.
_LONG_NUMBER = re.compile(rb"\d{256}")
# Behind the end mark tar fills up to the size of a tape's record, 10 KiB unless asked.
_MAX_PADDING = 2**20
_END_OF_FILES = 2**63
_BUFFER = 2**17
_PAX = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
_WITH_BODY = (*_PAX, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)

Entry = tuple[tarfile.TarInfo, "_Source"]
"""A header, and the file to read its bytes from; in a plain tar they begin at the header's `offset_data`."""


def stream(uri: str) -> Iterator[Entry]:
    """Regular files of a tar in one pass, read ahead; each must be read before the next is asked for.

    Raises:
        ArchiveError: it is no tar, cannot be read on, or holds more than `MAX_MEMBERS`.
    """
    return stream_raw(Ahead(uri))


def stream_raw(raw: io.RawIOBase) -> Iterator[Entry]:
    """As `stream`, of a file that may be read onwards only, but for a `seek(0)` after its first six bytes."""
    for number, entry in enumerate(_entries(unpacked(raw))):
        if number == MAX_MEMBERS:
            raise too_many_members()
        yield entry


def place_of(entry: tarfile.TarInfo, file: _Source) -> Place | None:
    """Where the bytes of an entry are; None in a compressed tar, or stored with holes."""
    if isinstance(file.raw, Unpacked) or entry.issparse():
        return None
    return Place(entry.offset_data, entry.size, "stored")


def entry_name(entry: tarfile.TarInfo) -> str:
    return decoded(entry.name.encode("utf-8", "surrogateescape"))


def read_entry(entry: tarfile.TarInfo, file: _Source, max_bytes: int) -> bytes | ImageError:
    """The bytes of the entry that `stream` is at, or why they cannot be had."""
    if refusal := _refused(entry, max_bytes):
        return refusal
    file.seek(entry.offset_data)
    data = file.read(entry.size)
    if len(data) < entry.size:
        raise _cut()
    return data


class _Source(io.BufferedReader):
    """What tarfile reads from. In a header, it gives no more than an honest one needs."""

    def __init__(self, raw: io.RawIOBase) -> None:
        super().__init__(raw, _BUFFER)
        self._left: int | None = None  # bytes that this header may still take; None outside of headers
        self._body_of: bytes | None = None  # type of the header whose body comes next

    def begin_header(self) -> None:
        self._left, self._body_of = MAX_HEADER_BYTES, None

    def end_header(self) -> None:
        self._left = None

    def read(self, size: int | None = -1, /) -> bytes:
        if self._left is None:
            return super().read(size)
        asked = -1 if size is None else size
        self._left -= asked
        if asked < 0 or self._left < 0:
            raise ArchiveError(f"a header asks for more than {MAX_HEADER_BYTES:,} bytes; it is not read on")
        data = super().read(asked)
        if self._body_of in _PAX:
            _check_pax(data)
        is_header = self._body_of is None and asked == tarfile.BLOCKSIZE
        self._body_of = data[156:157] if is_header and data[156:157] in _WITH_BODY else None
        return data


def _check_pax(body: bytes) -> None:
    """Refuses records that do not follow each other, on which tarfile takes quadratic time and memory."""
    at = 0
    body = body.rstrip(b"\0")
    while at < len(body):
        found = _PAX_RECORD.match(body, at)
        length = int(found[1]) if found else 0
        if not found or at + length > len(body) or at + length < found.end():
            raise ArchiveError("a pax header is damaged; fetch it again")
        at += length
    if _LONG_NUMBER.search(body):
        raise ArchiveError("a pax header holds a number of more than 255 digits; it is not read on")


class _Header(tarfile.TarInfo):
    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> tarfile.TarInfo:  # type: ignore[override]
        """tarfile would take each of these errors for the end of the archive; one of them is its mark."""
        try:
            return super().fromtarfile(archive)
        except tarfile.HeaderError as error:
            if str(error) == "end of file header":
                raise
            if str(error) == "empty header" and archive.offset:
                raise ArchiveError("it ends without the mark of an end, so it was probably cut") from None
            raise _damaged(archive, error) from None


class _Tar(tarfile.TarFile):
    fileobj: _Source

    def next(self) -> tarfile.TarInfo | None:
        self.fileobj.begin_header()
        try:
            entry = super().next()
        except OSError:  # ours, or storage's
            raise
        except tarfile.ReadError as error:
            raise _cut() if "unexpected end" in str(error) else _damaged(self, error) from error
        except Exception as error:  # numbers that are none, headers in headers without end
            raise _damaged(self, error) from error
        finally:
            self.fileobj.end_header()
        self.members.clear()  # type: ignore[attr-defined]  # it would keep every header
        self.pax_headers = {}  # headers for all that follows say nothing of photographs, and would add up
        if entry and not (0 <= entry.size < _END_OF_FILES and entry.offset_data <= self.offset):
            raise _damaged(self, f"a size of {entry.size:,} bytes")
        return entry


def _entries(raw: io.RawIOBase) -> Iterator[Entry]:
    """Regular files of a tar; no links, devices or folders, and nothing without a name."""
    with _Source(raw) as file:
        archive = _Tar(fileobj=file, tarinfo=_Header, encoding="utf-8", errors="surrogateescape")
        while entry := archive.next():
            if entry.isreg() and entry.name:
                yield entry, file
        if file.read(_MAX_PADDING).strip(b"\0"):
            raise ArchiveError(
                "something follows its end; if these are several tars in one file, take them apart"
            )


def _refused(entry: tarfile.TarInfo, max_bytes: int) -> ImageError | None:
    if entry.issparse():
        return unreadable("it is stored with holes; pack it without --sparse")
    return too_many_bytes(entry.size, max_bytes) if entry.size > max_bytes else None


def _cut() -> ArchiveError:
    return ArchiveError("it was cut: it ends before a member does; fetch it again")


def _damaged(archive: tarfile.TarFile, error: object) -> ArchiveError:
    if archive.offset == 0:
        return ArchiveError("it is not an archive of its kind or it is damaged; fetch it again")
    return ArchiveError(f"it is damaged behind byte {archive.offset:,} ({error}); fetch it again")


def open_tar(uri: str) -> PlainTar | PackedTar:
    """A tar for members by name; packed or not by its first bytes, whatever its name says."""
    with storage.open_file(uri) as file:
        start = storage.call_with_retries(uri, file.read_at, 6, 0)
    return PackedTar(uri) if is_packed(start) else PlainTar(uri)


class PlainTar:
    """It is read through once for its headers, then by range. Members before a damage can be read."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._members: list[Member] = []
        self._damage: ArchiveError | None = None
        self._refused: dict[str, ImageError] = {}
        try:
            for entry, file in stream(uri):
                name = entry_name(entry)
                self._members.append(Member(name, entry.size, place_of(entry, file)))
                if refusal := _refused(entry, entry.size):
                    self._refused[name] = refusal
                else:
                    self._refused.pop(name, None)
        except ArchiveError as error:
            self._damage = error
        self._places = {member.name: member.place for member in self._members}
        self.held = len(self._members)

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
                yield Placed(member, place) if len(member) == place.length else Placed(unreadable(_cut()))

    def _place(self, name: str, max_bytes: int) -> Place | ImageError:
        if name in self._refused:
            return self._refused[name]
        place = self._places.get(name)
        if place is None:
            return unreadable(self._damage) if self._damage else no_member()
        return too_many_bytes(place.length, max_bytes) if place.length > max_bytes else place


class PackedTar:
    """Goes on from the member that was read last; from the beginning for one that lies before it.

    The first read costs one more pass: it finds the names that several members have.
    """

    held = 30_000  # what it reads ahead takes the memory of so many

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._position: Iterator[tuple[int, Entry]] = iter(())
        self._shadowed: frozenset[int] | None = None
        self._damage: ArchiveError | None = None
        self._lock = threading.Lock()

    def members(self) -> list[Member]:
        return [Member(entry_name(entry), entry.size) for entry, _ in stream(self._uri)]

    def read(self, names: Sequence[str], max_bytes: int) -> Iterator[Placed]:
        with self._lock:
            if self._shadowed is None:
                self._shadowed = self._find_shadowed()
            found = self._find(set(names), max_bytes)
            missing = unreadable(self._damage) if self._damage else no_member()
        for name in names:
            yield Placed(found.get(name, missing))

    def _find_shadowed(self) -> frozenset[int]:
        """Numbers of the entries whose name a later one has."""
        seen = SeenNames()
        try:
            for entry, _ in stream(self._uri):
                seen.add(entry_name(entry))
        except ArchiveError as error:  # what lies before can be read
            self._damage = error
        return frozenset(seen.shadowed().tolist())

    def _find(self, wanted: set[str], max_bytes: int) -> dict[str, bytes | ImageError]:
        found: dict[str, bytes | ImageError] = {}
        for again in (False, True):
            if again:
                self._position = enumerate(stream(self._uri))
            try:
                for number, (entry, file) in self._position:
                    if (name := entry_name(entry)) in wanted and number not in (self._shadowed or ()):
                        found[name] = read_entry(entry, file, max_bytes)
                        if len(found) == len(wanted):
                            return found
            except ArchiveError as error:
                self._damage = error
        return found
