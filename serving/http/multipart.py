"""Streaming parser of `multipart/form-data`: yields the parts piece by piece, without temporary files.

python-multipart finds the boundaries. File names of clients are not read.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from enum import Enum
from typing import NamedTuple

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from scalp_core.archives import too_many_bytes
from scalp_core.errors import ImageError
from scalp_core.images.codecs import MAX_BYTES
from serving.http.problems import Refusal

MEDIA_TYPE = "multipart/form-data"

# python-multipart limits the headers of a part to eight of 4 KiB.
_DISPOSITION = b"content-disposition"


class Begin(NamedTuple):
    """Event: a part begins; its bytes follow."""

    field: str


class End(Enum):
    """Event: a part has ended."""

    END = 0


Event = Begin | bytes | End


class Form:
    """Incremental parser of a form, fed with pieces of any size.

    Args:
        content_type: Content-Type of the request, with the boundary.
        max_parts: Maximum number of fields and files together.

    Raises:
        Refusal: The content type is not a form, or has no boundary.
    """

    def __init__(self, content_type: str, max_parts: int) -> None:
        kind, options = parse_options_header(content_type)
        boundary = options.get(b"boundary")
        if kind != MEDIA_TYPE.encode() or not boundary:
            raise bad_form("its Content-Type must be multipart/form-data with a boundary")
        try:
            self._parser = MultipartParser(
                boundary,
                {
                    "on_part_begin": self._on_part_begin,
                    "on_header_field": self._on_header_field,
                    "on_header_value": self._on_header_value,
                    "on_header_end": self._on_header_end,
                    "on_headers_finished": self._on_headers_finished,
                    "on_part_data": self._on_part_data,
                    "on_part_end": self._on_part_end,
                    "on_end": self._on_end,
                },
            )
        except FormParserError:
            raise bad_form("its boundary is too long") from None
        self._max_parts = max_parts
        self._parts = 0
        self._header = self._value = self._disposition = b""
        self._events: list[Event] = []
        self.ended = False

    def feed(self, data: bytes) -> Iterator[Event]:
        """Parse a piece of the body and yield its events.

        Raises:
            Refusal: The form is malformed or has too many parts; raised after the events before.
        """
        self._events = []
        refusal = None
        try:
            self._parser.write(data)
        except FormParserError:
            refusal = bad_form("its parts or their headers do not follow RFC 7578")
        except Refusal as error:  # raised by a callback of the parser
            refusal = error
        yield from self._events
        if refusal:
            raise refusal

    def _on_part_begin(self) -> None:
        self._parts += 1
        if self._parts > self._max_parts:
            raise Refusal(
                413, "too_many_photographs", f"the limit is {self._max_parts:,} parts; divide the form"
            )
        self._disposition = b""

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _on_header_end(self) -> None:
        if self._header.lower() == _DISPOSITION:
            self._disposition = self._value
        self._header = self._value = b""

    def _on_headers_finished(self) -> None:
        kind, options = parse_options_header(self._disposition)
        if kind != b"form-data" or b"name" not in options:
            raise bad_form("each part needs the header Content-Disposition: form-data with a name")
        self._events.append(Begin(options[b"name"].decode("utf-8", "replace")))

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        self._events.append(data[start:end])

    def _on_part_end(self) -> None:
        self._events.append(End.END)

    def _on_end(self) -> None:
        self.ended = True


async def read_form(body: AsyncIterator[bytes], form: Form) -> AsyncGenerator[Event, None]:
    """Yield the events of a whole form.

    Raises:
        Refusal: As `Form.feed`, or the body ends before the last boundary.
    """
    async for data in body:
        for event in form.feed(data):
            yield event
    if not form.ended:
        raise bad_form("it ends before its last boundary")


async def rest_of_part(events: AsyncIterator[Event]) -> AsyncGenerator[bytes, None]:
    """Yield the remaining bytes of the current part."""
    async for event in events:
        if event is End.END:
            return
        if isinstance(event, bytes):
            yield event


async def whole_part(data: AsyncIterator[bytes]) -> bytes | ImageError:
    """Read a part; bytes beyond the limit of an image are counted and dropped."""
    pieces, size = [], 0
    async for piece in data:
        size += len(piece)
        if size <= MAX_BYTES:
            pieces.append(piece)
        else:
            pieces.clear()
    return b"".join(pieces) if size <= MAX_BYTES else too_many_bytes(size, MAX_BYTES)


def bad_form(why: str) -> Refusal:
    """The refusal of a malformed form."""
    return Refusal(400, "bad_form", f"the form cannot be read: {why}")
