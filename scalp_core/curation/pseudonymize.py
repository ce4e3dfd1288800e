"""Pseudonymize images and manifest rows: remove names, metadata, times and surveys.

The pixels stay the same: the owner of the originals can find an image by its pixels.
"""

from __future__ import annotations

import hashlib
import hmac
import io
import struct
from typing import Any

import numpy as np
from PIL import Image

from scalp_core.datasets.scan import SYNTHETIC_MARK
from scalp_core.errors import ImageError
from scalp_core.images import codecs
from scalp_core.images.codecs import Picture, read_picture
from scalp_core.images.preprocess import upright

KEY_BYTES = 32

_SOI, _EOI, _SOS, _APP0, _APP14, _COMMENT = 0xD8, 0xD9, 0xDA, 0xE0, 0xEE, 0xFE
_APP = range(0xE0, 0xF0)
_ALONE = {0x01, *range(0xD0, 0xD8)}  # markers without a length


def pseudonym(key: bytes, value: str, prefix: str = "") -> str:
    """Return a keyed hash of a value: the same for the same key and value, not reversible without the key."""
    return prefix + hmac.new(key, value.encode(), hashlib.sha256).hexdigest()[:20]


def pseudonymize_row(row: dict[str, Any], key: bytes) -> dict[str, Any]:
    """Replace site, microscope and group of a manifest row by codes, and remove time, sex and age.

    Size, grades, position on the head, split and fold stay.
    """
    coded = {
        name: pseudonym(key, f"{name}:{row[name]}", f"{name}-") if row[name] is not None else None
        for name in ("site", "device", "group")
    }
    return row | coded | {"captured_at": None, "sex": None, "age": None, "source_note": None}


def strip_metadata(data: bytes) -> tuple[bytes, str]:
    """Remove the metadata of an image file; returns a file with the same pixels, and its suffix.

    A JPEG keeps its coded pixels and its orientation, also one in a DICOM file; other formats become PNG.

    Raises:
        ImageError: the image cannot be decoded.
    """
    kind = codecs.detect_format(data)
    if kind == "DICOM" and (jpeg := codecs.open_dicom(data).jpeg):
        return strip_metadata(jpeg)
    if kind != "JPEG":
        return _as_png(_decode(data)), ".png"
    before = _decode(data)
    stripped = _strip_jpeg(data, before.orientation)
    after = _decode(stripped)
    if after.orientation != before.orientation or not np.array_equal(after.pixels, before.pixels):
        return _as_png(before), ".png"  # its colors depend on metadata, such as Adobe's for CMYK
    return stripped, ".jpg"


def declares_identity(data: bytes) -> bool:
    """Whether the header of a DICOM file declares that its pixels show burned-in text or a person's features.

    Raises:
        ImageError: the image cannot be read.
    """
    return codecs.detect_format(data) == "DICOM" and bool(codecs.open_dicom(data).identifying)


def _decode(data: bytes) -> Picture:
    return read_picture(data, lambda width, height: (width, height))


def _as_png(picture: Picture) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(upright(picture.pixels, picture.orientation)).save(buffer, "PNG")
    return buffer.getvalue()


def _strip_jpeg(data: bytes, orientation: int) -> bytes:
    kept = [b"\xff\xd8", _orientation_only(orientation) if orientation != 1 else b""]
    position = 2
    while position + 1 < len(data):
        if data[position] != 0xFF:
            raise ImageError("corrupt", "the JPEG has bytes where a marker should be")
        marker = data[position + 1]
        if marker == 0xFF:  # padding
            position += 1
            continue
        if marker == _EOI:
            break
        if marker in _ALONE:
            position += 2
            continue
        end = position + 2 + int.from_bytes(data[position + 2 : position + 4])
        segment = data[position:end]
        position = end
        if marker == _APP0 and segment[4:9] == b"JFIF\0":
            kept.append(b"\xff\xe0\0\x10" + segment[4:16] + b"\0\0")  # without its thumbnail
        elif (
            (marker == _APP14 and segment[4:9] == b"Adobe")
            or (marker not in _APP and marker != _COMMENT)
            or segment[4:] == SYNTHETIC_MARK
        ):
            kept.append(segment)
        if marker == _SOS:
            end = _end_of_scan(data, position)
            kept.append(data[position:end])
            position = end
    kept.append(b"\xff\xd9")  # without trailing data, such as a second image
    return b"".join(kept)


def _end_of_scan(data: bytes, position: int) -> int:
    """Find the end of the coded pixels: the next marker that is neither an escaped byte nor a restart."""
    while True:
        position = data.find(b"\xff", position)
        if position < 0 or position + 1 >= len(data):
            return len(data)
        if data[position + 1] != 0 and data[position + 1] not in range(0xD0, 0xD8):
            return position
        position += 2


def _orientation_only(orientation: int) -> bytes:
    """An EXIF segment of one entry."""
    tiff = b"MM\0*\0\0\0\x08" + struct.pack(">HHHIHHI", 1, 0x0112, 3, 1, orientation, 0, 0)
    body = b"Exif\0\0" + tiff
    return b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body
