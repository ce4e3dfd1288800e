"""Read DICOM files of one photograph: pixels, or the JPEG inside, and nothing else of the header.

pydicom parses the header, within limits on elements and pixels that are checked before any pixel is read.
"""

from __future__ import annotations

import io
import logging
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from pydicom import config
from pydicom.dataset import Dataset
from pydicom.encaps import generate_fragments, parse_basic_offsets
from pydicom.filereader import data_element_generator, read_dataset
from pydicom.tag import Tag
from pydicom.uid import (
    UID,
    DermoscopicPhotographyImageStorage,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEGBaseline8Bit,
    SecondaryCaptureImageStorage,
    VLEndoscopicImageStorage,
    VLMicroscopicImageStorage,
    VLPhotographicImageStorage,
)

from scalp_core.errors import ImageError

PHOTOGRAPHS = (
    VLPhotographicImageStorage,
    DermoscopicPhotographyImageStorage,
    VLMicroscopicImageStorage,
    VLEndoscopicImageStorage,
    SecondaryCaptureImageStorage,
)
"""SOP classes of color images of one frame."""

UNCOMPRESSED = (ExplicitVRLittleEndian, ImplicitVRLittleEndian)
_START = 132  # after the preamble and DICM
_UNDEFINED = 0xFFFFFFFF
_PIXEL_DATA = 0x7FE00010
# Each header element takes two or three reads. Photographs have some hundred elements; a file of a few
# megabytes can hold a million, which take seconds of Python. See also `_LimitedFile`.
_MAX_READS = 20_000
_ELEMENT_START = 8  # bytes that pydicom reads of an element first: tag, and type or length
_INTERPRETED = ("SpecificCharacterSet", "TransferSyntaxUID")
_COLORS = {
    "MONOCHROME1", "MONOCHROME2", "PALETTE COLOR", "RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT",
    "YBR_PARTIAL_420", "YBR_PARTIAL_422", "YBR_RCT",
}  # fmt: skip
_JPEG_COLORS = {"RGB", "YBR_FULL", "YBR_FULL_422"}
# Attributes by which the writer declares that the pixels may identify a person.
_IDENTIFYING = ("BurnedInAnnotation", "RecognizableVisualFeatures")
_PIXEL_ATTRIBUTES = (
    "SOPClassUID", "SamplesPerPixel", "PhotometricInterpretation", "PlanarConfiguration", "NumberOfFrames",
    "Rows", "Columns", "BitsAllocated", "BitsStored", "PixelRepresentation", *_IDENTIFYING,
)  # fmt: skip
_WAY_OUT = "save it as JPEG, or convert it to Explicit VR Little Endian or JPEG Baseline"

# Warnings and log lines of pydicom may quote values of the header, which are patient data.
config.settings.reading_validation_mode = config.IGNORE
warnings.filterwarnings("ignore", module="pydicom")
logging.getLogger("pydicom").setLevel(logging.CRITICAL)


@dataclass(frozen=True)
class Frame:
    """The frame of a DICOM file."""

    width: int  # pixels, from the header
    height: int
    colors: str  # photometric interpretation
    jpeg: bytes | None  # the encapsulated JPEG file; None if uncompressed
    pixels: np.ndarray | None  # uint8 (height, width, 3), RGB; None if it is a JPEG
    identifying: tuple[str, ...] = ()  # attributes that declare identifying pixels, such as burned-in names


def read_frame(data: bytes, max_pixels: int) -> Frame:
    """Read the frame of a DICOM file; a JPEG inside is not decoded.

    Raises:
        ImageError: `unsupported_format`, `unsupported_mode`, `too_many_pixels`, `truncated` or `corrupt`. The
            message quotes nothing of the header but the description of the pixels.
    """
    with _refusals():
        return _read_frame(data, max_pixels)


def read_header(data: bytes, names: tuple[str, ...]) -> dict[str, str]:
    """Read attributes of the header by their keywords, such as those of patient and study, as text.

    Raises:
        ImageError: `unsupported_format` or `corrupt`.
    """
    with _refusals():
        file = _LimitedFile(data, names)
        header = _read_attributes(file, _read_transfer_syntax(file), names)
        values = {name: header.get(name) for name in names}
        return {name: "" if value is None else str(value) for name, value in values.items()}


@contextmanager
def _refusals() -> Iterator[None]:
    try:
        yield
    except ImageError:
        raise
    except EOFError:
        raise ImageError("truncated", "the DICOM file ends before its pixels do") from None
    except Exception as error:
        # pydicom raises many types for damaged bytes; their texts may quote the header.
        raise ImageError("corrupt", f"the DICOM file cannot be read ({type(error).__name__})") from None


class _LimitedFile(io.BytesIO):
    """A file whose reads are limited, those of nested elements included.

    A read counts 1, or the number of bytes of a value that pydicom interprets: a value can hold a million
    texts of 12 microseconds each.

    Args:
        data: Bytes of a DICOM file.
        names: Keywords of the attributes whose values will be used.
    """

    def __init__(self, data: bytes, names: tuple[str, ...]) -> None:
        super().__init__(data)
        self._left = _MAX_READS
        self._interpreted = {_as_bytes(name) for name in (*_INTERPRETED, *names)}
        self._tag = b""
        self.seek(_START)

    def read(self, size: int | None = -1, /) -> bytes:
        self._left -= (size or 0) if self._tag in self._interpreted else 1
        if self._left < 0:
            raise ImageError("corrupt", "the DICOM header is far larger than that of a photograph")
        data = super().read(size)
        if len(data) == _ELEMENT_START:
            self._tag = data[:4]
        return data


