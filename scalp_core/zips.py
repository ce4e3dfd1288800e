"""Zips from people who are not trusted: a table of contents that is read once, then each member by range."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

from scalp_core import storage
from scalp_core.errors import ImageError
from scalp_core.members import Member, decoded, no_member, too_many_bytes, unreadable
from scalp_core.storage_errors import ArchiveError
from scalp_core.streams import Ranged, is_packed

# A member takes 0.8 KiB of memory while the archive is open, and each process keeps a few open.
MAX_MEMBERS = 2_000_000
# Room for as many with names and extra fields of 100 bytes.
MAX_TABLE_BYTES = 2**28

# A member is one request to S3 where it fits into this, and not three.
_BUFFER = 2**17
_ENTRY = b"PK\1\2"
_LOCAL_HEADER_BYTES = 30
_UTF8_FLAG = 0x800
_ENCRYPTED_FLAGS = 0x41
_BOUNDED = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_READ = (*_BOUNDED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
_STEP = 2**12


class Zip:
    """An open zip.

    Raises:
        ArchiveError: it is no zip, damaged, or its table of contents is larger than an honest one.
    """

    def __init__(self, uri: str) -> None:
        file = _Source(Ranged(uri), _BUFFER)
        try:
            self._archive = zipfile.ZipFile(file)
        except OSError:  # ours, or storage's
            raise
        except zipfile.BadZipFile:
            raise _not_a_zip(file) from None
        except Exception as error:  # versions, names and numbers that zipfile does not take
            raise ArchiveError(f"its table of contents cannot be read ({error}); pack it anew") from error
        files = [info for info in self._archive.infolist() if not info.is_dir()]
        self._members = [Member(_name(info), info.file_size) for info in files]
        self._infos = dict(zip((member.name for member in self._members), files, strict=True))
        self._overlapping = set(_overlapping(self._archive.infolist(), self._archive.start_dir))

    def members(self) -> list[Member]:
        return self._members

    def read(self, names: Sequence[str], max_bytes: int) -> Iterator[bytes | ImageError]:
        for name in names:
            info = self._infos.get(name)
            yield self._read(info, max_bytes) if info else no_member()

    def _read(self, info: zipfile.ZipInfo, max_bytes: int) -> bytes | ImageError:
        if refusal := self._refused(info, max_bytes):
            return refusal
        try:
            data = _unpacked(self._archive, info, max_bytes + 1)  # the declared size is not trusted
        except EOFError:
            return unreadable("the archive ends before it does")
        except Exception as error:  # a damaged member raises many kinds
            if storage.is_transient(error):
                raise
            return unreadable(error)
        return too_many_bytes(len(data), max_bytes) if len(data) > max_bytes else data

    def _refused(self, info: zipfile.ZipInfo, max_bytes: int) -> ImageError | None:
        if info.flag_bits & _ENCRYPTED_FLAGS:
            return unreadable("it is encrypted; pack it without a password")
        if info.compress_type not in _READ:
            kinds = zipfile.compressor_names  # type: ignore[attr-defined]
            kind = kinds.get(info.compress_type, f"method {info.compress_type}")
            return unreadable(f"it is compressed by {kind}; pack it with deflate")
        if info.header_offset in self._overlapping:
            return unreadable("it overlaps another member, as in a bomb")
        return too_many_bytes(info.file_size, max_bytes) if info.file_size > max_bytes else None


class _Source(io.BufferedReader):
    """What zipfile reads from; refuses a table of contents that would fill the memory, before it does."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size and size > MAX_TABLE_BYTES:
            raise ArchiveError(
                f"its table of contents claims {size:,} bytes; the limit is {MAX_TABLE_BYTES:,}"
            )
        data = super().read(size)
        if data.startswith(_ENTRY) and (count := data.count(_ENTRY)) > MAX_MEMBERS:
            raise ArchiveError(f"it holds {count:,} members; the limit is {MAX_MEMBERS:,}: divide it")
        return data


def _unpacked(archive: zipfile.ZipFile, info: zipfile.ZipInfo, size: int) -> bytes:
    """At most `size` bytes of a member."""
    with archive.open(info) as file:
        if info.compress_type in _BOUNDED:
            return file.read(size)
        data = bytearray()
        # bzip2 and lzma unpack all that they are given at once: a step of 4 KiB comes to 100 MiB at most.
        while len(data) < size and (piece := file.read(_STEP)):
            data += piece
        return bytes(data[:size])


def _overlapping(infos: Iterable[zipfile.ZipInfo], end: int) -> Iterator[int]:
    """Offsets of the members that reach into the next: bombs pack the same bytes many times."""
    ordered = sorted(
        (info.header_offset, _LOCAL_HEADER_BYTES + len(info.orig_filename) + info.compress_size)
        for info in infos
    )
    for (offset, size), (following, _) in pairwise([*ordered, (end, 0)]):
        if offset + size > following:
            yield offset


def _name(info: zipfile.ZipInfo) -> str:
    """Without the flag that says UTF-8, a name is what its packer writes."""
    return info.filename if info.flag_bits & _UTF8_FLAG else decoded(info.filename.encode("cp437"))


def _not_a_zip(file: io.BufferedReader) -> ArchiveError:
    file.seek(0)
    start = file.read(512)
    if start.startswith(b"PK\3\4"):
        return ArchiveError(
            "its table of contents is missing or damaged, so it was probably cut; fetch it again"
        )
    if is_packed(start) or start[257:262] == b"ustar":
        return ArchiveError("it is a tar or another packed file by its content; rename it to .tar or .tar.gz")
    return ArchiveError("it is not an archive of its kind or it is damaged; fetch it again")
