"""From a file's bytes to RGB pixels no larger than needed: formats, color modes, limits and refusals.

JPEG goes through libjpeg-turbo by simplejpeg, at the smallest eighth that is large enough and with every
warning of the decoder heard; all else, and the rare kinds of JPEG, through Pillow. Both leave Python's lock
while they work. docs/architecture.md has the measurements behind the choice.
"""

from __future__ import annotations

import io
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from scalp_core.errors import ImageError

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
}
_KNOWN = re.compile(
    "|".join(f"(?P<{name}>{p.decode('latin-1')})" for name, p in _SIGNATURES.items()).encode("latin-1"), re.S
)
_FOREIGN = re.compile(
    rb"(?P<GIF>GIF8[79]a)|....ftyp(?P<HEIC>heic|heix|hevc|heim|heis|mif1|msf1)|....ftyp(?P<AVIF>avi[fs])"
    rb"|(?P<JPEG_2000>\0\0\0\x0cjP  |\xff\x4f\xff\x51)|(?P<PDF>%PDF-)|(?P<Photoshop>8BPS)",
    re.S,
)

# A progressive JPEG goes over all its pixels once a scan. Cameras write about ten scans; a file of a few
# megabytes can ask for a million.
_MAX_SCANNED_PIXELS = 20 * MAX_PIXELS
_SCAN = b"\xff\xda"
# A photograph above this waits for the one before it: threads beside each other would multiply its memory.
_LARGE_PIXELS = 12_000_000
_large = threading.Lock()

# What decoding costs, relative to a pixel of the other formats (15 to 75 ms of CPU per megapixel): a JPEG is
# decoded at a reduced scale (6 ms), a progressive one pays for each scan (18 ms at 10; EPYC, 2026-11-29).
_JPEG_COST = 1 / 8
_SCAN_COST = 0.03

# Said of files that are whole: unusual headers, which many cameras write.
_HARMLESS = re.compile(r"JFIF revision|Invalid SOS parameters|Adobe color transform")

# Pillow warns of odd metadata, file by file. What matters of it is refused.
warnings.filterwarnings("ignore", category=UserWarning, module="PIL")

Target = Callable[[int, int], tuple[int, int]]
"""Width and height of the file to the smallest width and height that the caller has a use for."""


@dataclass(frozen=True, slots=True)
class Picture:
    """A decoded file.

    Args:
        pixels: uint8 (height, width, 3), RGB, as stored: not yet turned upright.
        orientation: 1 to 8, as EXIF counts.
        notes: what the caller should know of a picture that could be read, such as `first_frame_only`.
    """

    pixels: np.ndarray
    orientation: int = 1
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Header:
    """What the header of a file says.

    Args:
        kind: Pillow's name of the format.
        width: pixels, as stored.
        height: pixels, as stored.
        cost: of decoding, in megapixels of PNG.
    """

    kind: str
    width: int
    height: int
    cost: float


def read_picture(data: bytes, target: Target) -> Picture:
    """Decodes a file.

    Args:
        data: the file's bytes.
        target: what size is needed; a JPEG is decoded at the smallest half, quarter or eighth above it.

    Raises:
        ImageError: `empty`, `too_many_bytes`, `not_an_image`, `unsupported_format`, `unsupported_mode`,
            `too_many_pixels`, `too_many_scans`, `truncated` or `corrupt`. A half-read file is refused.
    """
    kind = detect_format(data)
    if kind == "JPEG":
        picture = _read_jpeg(data, target)
        if picture is not None:
            return picture
    return _read_with_pillow(data, kind, target)


def picture_size(data: bytes) -> tuple[int, int]:
    """Width and height in pixels, as stored, from the header alone.

    Raises:
        ImageError: `empty`, `too_many_bytes`, `not_an_image`, `unsupported_format`, `too_many_pixels`,
            `truncated` or `corrupt`.
    """
    with _opened(data, detect_format(data)) as image:
        return image.size


def read_header(data: bytes) -> Header:
    """Format, size and cost of decoding, from the header and the number of scans.

    Raises:
        ImageError: as `picture_size`.
    """
    kind = detect_format(data)
    width, height = _jpeg_size(data) if kind == "JPEG" else (0, 0)
    if not width:
        width, height = picture_size(data)
    weight = max(_JPEG_COST, _SCAN_COST * data.count(_SCAN)) if kind == "JPEG" else 1.0
    return Header(kind, width, height, weight * width * height / 1e6)


def _jpeg_size(data: bytes) -> tuple[int, int]:
    """As `picture_size`, 20 times as fast; 0, 0 where only Pillow can tell."""
    try:
        height, width, _, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return 0, 0
    _check_pixels(width, height)
    return width, height


