"""Zip archives from untrusted sources: the table of contents is read once, then members by range."""

from __future__ import annotations

import io
import struct
import zipfile
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from functools import partial

import pyarrow as pa

from scalp_core import storage
from scalp_core.archives.base import (
    MAX_MEMBERS,
    Compression,
    Member,
    Place,
    Placed,
    decode_name,
    no_member,
    too_many_bytes,
    too_many_members,
    unreadable,
)
from scalp_core.archives.byte_ranges import GZIP, Range, read_ranges
from scalp_core.errors import ImageError
from scalp_core.storage.errors import ArchiveError

# Fits MAX_MEMBERS with names and extra fields of 100 bytes.
MAX_TABLE_BYTES = 2**28

# A table of contents that fits into this takes one request to S3 instead of three.
_BUFFER = 2**17
_ENTRY = b"PK\1\2"
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, bytes of name and of extra fields
_LOCAL_HEADER_BYTES = 30
_MAX_LOCAL_EXTRA_BYTES = 2 * 2**16  # not in the table of contents
_MAX_SIZE = 2**63 - 1
_UTF8_FLAG = 0x800
_ENCRYPTED_FLAGS = 0x41
_COMPRESSIONS: dict[int, Compression] = {zipfile.ZIP_STORED: "stored", zipfile.ZIP_DEFLATED: "deflate"}
_READ = (*_COMPRESSIONS, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
_STEP = 2**12


class Zip:
    """An open zip.

    Args:
        uri: Zip archive to read; only a name if `content` is given.
        content: Content of the archive, if it is in memory already.
        max_members: Limit on members; default `MAX_MEMBERS`.

    Raises:
        ArchiveError: the file is not a zip or damaged, or its table of contents is too large.
    """

    is_compressed = False  # as a whole

    def __init__(self, uri: str, content: pa.Buffer | None = None, max_members: int = 0) -> None:
        self._uri = uri
        if content is None:
            self._read, file = None, storage.open_raw(uri)
        else:
            self._read = partial(_read_content, content)
            file = storage.RangedFile(self._read, content.size)
        table = _table(file, max_members or MAX_MEMBERS)
        self._end = table.start_dir
        self._begins = sorted([*(info.header_offset for info in table.infolist()), self._end])
        files = [info for info in table.infolist() if info.filename and not _name(info).endswith("/")]
        self._members = [Member(_name(info), min(info.file_size, _MAX_SIZE)) for info in files]
        self._infos = dict(zip((member.name for member in self._members), files, strict=True))
        self.cached_members = len(files)

    def members(self) -> list[Member]:
        return self._members

    def read(self, names: Sequence[str], max_bytes: int) -> Iterator[Placed]:
        ranges = [self._range(name, max_bytes) for name in names]
        data = read_ranges(self._uri, [range_ for range_ in ranges if isinstance(range_, tuple)], self._read)
        for name, wanted in zip(names, ranges, strict=True):
            if isinstance(wanted, ImageError):
                yield Placed(wanted)
            else:
                yield _unpacked(self._infos[name], wanted[0], next(data))

    def _range(self, name: str, max_bytes: int) -> Range | ImageError:
        """Byte range of a member, from its local header up to the next one."""
        info = self._infos.get(name)
        if info is None:
            return no_member()
        if info.flag_bits & _ENCRYPTED_FLAGS:
            return unreadable("it is encrypted; pack it without a password")
        if info.compress_type not in _READ:
            kinds = zipfile.compressor_names  # type: ignore[attr-defined]
            kind = kinds.get(info.compress_type, f"method {info.compress_type}")
            return unreadable(f"it is compressed by {kind}; pack it with deflate")
        if (size := max(info.file_size, info.compress_size)) > max_bytes:
            return too_many_bytes(size, max_bytes)
        begin, least = info.header_offset, _LOCAL_HEADER_BYTES + len(info.orig_filename) + info.compress_size
        if not 0 <= begin < self._end:
            return unreadable("its place is outside of the archive; fetch it again")
        following = self._begins[bisect_left(self._begins, begin) + 1]
        if begin + least > following:  # decompression bombs reuse the same bytes
            return unreadable("it overlaps another member; pack it again")
        return begin, min(following, begin + least + _MAX_LOCAL_EXTRA_BYTES)


def _table(raw: io.RawIOBase, max_members: int) -> zipfile.ZipFile:
    with _Source(raw, max_members) as file:
        try:
            return zipfile.ZipFile(file)
        except OSError:  # an ArchiveError, or from storage
            raise
        except zipfile.BadZipFile as error:
            if isinstance(error.__context__, OSError):  # zipfile turns a failed read into BadZipFile
                raise error.__context__ from None
            raise _not_a_zip(file) from None
        except Exception as error:  # versions, names and numbers that zipfile refuses
            raise ArchiveError(f"its table of contents cannot be read ({error}); pack it again") from error


class _Source(io.BufferedReader):
    """File for zipfile, which refuses a table of contents that is too large before reading it."""

    def __init__(self, raw: io.RawIOBase, max_members: int) -> None:
        super().__init__(raw, _BUFFER)
        self._max_members = max_members

    def read(self, size: int | None = -1, /) -> bytes:
        if size and size > MAX_TABLE_BYTES:
            raise ArchiveError(f"its table of contents has {size:,} bytes; the limit is {MAX_TABLE_BYTES:,}")
        data = super().read(size)
        if data.startswith(_ENTRY) and data.count(_ENTRY) > self._max_members:
            raise too_many_members(self._max_members)
        return data


def _read_content(content: pa.Buffer, start: int, length: int) -> bytes:
    return content.slice(start, min(length, content.size - start)).to_pybytes()


def _unpacked(info: zipfile.ZipInfo, begin: int, data: bytes) -> Placed:
    """Read a member from its local header on, up to its size in the table of contents."""
    try:
        signature, name_bytes, extra_bytes = _LOCAL_HEADER.unpack_from(data)
        if signature != b"PK\3\4":
            return Placed(unreadable("its header is damaged; fetch it again"))
        start = _LOCAL_HEADER_BYTES + name_bytes + extra_bytes
        packed = io.BytesIO(data)
        packed.seek(start)
        file = zipfile.ZipExtFile(packed, "r", info)  # checks size and CRC
        if compression := _COMPRESSIONS.get(info.compress_type):
            return Placed(file.read(info.file_size), Place(begin + start, info.compress_size, compression))
        # bzip2 and lzma decompress a whole step: 4 KiB reach 100 MiB at most.
        return Placed(b"".join(iter(partial(file.read, _STEP), b"")))
    except (EOFError, struct.error):
        return Placed(unreadable("the archive ends before it does; fetch it again"))
    except Exception as error:  # a damaged member raises many types
        return Placed(unreadable(f"{error}; fetch it again"))


def _name(info: zipfile.ZipInfo) -> str:
    """Decode a member's name; without the UTF-8 flag its encoding is guessed. Old .NET writes backslashes."""
    name = info.filename if info.flag_bits & _UTF8_FLAG else decode_name(info.filename.encode("cp437"))
    return name if "/" in name else name.replace("\\", "/")


def _not_a_zip(file: io.BufferedReader) -> ArchiveError:
    file.seek(0)
    start = file.read(512)
    if start.startswith(b"PK\3\4"):
        return ArchiveError(
            "its table of contents is missing or damaged, so it is probably truncated; fetch it again"
        )
    if start.startswith(GZIP) or start[257:262] == b"ustar":
        return ArchiveError("its content is a tar or gzip file; rename it to .tar or .tar.gz")
    return ArchiveError("it is not an archive of its kind or it is damaged; fetch it again")
