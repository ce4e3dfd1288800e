"""Decode image files to RGB pixels at the size needed: formats, color modes, limits and errors.

JPEG is decoded by libjpeg-turbo (simplejpeg), at the smallest scale that is large enough; a warning of the
decoder is an error. Other formats, and rare kinds of JPEG, are decoded by Pillow. Both release Python's GIL.
A DICOM file is its pixels, or the JPEG inside. docs/architecture.md has the measurements behind the choice.
"""

from __future__ import annotations

import io
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from scalp_core.errors import ImageError

if TYPE_CHECKING:
    from scalp_core.images.dicom import Frame

FORMATS = ("JPEG", "PNG", "WebP", "BMP", "TIFF")
MAX_BYTES = 32 * 2**20
MAX_PIXELS = 50_000_000

FIRST_FRAME_ONLY = "first_frame_only"

_SIGNATURES = {
    "JPEG": rb"\xff\xd8\xff",
    "PNG": rb"\x89PNG\r\n\x1a\n",
    "WEBP": rb"RIFF....WEBP",
    "BMP": rb"BM",
    "TIFF": rb"II\*\0|MM\0\*|II\+\0|MM\0\+",
    "DICOM": rb".{128}DICM",
}
_KNOWN = re.compile(
    "|".join(f"(?P<{name}>{p.decode('latin-1')})" for name, p in _SIGNATURES.items()).encode("latin-1"), re.S
)
_FOREIGN = re.compile(
    rb"(?P<GIF>GIF8[79]a)|....ftyp(?P<HEIC>heic|heix|hevc|heim|heis|mif1|msf1)|....ftyp(?P<AVIF>avi[fs])"
    rb"|(?P<JPEG_2000>\0\0\0\x0cjP  |\xff\x4f\xff\x51)|(?P<PDF>%PDF-)|(?P<Photoshop>8BPS)",
    re.S,
)

# A progressive JPEG decodes all its pixels once per scan. Cameras write about ten scans; a file of a few
# megabytes can hold a million.
_MAX_SCANNED_PIXELS = 20 * MAX_PIXELS
_SCAN = b"\xff\xda"
# Images above this are decoded one at a time, because parallel threads would multiply their memory.
_LARGE_PIXELS = 12_000_000
_large_image_lock = threading.Lock()

# Cost of decoding, relative to a pixel of the other formats (15 to 75 ms of CPU per megapixel): a JPEG is
# decoded at a reduced scale (6 ms), a progressive one once per scan (18 ms at 10; EPYC, 2026-11-29).
_JPEG_COST = 1 / 8
_SCAN_COST = 0.03

# Warnings about complete files: unusual headers, which many cameras write.
_HARMLESS = re.compile(r"JFIF revision|Invalid SOS parameters|Adobe color transform")

# Pillow warns of odd metadata per file. Metadata that affect the pixels raise an ImageError here.
warnings.filterwarnings("ignore", category=UserWarning, module="PIL")

_UNKNOWN = (0, 0, "")
# Markers by which a JPEG declares its colors; without them libjpeg guesses.
_COLOR_MARKERS = (b"JFIF\0", b"Adobe")

Target = Callable[[int, int], tuple[int, int]]
"""Maps width and height of the file to the smallest width and height that the caller needs."""


@dataclass(frozen=True, slots=True)
class Picture:
    """A decoded image file."""

    pixels: np.ndarray  # uint8 (height, width, 3), RGB, as stored, before rotation to upright
    orientation: int = 1  # EXIF orientation, 1 to 8
    notes: tuple[str, ...] = ()  # remarks on an image that was decoded, such as `first_frame_only`


@dataclass(frozen=True, slots=True)
class Header:
    """Format, size and decoding cost of an image file, from its header."""

    kind: str  # Pillow's name of the format
    width: int  # stored width in pixels
    height: int  # stored height in pixels
    cost: float  # cost of decoding, in megapixels of PNG


def read_picture(data: bytes, target: Target) -> Picture:
    """Decode an image file.

    Args:
        data: Bytes of the file.
        target: Required size; a JPEG is decoded at the smallest half, quarter or eighth above it.

    Raises:
        ImageError: `empty`, `too_many_bytes`, `not_an_image`, `unsupported_format`, `unsupported_mode`,
            `too_many_pixels`, `too_many_scans`, `truncated` or `corrupt`. Partial images are rejected.
    """
    kind = detect_format(data)
    if kind == "DICOM":
        frame = open_dicom(data)
        if frame.pixels is not None:
            return Picture(frame.pixels)
        data, kind = frame.jpeg or b"", "JPEG"
    if kind == "JPEG":
        picture = _read_jpeg(data, target)
        if picture is not None:
            return picture
    return _read_with_pillow(data, kind, target)


