"""An archive's bytes as Python's own readers take them: by range, in one pass, and unpacked."""

from __future__ import annotations

import bz2
import errno
import io
import lzma
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import pyarrow as pa

from scalp_core import storage
from scalp_core.storage.errors import ArchiveError

# Read by range: neighbors come by one request, with what lies between them if it is small against the time
# that S3 takes to answer; several requests run beside each other.
_REQUEST = 2**20
_GAP = 2**16
_REQUESTS = 16
_ON_THEIR_WAY = 2**24

# In one pass: pieces that are large against the time that S3 takes to answer, and two on their way while one
# is used. A stream holds 24 MiB.
_PIECE = 2**23
_AHEAD = 2

# Photographs do not shrink: a GiB that comes out of less than a hundredth of it is a bomb. Raw BMP and TIFF,
# and label files, shrink by ten or twenty.
MAX_RATIO = 100
_RATIO_WINDOW = 2**30
# `xz -9` needs 65 MiB to unpack; a header can ask for 4 GiB.
MAX_XZ_BYTES = 2**28
_PACKED_PIECE = 2**16

_START_OF_PACKED: dict[bytes, Callable[[], Any]] = {
    b"\x1f\x8b": lambda: zlib.decompressobj(wbits=31),
    b"BZh": bz2.BZ2Decompressor,
    b"\xfd7zXZ\0": lambda: lzma.LZMADecompressor(memlimit=MAX_XZ_BYTES),
}


Range = tuple[int, int]
"""Where bytes of a file begin and end."""

Read = Callable[[int, int], bytes]


def read_ranges(uri: str, ranges: Sequence[Range], read: Read | None = None) -> Iterator[bytes]:
    """The bytes of each range, in order; fewer where the file ends. Fastest in the file's order.

    At most 16 MiB are held, and the longest range.

    Args:
        uri: file to read.
        ranges: begin and end of each.
        read: returns `length` bytes of the file from `start`; `storage.read_range` unless given.

    Raises:
        OSError: storage refused, or did not answer before the retry timeout.
    """
    read = read or partial(storage.read_range, uri)
    coming: deque[tuple[list[Range], Future[bytes]]] = deque()
    on_their_way = 0
    groups = list(_neighbors(ranges))
    if len(groups) == 1 or not storage.is_s3(uri):  # a disk answers sooner than a thread starts
        for group in groups:
            yield from _parts(group, read(group[0][0], group[-1][1] - group[0][0]))
        return
    pool = ThreadPoolExecutor(_REQUESTS)
    try:
        for group in groups:
            begin, size = group[0][0], group[-1][1] - group[0][0]
            coming.append((group, pool.submit(read, begin, size)))
            on_their_way += size
            while on_their_way > _ON_THEIR_WAY:
                first, request = coming.popleft()
                yield from _parts(first, request.result())
                on_their_way -= first[-1][1] - first[0][0]
        for first, request in coming:
            yield from _parts(first, request.result())
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _neighbors(ranges: Sequence[Range]) -> Iterator[list[Range]]:
    group: list[Range] = []
    for begin, end in ranges:
        if group and not (0 <= begin - group[-1][1] <= _GAP and end - group[0][0] <= _REQUEST):
            yield group
            group = []
        group.append((begin, end))
    if group:
        yield group


def _parts(group: list[Range], data: bytes) -> Iterator[bytes]:
    start = group[0][0]
    return (data[begin - start : end - start] for begin, end in group)


class Ranged(io.RawIOBase):
    """A file by range; a read waits for a server that is away."""

    def __init__(self, uri: str, file: pa.NativeFile) -> None:
        self._uri = uri
        self._file = file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        try:
            return self._file.seek(offset, whence)
        except ValueError as error:  # Python's readers expect what its own files raise
            raise OSError(errno.EINVAL, str(error)) from None

    def tell(self) -> int:
        return self._file.tell()

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        start = self._file.tell()

        def attempt() -> bytes:
            self._file.seek(start)
            return self._file.read(len(buffer))

        data = storage.call_with_retries(self._uri, attempt)
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()


