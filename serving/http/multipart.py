"""Streaming parser of `multipart/form-data`: yields the parts piece by piece, without temporary files.

python-multipart finds the boundaries. File names of clients are not read.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from typing import Any

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from scalp_core.archives import too_many_bytes
from scalp_core.errors import ImageError
from scalp_core.images.codecs import MAX_BYTES
from serving.http.problems import Refusal

MEDIA_TYPE = "multipart/form-data"
Part = tuple[str, AsyncIterator[bytes]]
"""Field name of a part, and its bytes."""

_Event = str | bytes | None  # a part begins, with its field name; its bytes; its end


async def read_form(
    body: AsyncIterator[bytes], content_type: str, max_parts: int
) -> AsyncGenerator[Part, None]:
    """Yield the parts of a form; bytes of a part that the caller does not read are skipped.

    Args:
        content_type: Content-Type of the request, with the boundary.
        max_parts: Maximum number of fields and files together.

    Raises:
        Refusal: The form is malformed, has too many parts, or ends before its last boundary; raised after the
            parts before.
    """
    events = _read_events(body, _Parser(content_type, max_parts))
    async for event in events:
        if isinstance(event, str):
            yield event, _rest_of_part(events)


async def read_file(data: AsyncIterator[bytes]) -> bytes | ImageError:
    """Read an image file; bytes beyond the limit of an image are counted and dropped."""
    pieces, size = [], 0
    async for piece in data:
        size += len(piece)
        if size <= MAX_BYTES:
            pieces.append(piece)
        else:
            pieces.clear()
    return b"".join(pieces) if size <= MAX_BYTES else too_many_bytes(size, MAX_BYTES)


async def _read_events(body: AsyncIterator[bytes], parser: _Parser) -> AsyncGenerator[_Event, None]:
    async for data in body:
        for event in parser.feed(data):
            yield event
    if not parser.ended:
        raise _bad_form("it ends before its last boundary")


async def _rest_of_part(events: AsyncIterator[_Event]) -> AsyncGenerator[bytes, None]:
    async for event in events:
        if not isinstance(event, bytes):
            return
        yield event


class _Parser:
    """Incremental parser of a form. python-multipart limits the headers of a part to eight of 4 KiB."""

    def __init__(self, content_type: str, max_parts: int) -> None:
        kind, options = parse_options_header(content_type)
        boundary = options.get(b"boundary")
        if kind != MEDIA_TYPE.encode() or not boundary:
            raise _bad_form("its Content-Type must be multipart/form-data with a boundary")
        callbacks: Any = {name: getattr(self, name) for name in dir(self) if name.startswith("on_")}
        try:
            self._parser = MultipartParser(boundary, callbacks)
        except FormParserError:
            raise _bad_form("its boundary is too long") from None
        self._max_parts = max_parts
        self._parts = 0
        self._header = self._value = self._disposition = b""
        self._events: list[_Event] = []
        self.ended = False

    def feed(self, data: bytes) -> Iterator[_Event]:
        """Parse a piece of the body and yield its events, then raise its refusal."""
        self._events = []
        refusal = None
        try:
            self._parser.write(data)
        except FormParserError:
            refusal = _bad_form("its parts or their headers do not follow RFC 7578")
        except Refusal as error:  # raised by a callback of the parser
            refusal = error
        yield from self._events
        if refusal:
            raise refusal

    def on_part_begin(self) -> None:
        self._parts += 1
        if self._parts > self._max_parts:
            raise Refusal(
                413, "too_many_photographs", f"the limit is {self._max_parts:,} parts; divide the form"
            )
        self._disposition = b""

    def on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def on_header_end(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = self._value
        self._header = self._value = b""

    def on_headers_finished(self) -> None:
        kind, options = parse_options_header(self._disposition)
        if kind != b"form-data" or b"name" not in options:
            raise _bad_form("each part needs the header Content-Disposition: form-data with a name")
        self._events.append(options[b"name"].decode("utf-8", "replace"))

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        self._events.append(data[start:end])

    def on_part_end(self) -> None:
        self._events.append(None)

    def on_end(self) -> None:
        self.ended = True


def _bad_form(why: str) -> Refusal:
    return Refusal(400, "bad_form", f"the form cannot be read: {why}")
