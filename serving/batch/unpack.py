"""The images of a zip or a tar that comes as a request's body: in memory, in order, one at a time.

A tar is read as it comes in. A zip has its table of contents at its end, so its bytes are held, up to a
limit. Which of them it is say its first bytes. Members' names are labels and nothing else.
"""

from __future__ import annotations

import asyncio
import io
import queue
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass

import pyarrow as pa

from scalp_core import archives
from scalp_core.archives import ArchiveError
from scalp_core.datasets import locations
from scalp_core.errors import IMAGE_CODES, ImageError
from scalp_core.images.codecs import MAX_BYTES
from serving.http.problems import Refusal

NamedImage = tuple[str, "bytes | ImageError"]
"""The name that its answer gets, and its bytes or why they cannot be had."""

MAX_NAME = 1024
"""Characters of a member's name; a tar may have names of a MiB, and answers repeat them."""

_SIGNATURE = 6  # bytes that tell the kind of a file
_ZIP = (b"PK\3\4", b"PK\5\6")
_PIECES = 16
_NESTED = ImageError("nested_archive", IMAGE_CODES["nested_archive"])
_LONG_NAME = ImageError("bad_name", f"the name has more than {MAX_NAME:,} characters")


@dataclass(frozen=True)
class Limits:
    """Of one archive.

    Args:
        images: in it.
        members: of any kind; an archive of a few MiB may hold a million empty ones.
        zip_bytes: of a zip, which is held in memory.
    """

    images: int
    members: int
    zip_bytes: int


async def unpack(
    data: AsyncIterator[bytes], limits: Limits, pool: ThreadPoolExecutor
) -> AsyncGenerator[NamedImage, None]:
    """Members that are images by their names, and archives, which are not opened.

    Args:
        data: the archive's bytes.
        limits: of this archive.
        pool: with a free thread for it. It may wait for the body there, so it must not be one that decodes.

    Raises:
        Refusal: it is too large, damaged, hostile or no archive; of a tar, after what came before.
    """
    start = b""
    async for piece in data:
        start += piece
        if len(start) >= _SIGNATURE:
            break
    if start.startswith(_ZIP):
        held = await _held(start, data, limits.zip_bytes)
        members = _pulled(_zip_members(held, limits), pool)
    else:
        members = _tar(start, data, limits, pool)
    async with aclosing(members):
        async for member in members:
            yield member


async def _held(start: bytes, data: AsyncIterator[bytes], limit: int) -> bytearray:
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
    start: bytes, data: AsyncIterator[bytes], limits: Limits, pool: ThreadPoolExecutor
) -> AsyncGenerator[NamedImage, None]:
    pipe = _Pipe()
    feeding = asyncio.create_task(pipe.feed(start, data))
    try:
        members = _pulled(_tar_members(pipe, limits), pool)
        async with aclosing(members):
            async for member in members:
                yield member
        pipe.stop()
        await feeding  # what is left is padding
    except Refusal:
        if feeding.done() and (cause := feeding.exception()):  # why the tar has ended before its end
            raise cause from None
        raise
    finally:
        pipe.stop()
        feeding.cancel()


async def _pulled(
    members: Iterator[NamedImage], pool: ThreadPoolExecutor
) -> AsyncGenerator[NamedImage, None]:
    """Each is read when it is asked for, in a thread."""
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


def _zip_members(held: bytearray, limits: Limits) -> Iterator[NamedImage]:
    archive = archives.open_zip_in_memory(pa.py_buffer(held), limits.members)
    # Of members that share a name only the last can be read.
    names = list(dict.fromkeys(member.name for member in archive.members() if _counts(member.name)))
    if len(names) > limits.images:
        raise _too_many(limits.images)
    read = archive.read([name for name in names if locations.is_image_name(name)], MAX_BYTES)
    data = (member.data for member in read)
    for name in names:
        yield name, next(data) if locations.is_image_name(name) else _NESTED


def _tar_members(pipe: _Pipe, limits: Limits) -> Iterator[NamedImage]:
    images = 0
    for number, (member, data) in enumerate(
        archives.stream_members_of_file(pipe, MAX_BYTES, wanted=locations.is_image_name), start=1
    ):
        if number > limits.members:
            raise ArchiveError(f"it holds more than {limits.members:,} members; divide it")
        if not _counts(member.name):
            continue
        images += 1
        if images > limits.images:
            raise _too_many(limits.images)
        yield member.name, _NESTED if data is None else data


def _counts(name: str) -> bool:
    return locations.is_image_name(name) or archives.is_archive(name)


def _too_many(limit: int) -> Refusal:
    return Refusal(
        413,
        "too_many_photographs",
        f"the limit is {limit:,} images; divide the archive, or have POST /v1/bulk grade it",
    )


class _Pipe(io.RawIOBase):
    """What an event loop feeds and a thread reads, onwards only. It holds few pieces."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._room = asyncio.Semaphore(_PIECES)
        self._pieces: queue.SimpleQueue[bytes] = queue.SimpleQueue()  # an empty one is the end
        self._stopped = self._ended = False
        self._piece = b""
        self._inside = self._at = 0

    async def feed(self, start: bytes, data: AsyncIterator[bytes]) -> None:
        """Passes the bytes on as there is room."""
        try:
            self._pieces.put(start)
            async for piece in data:
                if not self._stopped:
                    await self._room.acquire()
                    self._pieces.put(piece)
        finally:
            self._pieces.put(b"")

    def stop(self) -> None:
        """Nobody reads any more: a thread that waits gets the end, and what comes is thrown away."""
        self._stopped = True
        self._pieces.put(b"")
        self._room.release()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Onwards, or back within the piece: the signature is read twice."""
        back = self._at - offset
        if whence != io.SEEK_SET or back > self._inside:
            raise io.UnsupportedOperation("what comes in is read onwards only")
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
        """Bytes of the piece that are left; of the next one when it is used up; 0 at the end."""
        if self._inside == len(self._piece) and not self._ended:
            piece = self._pieces.get()
            self._ended = not piece
            if piece:
                self._piece, self._inside = piece, 0
                self._loop.call_soon_threadsafe(self._room.release)
        return len(self._piece) - self._inside

    def _move(self, size: int) -> None:
        self._inside += size
        self._at += size
