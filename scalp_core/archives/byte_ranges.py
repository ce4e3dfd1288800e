"""Byte ranges and file objects for archive readers: by range, in one pass with read-ahead, decompressed."""

from __future__ import annotations

import io
import re
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

from scalp_core import storage
from scalp_core.storage.errors import ArchiveError

# Read by range: neighbors are fetched by one request, with the gap between them if reading it takes less time
# than another request to S3; several requests run in parallel.
_REQUEST = 2**20
_GAP = 2**16
_REQUESTS = 16
_ON_THEIR_WAY = 2**24

# In one pass: pieces whose transfer takes longer than the latency of S3. Two are fetched while one is used:
# a stream takes 24 MiB.
_PIECE = 2**23
_AHEAD = 2

# Images hardly compress: a GiB from less than a hundredth of it is a decompression bomb. Raw BMP, TIFF and
# label files compress by a factor of ten or twenty.
MAX_RATIO = 100
_RATIO_WINDOW = 2**30
_PACKED_PIECE = 2**16

GZIP = b"\x1f\x8b"
_OTHER_COMPRESSIONS = re.compile(rb"(?P<bzip2>BZh[1-9]1A)|(?P<xz>\xfd7zXZ\0)|(?P<zstd>\x28\xb5\x2f\xfd)")

Range = tuple[int, int]
"""Begin and end of a byte range in a file."""

Read = Callable[[int, int], bytes]


def read_ranges(uri: str, ranges: Sequence[Range], read: Read | None = None) -> Iterator[bytes]:
    """Read byte ranges of a file, in order; fewer bytes where the file ends. Fastest in the file's order.

    Memory is bounded by 16 MiB and the longest range.

    Args:
        uri: File to read.
        ranges: Begin and end of each range.
        read: Returns `length` bytes of the file from `start`; default `storage.read_range`.

    Raises:
        OSError: storage failed, or did not answer before the retry timeout.
    """
    read = read or partial(storage.read_range, uri)
    coming: deque[tuple[list[Range], Future[bytes]]] = deque()
    on_their_way = 0
    groups = list(_neighbors(ranges))
    if len(groups) == 1 or not storage.is_s3(uri):  # a disk is faster than starting threads
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


class ReadAheadFile(storage.RangedFile):
    """File for one pass, in large pieces with read-ahead; pieces that the reader skips are not fetched."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._file = storage.open_file(uri)
        super().__init__(self._read_piece, self._file.size())
        self._pieces: dict[int, Future[bytes]] = {}
        self._pool = ThreadPoolExecutor(_AHEAD)

    def _read_piece(self, start: int, length: int) -> bytes:
        """Read the bytes up to the end of a piece."""
        number, inside = divmod(start, _PIECE)
        last = (self.size - 1) // _PIECE
        numbers = range(number, min(number + _AHEAD, last) + 1)
        for outdated in self._pieces.keys() - numbers:
            self._pieces.pop(outdated).cancel()
        for following in numbers:
            if following not in self._pieces:
                self._pieces[following] = self._fetch(following)
        return self._pieces[number].result()[inside : inside + length]

    def _fetch(self, number: int) -> Future[bytes]:
        begin = number * _PIECE
        size = min(_PIECE, self.size - begin)
        return self._pool.submit(storage.call_with_retries, self._uri, self._file.read_at, size, begin)

    def close(self) -> None:
        # Requests in progress still use the file; they are not awaited.
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._pieces.clear()
        super().close()


def open_decompressed(raw: io.RawIOBase) -> io.RawIOBase:
    """Return a decompressing reader for gzip content, else the file from its beginning.

    Raises:
        ArchiveError: the file is a zip, or compressed by bzip2, xz or zstd.
    """
    start = raw.read(6) or b""
    raw.seek(0)
    if start.startswith(b"PK\3\4"):
        raise ArchiveError("it is a zip by its content; rename it to end in .zip")
    if other := _OTHER_COMPRESSIONS.match(start):
        raise ArchiveError(
            f"it is compressed by {other.lastgroup}, which is not read; unpack it, or repack it as .tar or "
            ".tar.gz"
        )
    return DecompressedFile(raw) if start.startswith(GZIP) else raw


class DecompressedFile(io.RawIOBase):
    """Sequential reader of one or several concatenated gzip streams, in bounded memory.

    Raises:
        ArchiveError: the file is damaged, truncated, or a decompression bomb.
    """

    def __init__(self, raw: io.RawIOBase) -> None:
        self._file = io.BufferedReader(raw, _PACKED_PIECE)
        self._stream = zlib.decompressobj(wbits=31)
        self._input = b""
        self._at = 0
        self._taken = self._given = 0  # bytes, in and out, since the last check of the ratio

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence != io.SEEK_SET or offset < self._at:
            raise io.UnsupportedOperation("compressed data are read forwards only")
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
                    f"it unpacks to more than {MAX_RATIO} times its size, which images do not; it is refused "
                    "as a decompression bomb"
                )
            self._taken = self._given = 0
        return len(data)

    def _next(self, size: int) -> bytes:
        while not self._stream.eof or self._has_another():
            packed = self._input or self._more()
            try:
                data = self._stream.decompress(packed, size)
            except zlib.error as error:
                raise ArchiveError(f"it is damaged ({error}); fetch it again") from error
            self._input = self._stream.unconsumed_tail
            if data:
                return data
            if not packed and not self._stream.eof:
                raise ArchiveError("it is truncated: its compressed data are incomplete; fetch it again")
        return b""

    def _more(self) -> bytes:
        data = self._file.read(_PACKED_PIECE)
        self._taken += len(data)
        return data

    def _has_another(self) -> bool:
        """Whether another gzip stream follows, as `cat` and bgzip write them; zeros are padding."""
        rest = self._stream.unused_data.lstrip(b"\0")
        while not rest and (data := self._more()):
            rest = data.lstrip(b"\0")
        if not rest:
            return False
        rest += self._more() if len(rest) < len(GZIP) else b""
        if not rest.startswith(GZIP):
            raise ArchiveError("other data follow its compressed data; fetch it again, or pack it again")
        self._stream, self._input = zlib.decompressobj(wbits=31), rest
        return True

    def close(self) -> None:
        self._file.close()
        super().close()