def picture_size(data: bytes) -> tuple[int, int]:
    """Read stored width and height in pixels from the header.

    Raises:
        ImageError: `empty`, `too_many_bytes`, `not_an_image`, `unsupported_format`, `too_many_pixels`,
            `truncated` or `corrupt`; of a DICOM file also `unsupported_mode`.
    """
    kind = detect_format(data)
    if kind == "DICOM":
        frame = open_dicom(data)
        return frame.width, frame.height
    with _opened(data, kind) as image:
        return image.size


def open_dicom(data: bytes) -> Frame:
    """Read the frame of a DICOM file, checked but not decoded.

    Raises:
        ImageError: as for `read_picture`.
    """
    try:
        from scalp_core.images import dicom  # pydicom takes a second to import
    except ModuleNotFoundError:
        raise ImageError(
            "unsupported_format",
            "a DICOM file, which needs pydicom; install the extra scalp[clinical], or save it as JPEG",
        ) from None
    frame = dicom.read_frame(data, MAX_PIXELS)
    if frame.jpeg is not None:
        _check_jpeg_in_dicom(frame, frame.jpeg)
    return frame


def _check_jpeg_in_dicom(frame: Frame, jpeg: bytes) -> None:
    if detect_format(jpeg) != "JPEG":
        raise ImageError("corrupt", "the DICOM file announces a JPEG, and has other bytes")
    width, height, colors = _jpeg_header(jpeg)
    if not width:
        width, height = picture_size(jpeg)
    if (width, height) != (frame.width, frame.height):
        raise ImageError(
            "corrupt",
            f"the DICOM header says {frame.width}x{frame.height} pixels, the JPEG has {width}x{height}",
        )
    if frame.colors == "RGB" and colors != "RGB" and not any(name in jpeg[:4096] for name in _COLOR_MARKERS):
        raise ImageError(
            "unsupported_mode",
            "the DICOM header says RGB, and the JPEG does not say what its colors are; save it as JPEG",
        )


def read_header(data: bytes) -> Header:
    """Read format, size and decoding cost from the header and the number of scans.

    Raises:
        ImageError: as for `picture_size`.
    """
    kind = detect_format(data)
    if kind == "DICOM":
        frame = open_dicom(data)
        if frame.jpeg is not None:
            return read_header(frame.jpeg)
        return Header(kind, frame.width, frame.height, frame.width * frame.height / 1e6)
    width, height, _ = _jpeg_header(data) if kind == "JPEG" else _UNKNOWN
    if not width:
        width, height = picture_size(data)
    weight = max(_JPEG_COST, _SCAN_COST * data.count(_SCAN)) if kind == "JPEG" else 1.0
    return Header(kind, width, height, weight * width * height / 1e6)


def _jpeg_header(data: bytes) -> tuple[int, int, str]:
    """Read width, height and color space of a JPEG, 20 times as fast as Pillow; zeros if it cannot."""
    try:
        height, width, colors, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return _UNKNOWN
    _check_pixels(width, height)
    return width, height, colors


def detect_format(data: bytes) -> str:
    """Detect the format from the first bytes; returns Pillow's name of it.

    Raises:
        ImageError: `empty`, `too_many_bytes`, `not_an_image` or `unsupported_format`.
    """
    if not data:
        raise ImageError("empty", "the file has no bytes")
    if len(data) > MAX_BYTES:
        raise ImageError("too_many_bytes", f"{len(data):,} bytes; the limit is {MAX_BYTES:,}")
    known = _KNOWN.match(data)
    if known and known.lastgroup:
        return known.lastgroup
    readable = ", ".join(FORMATS)
    foreign = _FOREIGN.match(data)
    if foreign and foreign.lastgroup:
        name = foreign.lastgroup.replace("_", " ")
        raise ImageError("unsupported_format", f"a {name} file; save it as one of {readable}")
    raise ImageError("not_an_image", f"the bytes are not one of {readable}, DICOM; check the file")