class Ahead(io.RawIOBase):
    """A file in one pass, in large pieces, the next ones on their way; it may leave pieces out."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._file = storage.open_file(uri)
        self._size = self._file.size()
        self._at = 0
        self._pieces: dict[int, Future[bytes]] = {}
        self._pool = ThreadPoolExecutor(_AHEAD)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + (0, self._at, self._size)[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        if self._at >= self._size:
            return 0
        number, inside = divmod(self._at, _PIECE)
        data = memoryview(self._piece(number))[inside : inside + len(buffer)]
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def _piece(self, number: int) -> bytes:
        last = (self._size - 1) // _PIECE
        numbers = range(number, min(number + _AHEAD, last) + 1)
        for left_out in self._pieces.keys() - numbers:
            self._pieces.pop(left_out).cancel()
        for each in numbers:
            if each not in self._pieces:
                self._pieces[each] = self._fetch(each)
        return self._pieces[number].result()

    def _fetch(self, number: int) -> Future[bytes]:
        begin = number * _PIECE
        size = min(_PIECE, self._size - begin)
        return self._pool.submit(storage.call_with_retries, self._uri, self._file.read_at, size, begin)

    def close(self) -> None:
        # The file is left to what is still on its way, for which nobody waits.
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._pieces.clear()
        super().close()


def is_packed(start: bytes) -> bool:
    """Whether a file's first bytes are those of gzip, bzip2 or xz."""
    return start.startswith(tuple(_START_OF_PACKED))


def unpacked(raw: io.RawIOBase) -> io.RawIOBase:
    """The file itself, from its beginning, or what is packed in it; whatever its name says.

    Raises:
        ArchiveError: it is a zip.
    """
    start = raw.read(6) or b""
    raw.seek(0)
    if start.startswith(b"PK\3\4"):
        raise ArchiveError("it is a zip by its content; rename it to end in .zip")
    for magic, begin in _START_OF_PACKED.items():
        if start.startswith(magic):
            return Unpacked(io.BufferedReader(raw, _PACKED_PIECE), magic, begin)
    return raw


class Unpacked(io.RawIOBase):
    """What a gzip, bzip2 or xz file holds, or several in one; onwards only, in bounded memory.

    Raises:
        ArchiveError: damaged, cut, or a bomb.
    """

    def __init__(self, file: io.BufferedReader, magic: bytes, begin: Callable[[], Any]) -> None:
        self._file = file
        self._magic = magic
        self._begin = begin
        self._packed = begin()
        self._input = b""
        self._at = 0
        self._taken = self._given = 0  # bytes, in and out, since the ratio was looked at

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence != io.SEEK_SET or offset < self._at:
            raise io.UnsupportedOperation("what is packed is read onwards only")
        while self._at < offset and self.read(min(offset - self._at, _PACKED_PIECE)):
            pass
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        data = self._next(len(buffer))
        buffer[: len(data)] = data
        self._at += len(data)
        self._given += len(data)
        if self._given >= _RATIO_WINDOW:
            if self._given > MAX_RATIO * self._taken:
                raise ArchiveError(
                    f"it unpacks to more than {MAX_RATIO} times its size, as no photographs do; it is taken "
                    "for a bomb and not read on"
                )
            self._taken = self._given = 0
        return len(data)

    def _next(self, size: int) -> bytes:
        while True:
            if self._packed.eof and not self._has_another():
                return b""
            ended = False
            if not self._input and getattr(self._packed, "needs_input", True):
                self._input = self._more()
                ended = not self._input
            data = self._unpack(size)
            if data:
                return data
            if ended and not self._packed.eof:
                raise ArchiveError("it was cut: it ends before what is packed in it does; fetch it again")

    def _unpack(self, size: int) -> bytes:
        try:
            data = self._packed.decompress(self._input, size)
        except (OSError, ValueError, EOFError, zlib.error, lzma.LZMAError) as error:
            if "Memory usage limit" in str(error):
                raise ArchiveError(
                    f"it takes more than {MAX_XZ_BYTES // 2**20} MiB to unpack; pack it anew by xz -9 or less"
                ) from None
            raise ArchiveError(f"it is damaged ({error}); fetch it again") from error
        self._input = getattr(self._packed, "unconsumed_tail", b"")  # zlib's; the others keep it themselves
        return data

    def _more(self) -> bytes:
        data = self._file.read(_PACKED_PIECE)
        self._taken += len(data)
        return data

    def _has_another(self) -> bool:
        """Whether another packed file follows, as pigz and `cat` write them; zeros between are padding."""
        rest = self._packed.unused_data.lstrip(b"\0")
        while not rest and (data := self._more()):
            rest = data.lstrip(b"\0")
        if not rest:
            return False
        rest += self._more() if len(rest) < len(self._magic) else b""
        if not rest.startswith(self._magic):
            raise ArchiveError("something else follows what is packed in it; fetch it again, or pack it anew")
        self._packed, self._input = self._begin(), rest
        return True

    def close(self) -> None:
        self._file.close()
        super().close()
