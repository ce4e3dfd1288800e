"""Corpus of about 300 odd files: truncated, damaged, unusual, hostile; by name."""

from __future__ import annotations

import io
import struct
import zlib
from functools import cache

import numpy as np
from PIL import Image

from scalp_core.errors import IMAGE_CODES
from tests.support.dicom_files import dicom

GRADED = "graded"
# A damaged file may still decode to an image without a visible defect.
ANY = frozenset({GRADED, *IMAGE_CODES})
REFUSED = frozenset({"truncated", "corrupt"})

Corpus = dict[str, tuple[bytes, frozenset[str]]]


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    """Encode an image to the bytes of a file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@cache
def picture(width: int = 320, height: int = 240) -> Image.Image:
    """Image of smooth colors with some grain, like a photo."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(40, 220, (12, 16, 3)).astype(np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    return Image.fromarray((smooth + rng.integers(-4, 5, smooth.shape)).clip(0, 255).astype(np.uint8))


@cache
def sound_files() -> dict[str, bytes]:
    """One small valid file per format, which must be graded."""
    image = picture()
    clear = image.convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize(image.size))
    gray16 = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) << 8)
    files = {
        "jpeg": encoded(image, "JPEG", quality=90),
        "jpeg_progressive": encoded(image, "JPEG", quality=90, progressive=True),
        "jpeg_444": encoded(image, "JPEG", quality=90, subsampling=0),
        "jpeg_restarts": encoded(image, "JPEG", quality=90, restart_marker_blocks=4),
        "jpeg_gray": encoded(image.convert("L"), "JPEG"),
        "jpeg_cmyk": encoded(image.convert("CMYK"), "JPEG"),
        "jpeg_rgb": encoded(image, "JPEG", keep_rgb=True),
        "webp": encoded(image, "WEBP", quality=90),
        "webp_lossless": encoded(image, "WEBP", lossless=True),
        "webp_alpha": encoded(clear, "WEBP"),
        "bmp": encoded(image, "BMP"),
        "tiff": encoded(image, "TIFF"),
        "tiff_lzw": encoded(image, "TIFF", compression="tiff_lzw"),
        "tiff_deflate": encoded(image, "TIFF", compression="tiff_adobe_deflate"),
        "tiff_jpeg": encoded(image, "TIFF", compression="jpeg"),
        "tiff_cmyk": encoded(image.convert("CMYK"), "TIFF"),
        "tiff_lab": encoded(image.convert("LAB"), "TIFF"),
        "tiff_16bit": encoded(gray16, "TIFF"),
        "png_16bit": encoded(gray16, "PNG"),
        "png_rgb_16bit": _png_rgb16(),
        "png_clear": encoded(clear, "PNG"),
        "png_palette_alpha": encoded(image.convert("P"), "PNG", transparency=3),
    }
    files["dicom_jpeg"] = dicom(files["jpeg"], image.size, fragments=3)
    files["dicom_rgb"] = dicom(np.asarray(image))
    # The transform byte of Adobe's marker makes YCCK of CMYK.
    at = files["jpeg_cmyk"].index(b"Adobe") + 11
    files["jpeg_ycck"] = files["jpeg_cmyk"][:at] + b"\x02" + files["jpeg_cmyk"][at + 1 :]
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA"):
        files[f"png_{mode}"] = encoded(image.convert(mode), "PNG")
    for orientation in range(1, 9):
        files[f"jpeg_exif_{orientation}"] = encoded(image, "JPEG", exif=_exif(orientation))
    return files


@cache
def corpus() -> Corpus:
    """All files: bytes, and what may become of them."""
    graded = frozenset({GRADED})
    files: Corpus = {name: (data, graded) for name, data in sound_files().items()}
    files |= _cut() | _flipped() | _sizes() | _odd() | _bombs() | _no_pictures()
    return files