def _read_jpeg(data: bytes, target: Target) -> Picture | None:
    """Decode by libjpeg-turbo; None for kinds that only Pillow decodes, such as CMYK."""
    width, height, colors = _jpeg_header(data)
    if colors not in ("YCbCr", "Gray", "RGB"):
        return None  # Pillow reports the error, or decodes it
    _check_scans(data, width, height)
    min_width, min_height = target(width, height)
    try:
        with _decoding_slot(width, height):
            pixels = simplejpeg.decode_jpeg(
                data,
                "RGB",
                min_width=min_width,
                min_height=min_height,
                min_factor=2,  # factors other than 1, 1/2, 1/4, 1/8 are slower than no scaling
            )
    except ValueError as error:
        _raise_if_damaged(str(error))
        return None
    return Picture(pixels, _jpeg_orientation(data))


def _raise_if_damaged(warning: str) -> None:
    """Raise on a warning of damage; return on one that needs a second opinion from Pillow."""
    if warning.startswith("Premature end"):
        raise ImageError("truncated", "the JPEG ends before the image does")
    if warning.startswith("Corrupt JPEG data"):
        raise ImageError("corrupt", f"the JPEG is damaged: {warning.removeprefix('Corrupt JPEG data: ')}")
    if not _HARMLESS.search(warning):
        raise ImageError("corrupt", f"the JPEG cannot be decoded: {warning}")


def _jpeg_orientation(data: bytes) -> int:
    # Most microscope images have neither; this search is a hundred times cheaper than parsing.
    if b"Exif\0\0" not in data and b":Orientation" not in data:
        return 1
    try:
        with _opened(data, "JPEG") as image:
            return _orientation(image)
    except ImageError:  # the pixels are already decoded
        return 1


def _read_with_pillow(data: bytes, kind: str, target: Target) -> Picture:
    with _opened(data, kind) as image, _refusals(kind):
        if kind == "JPEG":
            _check_scans(data, *image.size)
            image.draft(image.mode, target(*image.size))
        notes = (FIRST_FRAME_ONLY,) if _has_more_frames(image) else ()
        with _decoding_slot(*image.size):
            image.load()
            return Picture(np.asarray(_to_rgb(image)), _orientation(image), notes)


@contextmanager
def _opened(data: bytes, kind: str) -> Iterator[Image.Image]:
    """Open an image: read its header and check its size, without decoding."""
    with _refusals(kind):
        image = Image.open(io.BytesIO(data), formats=(kind,))
    with image:
        _check_pixels(*image.size)
        yield image


@contextmanager
def _refusals(kind: str) -> Iterator[None]:
    """Turn Pillow's exceptions into `ImageError`; its parsers raise many types for damaged bytes."""
    try:
        yield
    except ImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ImageError("too_many_pixels", f"the limit is {MAX_PIXELS:,} pixels") from None
    except UnidentifiedImageError:
        raise ImageError("corrupt", f"the header of the {kind} file cannot be read") from None
    except MemoryError:
        raise ImageError("corrupt", f"the {kind} file requests more memory than its pixels need") from None
    except Exception as error:
        text = str(error) or type(error).__name__
        ends = isinstance(error, EOFError) or re.search("truncated|end of file|unexpected end", text, re.I)
        raise ImageError(
            "truncated" if ends else "corrupt", f"the {kind} file cannot be decoded: {text}"
        ) from None


def _check_pixels(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise ImageError("too_many_pixels", f"{width}x{height} pixels; the limit is {MAX_PIXELS:,}")


def _check_scans(data: bytes, width: int, height: int) -> None:
    scans = data.count(_SCAN)
    if scans > 1 and scans * width * height > _MAX_SCANNED_PIXELS:
        raise ImageError("too_many_scans", f"a progressive JPEG of {width}x{height} pixels in {scans} scans")


def _decoding_slot(width: int, height: int) -> threading.Lock | nullcontext[None]:
    return _large_image_lock if width * height > _LARGE_PIXELS else nullcontext()


def _has_more_frames(image: Image.Image) -> bool:
    if image.format == "TIFF":  # counting its frames would read all their headers
        return bool(image.tag_v2.next)  # type: ignore[attr-defined]
    return image.format != "MPO" and getattr(image, "n_frames", 1) > 1


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(0x0112, 1)
    except Exception:  # damaged metadata do not affect the pixels
        return 1
    return value if value in range(1, 9) else 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # 16 bits per pixel: keep the high byte
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ImageError("unsupported_mode", f"pixels of mode {image.mode}; save it with 8 bits per channel")
    if image.has_transparency_data:  # on white, as viewers show it
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
