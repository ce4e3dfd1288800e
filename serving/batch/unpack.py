"""Unpack the images of a zip or tar in a request body: in memory, in order, one at a time.

A tar is streamed. A zip has its table of contents at its end, so its bytes are held in memory, up to a limit.
The first bytes decide which of the two it is. Names of members are labels and never paths.
"""

from __future__ import annotations

import asyncio
import io
import queue
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing

import pyarrow as pa

from scalp_core import archives
from scalp_core.archives import tars
from scalp_core.archives.zips import Zip
from scalp_core.datasets import locations
from scalp_core.errors import IMAGE_CODES, ImageError
from scalp_core.images.codecs import MAX_BYTES
from scalp_core.storage.errors import ArchiveError
from serving.batch.window import BatchSettings
from serving.http.problems import Refusal

NamedImage = tuple[str, "bytes | ImageError"]
"""Name of an image for its line, and its bytes or the error that replaces them."""

MAX_NAME = 1024
"""Longest name of a member, in characters: a tar may have names of a MiB, and responses repeat them."""

_SIGNATURE = 6  # bytes that identify the kind of a file
_ZIP = (b"PK\3\4", b"PK\5\6")
_PIECES = 16
_NESTED = ImageError("nested_archive", IMAGE_CODES["nested_archive"])
_LONG_NAME = ImageError("bad_name", f"the name has more than {MAX_NAME:,} characters")


async def unpack(
    data: AsyncIterator[bytes], limits: BatchSettings, pool: ThreadPoolExecutor
) -> AsyncGenerator[NamedImage, None]:
    """Yield the members that are images by their names, and nested archives as errors.

    Args:
        pool: Executor with a free thread. The thread waits for the body, so it must not be a decoding thread.

    Raises:
        Refusal: The body is too large, damaged, hostile or not an archive; of a tar, after the images before.
    """
    start = b""
    async for piece in data:
        start += piece
        if len(start) >= _SIGNATURE:
            break
    if start.startswith(_ZIP):
        held = await _hold(start, data, limits.zip_bytes)
        members = _read_on_demand(_zip_members(held, limits), pool)
    else:
        members = _tar(start, data, limits, pool)
    async with aclosing(members):
        async for member in members:
            yield member


async def _hold(start: bytes, data: AsyncIterator[bytes], limit: int) -> bytearray:
    held = bytearray(start)
    while len(held) <= limit:
        if not (piece := await anext(data, b"")):
            return held
        held += piece
    raise Refusal(
        413,
        "too_many_bytes",
        f"the limit of a zip is {limit:,} bytes, because it is held in memory; send a tar, or put it in "
        "object storage and have POST /v1/bulk grade it",
    )


async def _tar(
    start: bytes, data: AsyncIterator[bytes], limits: BatchSettings, pool: ThreadPoolExecutor
) -> AsyncGenerator[NamedImage, None]:
    pipe = _Pipe()
    feeding = asyncio.create_task(pipe.feed(start, data))
    try:
        members = _read_on_demand(_tar_members(pipe, limits), pool)
        async with aclosing(members):
            async for member in members:
                yield member
        pipe.stop()
        await feeding  # the rest is padding
    except Refusal:
        if feeding.done() and (cause := feeding.exception()):  # the reason of the early end of the tar
            raise cause from None
        raise
    finally:
        pipe.stop()
        feeding.cancel()


async def _read_on_demand(
    members: Iterator[NamedImage], pool: ThreadPoolExecutor
) -> AsyncGenerator[NamedImage, None]:
    """Read each member on demand, in a thread."""
    loop = asyncio.get_running_loop()
    while True:
        try:
            member = await loop.run_in_executor(pool, next, members, None)
        except ArchiveError as error:
            raise Refusal(422, "bad_archive", f"the archive cannot be read: {error}") from None
        if member is None:
            return
        name, data = member
        yield (name[:MAX_NAME], _LONG_NAME) if len(name) > MAX_NAME else (name, data)


def _zip_members(held: bytearray, limits: BatchSettings) -> Iterator[NamedImage]:
    archive = Zip("archive.zip", pa.py_buffer(held), limits.archive_members)
    # Of members with the same name only the last can be read.
    names = list(dict.fromkeys(member.name for member in archive.members() if _is_listed(member.name)))
    if len(names) > limits.photographs:
        raise _too_many(limits.photographs)
    read = archive.read([name for name in names if locations.is_image_name(name)], MAX_BYTES)
    data = (member.data for member in read)
    for name in names:
        yield name, next(data) if locations.is_image_name(name) else _NESTED


def _tar_members(pipe: _Pipe, limits: BatchSettings) -> Iterator[NamedImage]:
    images = 0
    members = tars.stream_members(pipe, MAX_BYTES, locations.is_image_name)
    for number, (member, data) in enumerate(members, start=1):
        if number > limits.archive_members:
            raise ArchiveError(f"it holds more than {limits.archive_members:,} members; divide it")
        if not _is_listed(member.name):
            continue
        images += 1
        if images > limits.photographs:
            raise _too_many(limits.photographs)
        yield member.name, _NESTED if data is None else data


def _is_listed(name: str) -> bool:
    return locations.is_image_name(name) or archives.is_archive(name)


def _too_many(limit: int) -> Refusal:
    return Refusal(
        413,
        "too_many_photographs",
        f"the limit is {limit:,} images; divide the archive, or have POST /v1/bulk grade it",
    )


class _Pipe(io.RawIOBase):
    """Bounded pipe from the event loop to a thread that reads it as a file, forward only."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._free_pieces = asyncio.Semaphore(_PIECES)
        self._pieces: queue.SimpleQueue[bytes] = queue.SimpleQueue()  # an empty piece is the end
        self._stopped = self._ended = False
        self._piece = b""
        self._inside = self._at = 0

    async def feed(self, start: bytes, data: AsyncIterator[bytes]) -> None:
        """Write the bytes to the pipe; wait while it is full."""
        try:
            self._pieces.put(start)
            async for piece in data:
                if not self._stopped:
                    await self._free_pieces.acquire()
                    self._pieces.put(piece)
        finally:
            self._pieces.put(b"")

    def stop(self) -> None:
        """End the pipe for its reader and drop further bytes."""
        self._stopped = True
        self._pieces.put(b"")
        self._free_pieces.release()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Seek forward, or back within the current piece: the signature is read twice."""
        back = self._at - offset
        if whence != io.SEEK_SET or back > self._inside:
            raise io.UnsupportedOperation("the body is read forward only")
        if back > 0:
            self._move(-back)
        while self._at < offset and (size := self._available()):
            self._move(min(size, offset - self._at))
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        size = min(self._available(), len(buffer))
        buffer[:size] = self._piece[self._inside : self._inside + size]
        self._move(size)
        return size

    def _available(self) -> int:
        """Unread bytes of the current piece, or of the next piece; 0 at the end."""
        if self._inside == len(self._piece) and not self._ended:
            piece = self._pieces.get()
            self._ended = not piece
            if piece:
                self._piece, self._inside = piece, 0
                self._loop.call_soon_threadsafe(self._free_pieces.release)
        return len(self._piece) - self._inside

    def _move(self, size: int) -> None:
        self._inside += size
        self._at += size