def detect_format(data: bytes) -> str:
    """Pillow's name of the format, from the first bytes: a file's name proves nothing.

    Raises:
        ImageError: `empty`, `too_many_bytes`, `not_an_image` or `unsupported_format`.
    """
    if not data:
        raise ImageError("empty", "the file has no bytes")
    if len(data) > MAX_BYTES:
        raise ImageError("too_many_bytes", f"{len(data):,} bytes; the limit is {MAX_BYTES:,}")
    found = _KNOWN.match(data)
    if found and found.lastgroup:
        return found.lastgroup
    readable = ", ".join(FORMATS)
    foreign = _FOREIGN.match(data)
    if foreign and foreign.lastgroup:
        name = foreign.lastgroup.replace("_", " ")
        raise ImageError("unsupported_format", f"a {name} file; save it as one of {readable}")
    raise ImageError("not_an_image", f"the bytes are none of {readable}")


def _read_jpeg(data: bytes, target: Target) -> Picture | None:
    """None for the kinds that libjpeg-turbo's simple interface leaves to others, such as CMYK."""
    try:
        height, width, colors, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None  # Pillow says what is wrong with it, or reads it after all
    if colors not in ("YCbCr", "Gray", "RGB"):
        return None
    _check_pixels(width, height)
    _check_scans(data, width, height)
    min_width, min_height = target(width, height)
    try:
        with _turn_of(width, height):
            pixels = simplejpeg.decode_jpeg(
                data,
                "RGB",
                min_width=min_width,
                min_height=min_height,
                min_factor=2,  # other factors than 1, 1/2, 1/4, 1/8 are slower than no scaling at all
            )
    except ValueError as error:
        _judge(str(error))
        return None
    return Picture(pixels, _jpeg_orientation(data))


def _judge(warning: str) -> None:
    """Refuses what the decoder calls damage; returns for what only Pillow can say."""
    if warning.startswith("Premature end"):
        raise ImageError("truncated", "the JPEG ends before the picture does")
    if warning.startswith("Corrupt JPEG data"):
        raise ImageError("corrupt", f"the JPEG is damaged: {warning.removeprefix('Corrupt JPEG data: ')}")
    if not _HARMLESS.search(warning):
        raise ImageError("corrupt", f"the JPEG cannot be decoded: {warning}")


def _jpeg_orientation(data: bytes) -> int:
    # Most photographs of microscopes carry neither; looking is a hundred times cheaper than parsing.
    if b"Exif\0\0" not in data and b":Orientation" not in data:
        return 1
    try:
        with _opened(data, "JPEG") as image:
            return _orientation(image)
    except ImageError:  # the pixels are read already, and were sound
        return 1


def _read_with_pillow(data: bytes, kind: str, target: Target) -> Picture:
    with _opened(data, kind) as image, _refusals(kind):
        if kind == "JPEG":
            _check_scans(data, *image.size)
            image.draft(image.mode, target(*image.size))
        notes = (FIRST_FRAME_ONLY,) if _has_more_frames(image) else ()
        with _turn_of(*image.size):
            image.load()
            return Picture(np.asarray(_to_rgb(image)), _orientation(image), notes)


@contextmanager
def _opened(data: bytes, kind: str) -> Iterator[Image.Image]:
    """The file with its header read and its size checked; nothing is decompressed yet."""
    with _refusals(kind):
        image = Image.open(io.BytesIO(data), formats=(kind,))
    with image:
        _check_pixels(*image.size)
        yield image


@contextmanager
def _refusals(kind: str) -> Iterator[None]:
    """Makes refusals of what Pillow raises; the formats' parsers raise many kinds for damaged bytes."""
    try:
        yield
    except ImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ImageError("too_many_pixels", f"the limit is {MAX_PIXELS:,} pixels") from None
    except UnidentifiedImageError:
        raise ImageError("corrupt", f"it begins like a {kind} file, but its header cannot be read") from None
    except MemoryError:
        raise ImageError("corrupt", f"the {kind} file asks for more memory than its pixels need") from None
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


def _turn_of(width: int, height: int) -> threading.Lock | nullcontext[None]:
    return _large if width * height > _LARGE_PIXELS else nullcontext()


def _has_more_frames(image: Image.Image) -> bool:
    if image.format == "TIFF":  # counting its frames would read the whole chain of them
        return bool(image.tag_v2.next)  # type: ignore[attr-defined]
    return image.format != "MPO" and getattr(image, "n_frames", 1) > 1


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(0x0112, 1)
    except Exception:  # damaged metadata is no reason to refuse sound pixels
        return 1
    return value if value in range(1, 9) else 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # 16 bits a pixel: keep the high byte
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ImageError("unsupported_mode", f"pixels of mode {image.mode}; save it with 8 bits a channel")
    if image.has_transparency_data:  # as a viewer shows it: what shines through is white
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
