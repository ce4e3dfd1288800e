"""Unpack the images of a zip or tar in a request body: in memory, in order, one at a time.

A tar is streamed. A zip has its table of contents at its end, so its bytes are held in memory, up to a limit.
The first bytes decide which of the two it is. Names of members are labels and never paths.
"""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

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
    body = _Body(start, data)
    if start.startswith(_ZIP):
        members = _zip_members(await _hold(start, data, limits.zip_bytes), limits)
    else:
        members = _tar_members(body, limits)
    loop = asyncio.get_running_loop()
    try:
        while member := await loop.run_in_executor(pool, next, members, None):
            yield (member[0][:MAX_NAME], _LONG_NAME) if len(member[0]) > MAX_NAME else member
    except ArchiveError as error:
        if body.error:  # the reason of the early end of the tar
            raise body.error from None
        raise Refusal(422, "bad_archive", f"the archive cannot be read: {error}") from None
    finally:
        body.stop()


async def _hold(start: bytes, data: AsyncIterator[bytes], limit: int) -> bytearray:
    held = bytearray(start)
    async for piece in data:
        held += piece
        if len(held) > limit:
            break
    if len(held) > limit:
        raise Refusal(
            413,
            "too_many_bytes",
            f"the limit of a zip is {limit:,} bytes, because it is held in memory; send a tar, or put it in "
            "object storage and have POST /v1/bulk grade it",
        )
    return held


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


def _tar_members(body: _Body, limits: BatchSettings) -> Iterator[NamedImage]:
    images = 0
    members = tars.stream_members(body, MAX_BYTES, locations.is_image_name)
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


class _Body(io.RawIOBase):
    """Body of a request as a file for a thread, forward only; the event loop receives a piece on demand."""

    def __init__(self, start: bytes, data: AsyncIterator[bytes]) -> None:
        self._loop = asyncio.get_running_loop()
        self._data = data
        self._receiving: asyncio.Task[Any] | None = None
        self._is_stopped = False
        self.error: Exception | None = None  # of the connection
        self._piece = start
        self._inside = self._at = 0

    def stop(self) -> None:
        """End the body for a thread that waits for it."""
        self._is_stopped = True
        if self._receiving:
            self._receiving.cancel()

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
        if self._inside == len(self._piece):
            self._piece = asyncio.run_coroutine_threadsafe(self._receive(), self._loop).result()
            self._inside = 0
        return len(self._piece) - self._inside

    async def _receive(self) -> bytes:
        if self._is_stopped:
            return b""
        self._receiving = asyncio.current_task()
        try:
            return await anext(self._data, b"")
        except Exception as error:
            self.error = error
            raise
        finally:
            self._receiving = None

    def _move(self, size: int) -> None:
        self._inside += size
        self._at += size