def _cut() -> Corpus:
    kinds = [name for name in sound_files() if not name.startswith("jpeg_exif")]
    files: Corpus = {}
    for kind in kinds:
        data = sound_files()[kind]
        for eighth in range(1, 8):
            files[f"{kind}_cut_{eighth}"] = (data[: len(data) * eighth // 8], REFUSED)
    return files


def _flipped() -> Corpus:
    rng = np.random.default_rng(1)
    files: Corpus = {}
    for kind in ("jpeg", "jpeg_progressive", "png_RGB", "webp", "tiff_lzw", "bmp", "jpeg_cmyk"):
        for number in range(8):
            data = bytearray(sound_files()[kind])
            for _ in range(1 + number):
                # Half of the flips in the header, where they hurt most.
                end = 400 if number % 2 else len(data)
                data[rng.integers(2, end)] ^= 1 << rng.integers(8)
            files[f"{kind}_flipped_{number}"] = (bytes(data), ANY)
    return files


def _sizes() -> Corpus:
    graded = frozenset({GRADED})
    files: Corpus = {}
    for width, height in ((1, 1), (2, 3), (20_000, 1), (1, 20_000), (5_000, 3), (223, 225), (7_000, 7_000)):
        image = Image.new("RGB", (width, height), (120, 90, 60))
        for kind, fast in (("JPEG", {}), ("PNG", {"compress_level": 1}), ("WEBP", {"method": 0})):
            if max(width, height) > 16_383 and kind == "WEBP":
                continue
            files[f"{kind}_{width}x{height}"] = (encoded(image, kind, **fast), graded)
    return files


def _odd() -> Corpus:
    sound, graded = sound_files(), frozenset({GRADED})
    image = picture()
    frames = [image.rotate(90), image.rotate(180)]
    exif = _exif(6)
    return {
        "jpeg_then_rubbish": (sound["jpeg"] + b"rubbish" * 99, graded),
        "jpeg_twice": (sound["jpeg"] * 2, graded),
        "jpeg_after_rubbish": (b"rubbish" + sound["jpeg"], frozenset({"not_an_image"})),
        "jpeg_without_end": (sound["jpeg"][:-2], REFUSED),
        "jpeg_broken_exif": (encoded(image, "JPEG", exif=exif[:9] + b"\xff" * 40), graded),
        "jpeg_large_exif": (encoded(image, "JPEG", exif=exif + b"\0" * 60_000), graded),
        "jpeg_other_revision": (sound["jpeg"].replace(b"JFIF\0\1\1", b"JFIF\0\7\1", 1), graded),
        "png_animated": (encoded(image, "PNG", save_all=True, append_images=frames), graded),
        "webp_animated": (encoded(image, "WEBP", save_all=True, append_images=frames), graded),
        "tiff_pages": (encoded(image, "TIFF", save_all=True, append_images=frames), graded),
        "tiff_float": (encoded(Image.new("F", (9, 9)), "TIFF"), frozenset({"unsupported_mode"})),
        "tiff_32bit": (encoded(Image.new("I", (9, 9)), "TIFF"), frozenset({"unsupported_mode"})),
        "png_wrong_checksum": (_damage(sound["png_RGB"], b"IDAT"), REFUSED),
        "png_without_data": (_png(64, 64, b""), REFUSED),
        "tiff_own_tail": (_tiff_that_loops(), ANY),
    }


def _bombs() -> Corpus:
    pixels, scans = frozenset({"too_many_pixels"}), frozenset({"too_many_scans"})
    jpeg, webp = sound_files()["jpeg"], sound_files()["webp_alpha"]
    frame = jpeg.index(b"\xff\xc0") + 5
    huge_jpeg = jpeg[:frame] + struct.pack(">HH", 65_500, 65_500) + jpeg[frame + 4 :]
    canvas = webp.index(b"VP8X") + 12
    progressive = encoded(Image.new("RGB", (7000, 7000)), "JPEG", progressive=True)
    scan = progressive[progressive.rindex(b"\xff\xda") : -2]
    bmp = sound_files()["bmp"]
    return {
        "bomb_png": (_png(50_000, 50_000, zlib.compress(bytes(1_000_000))), pixels),
        "bomb_png_one_bit": (encoded(Image.new("1", (8000, 8000)), "PNG"), pixels),
        "bomb_png_text": (
            _png(64, 64, b"", (b"zTXt", b"a\0\0" + zlib.compress(bytes(200_000_000), 1))),
            REFUSED,
        ),
        "bomb_jpeg": (huge_jpeg, pixels),
        "bomb_jpeg_scans": (progressive[:-2] + scan * 400 + b"\xff\xd9", scans),
        "bomb_webp": (webp[:canvas] + b"\xfe\x3f\x00\xfe\x3f\x00" + webp[canvas + 6 :], pixels | REFUSED),
        "bomb_bmp": (bmp[:18] + struct.pack("<ii", 100_000, 100_000) + bmp[26:], pixels),
        "bomb_bmp_negative": (bmp[:18] + struct.pack("<ii", 100_000, -100_000) + bmp[26:], pixels),
        "bomb_tiff": (encoded(Image.new("1", (9000, 9000)), "TIFF", compression="group4"), pixels),
    }


def _no_pictures() -> Corpus:
    def refused(code: str) -> frozenset[str]:
        return frozenset({code})

    image, rng = picture(), np.random.default_rng(2)
    contents = {
        "nothing": (b"", "empty"),
        "one_byte": (b"\xff", "not_an_image"),
        "zeros": (bytes(5000), "not_an_image"),
        "random": (rng.bytes(5000), "not_an_image"),
        "html": (b"<!doctype html><title>404</title>", "not_an_image"),
        "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not_an_image"),
        "json": (b'{"error": "no such key"}', "not_an_image"),
        "zip": (b"PK\x03\x04" + bytes(200), "not_an_image"),
        "wave": (b"RIFF\0\0\0\0WAVEfmt ", "not_an_image"),
        "program": (b"\x7fELF" + bytes(200), "not_an_image"),
        "pdf": (b"%PDF-1.7\n", "unsupported_format"),
        "gif": (encoded(image, "GIF"), "unsupported_format"),
        "avif": (encoded(image, "AVIF"), "unsupported_format"),
        "jpeg_2000": (encoded(image, "JPEG2000"), "unsupported_format"),
        "heic": (b"\0\0\0\x18ftypheic\0\0\0\0" + bytes(500), "unsupported_format"),
        "too_large": (b"\xff\xd8\xff" + bytes(33 * 2**20), "too_many_bytes"),
    }
    files: Corpus = {name: (data, refused(code)) for name, (data, code) in contents.items()}
    for name, start in {
        "jpeg": b"\xff\xd8\xff",
        "png": b"\x89PNG\r\n\x1a\n",
        "bmp": b"BM",
        "tiff": b"II*\0",
    }.items():
        files[f"{name}_start_alone"] = (start, REFUSED)
        files[f"{name}_start_then_random"] = (start + rng.bytes(3000), REFUSED | {"too_many_pixels"})
    files["webp_start_alone"] = (b"RIFF\x20\0\0\0WEBPVP8 ", REFUSED)
    return files


def _exif(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif.tobytes()


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png(width: int, height: int, data: bytes, *more: tuple[bytes, bytes], bits: int = 8) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, bits, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), *more, (b"IDAT", data), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*chunk) for chunk in chunks)


def _png_rgb16() -> bytes:
    pixels = np.asarray(picture()).astype(">u2") << 8
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    return _png(*picture().size, zlib.compress(rows), bits=16)


def _damage(data: bytes, chunk: bytes) -> bytes:
    at = data.index(chunk) + 40
    return data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]


def _tiff_that_loops() -> bytes:
    """The directory names itself as the next one."""
    data = bytearray(sound_files()["tiff"])
    (start,) = struct.unpack_from("<I", data, 4)
    (entries,) = struct.unpack_from("<H", data, start)
    struct.pack_into("<I", data, start + 2 + entries * 12, start)
    return bytes(data)