def _as_bytes(name: str) -> bytes:
    tag = Tag(name)
    return struct.pack("<HH", tag.group, tag.element)


def _read_transfer_syntax(file: _LimitedFile) -> UID:
    # Not by `dcmread`, which decompresses a deflated file without a limit.
    meta = read_dataset(file, False, True, stop_when=lambda tag, *_: tag >> 16 != 2)
    syntax = UID(str(meta.get("TransferSyntaxUID", "")))
    if syntax in (*UNCOMPRESSED, JPEGBaseline8Bit):
        return syntax
    raise ImageError(
        "unsupported_format", f"a DICOM file of the transfer syntax {_named(syntax)}; {_WAY_OUT}"
    )


def _read_attributes(file: _LimitedFile, syntax: UID, names: tuple[str, ...]) -> Dataset:
    return read_dataset(
        file,
        syntax == ImplicitVRLittleEndian,
        True,
        stop_when=lambda tag, *_: tag >= _PIXEL_DATA,
        specific_tags=[Tag(name) for name in names],
    )


def _read_frame(data: bytes, max_pixels: int) -> Frame:
    file = _LimitedFile(data, _PIXEL_ATTRIBUTES)
    syntax = _read_transfer_syntax(file)
    header = _read_attributes(file, syntax, _PIXEL_ATTRIBUTES)
    width, height, colors = _check_header(header, syntax, max_pixels)
    value = _read_pixel_data(file, syntax)
    identifying = tuple(name for name in _IDENTIFYING if header.get(name) == "YES")
    if syntax == JPEGBaseline8Bit:
        return Frame(width, height, colors, _join_fragments(value), None, identifying)
    pixels = _as_pixels(value, width, height, planar=bool(header.get("PlanarConfiguration")))
    return Frame(width, height, colors, None, pixels, identifying)


def _check_header(header: Dataset, syntax: UID, max_pixels: int) -> tuple[int, int, str]:
    """Check that a header describes one color photograph; returns width, height and colors."""
    if (kind := UID(str(header.get("SOPClassUID", "")))) not in PHOTOGRAPHS:
        raise ImageError(
            "unsupported_format", f"a DICOM file of the class {_named(kind)}; save the image as JPEG"
        )
    width, height, samples, bits = (
        _number(header, name) for name in ("Columns", "Rows", "SamplesPerPixel", "BitsAllocated")
    )
    frames = _number(header, "NumberOfFrames", 1)
    if width * height * frames > max_pixels:
        size = f"{width}x{height}" + (f"x{frames}" if frames > 1 else "")
        raise ImageError("too_many_pixels", f"{size} pixels; the limit is {max_pixels:,}")
    if frames > 1:
        raise ImageError("unsupported_format", f"a DICOM file of {frames} frames; save one as JPEG")
    colors = str(header.get("PhotometricInterpretation", ""))
    is_readable = colors in (_JPEG_COLORS if syntax == JPEGBaseline8Bit else {"RGB"})
    signed = header.get("PixelRepresentation", 0) != 0
    if not is_readable or samples != 3 or bits != 8 or _number(header, "BitsStored", 8) != 8 or signed:
        named = colors if colors in _COLORS else "unknown colors"
        raise ImageError(
            "unsupported_mode",
            f"DICOM pixels of {samples} samples in {named} and {bits} bits; save it as JPEG, or as RGB with "
            "8 bits per sample",
        )
    return width, height, colors


def _number(header: Dataset, name: str, default: int | None = None) -> int:
    value = header.get(name)
    value = default if value is None else value
    if not isinstance(value, int) or value < 1:
        raise ImageError("corrupt", f"the DICOM header has no valid {name}")
    return int(value)


def _read_pixel_data(file: _LimitedFile, syntax: UID) -> bytes:
    is_implicit = syntax == ImplicitVRLittleEndian
    elements = data_element_generator(file, is_implicit, True, stop_when=lambda tag, *_: tag != _PIXEL_DATA)
    element = next(elements, None)
    value = getattr(element, "value", None)
    if element is None or not isinstance(value, bytes):
        raise ImageError("corrupt", "the DICOM file has no pixel data")
    length = getattr(element, "length", 0)
    if (length == _UNDEFINED) != (syntax == JPEGBaseline8Bit):
        raise ImageError("corrupt", f"the DICOM pixel data are not those of {_named(syntax)}")
    if length not in (_UNDEFINED, len(value)):
        raise EOFError
    return value


def _join_fragments(value: bytes) -> bytes:
    """Return the JPEG of pixel data; each fragment is a part of the one frame."""
    file = io.BytesIO(value)
    if len(parse_basic_offsets(file)) > 1:
        raise ImageError("corrupt", "the DICOM pixel data are those of several frames, the header says one")
    return b"".join(generate_fragments(file))


def _as_pixels(value: bytes, width: int, height: int, planar: bool) -> np.ndarray:
    size = width * height * 3
    if len(value) not in (size, size + 1):  # padded to an even length
        raise ImageError(
            "corrupt",
            f"the DICOM file has {len(value):,} bytes of pixels, {width}x{height} pixels need {size:,}",
        )
    samples = np.frombuffer(value, np.uint8, size)
    if planar:
        return np.ascontiguousarray(samples.reshape(3, height, width).transpose(1, 2, 0))
    return samples.reshape(height, width, 3)


def _named(uid: UID) -> str:
    """Name of a UID of the standard; another text of the header is not repeated."""
    return f"{uid.name} ({uid})" if uid.name != uid else "unknown to the DICOM standard"
