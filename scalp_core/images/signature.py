"""Perceptual hash and thumbnail of an image, for finding near-duplicates.

A 64-bit perceptual hash of the field of view, and a thumbnail of the texture inside it. docs/data.md has the
measurements.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from PIL import Image

from scalp_core.images.codecs import read_picture
from scalp_core.images.preprocess import upright

SIDE = 32
THUMBNAIL_BYTES = SIDE * SIDE

_READ = 96  # a JPEG is decoded at the smallest eighth that has so many pixels on each side
_FLAT = 1.0  # standard deviation of the gray values of an image of one color
_TEXTURE_WINDOW = 9  # side of the window whose mean is subtracted to get the texture
_TEXTURE_LEVELS = 40.0  # levels of a stored thumbnail per standard deviation of the texture
MIDDLE = 128  # gray level of a thumbnail's mean

# 63 low frequencies of the cosine transform, without the mean and the two whose signs decide the
# rotation of an image. Mirroring and transposing map this set to itself.
_FREQUENCIES = 11
_COSINES = np.cos(np.pi * np.outer(np.arange(_FREQUENCIES), 2 * np.arange(SIDE) + 1) / (2 * SIDE))
_DIAGONALS = np.add.outer(np.arange(_FREQUENCIES), np.arange(_FREQUENCIES))
_IS_HASHED = (_DIAGONALS >= 2) & (_DIAGONALS < _FREQUENCIES)


class Signature(NamedTuple):
    """Perceptual hashes and thumbnail of an image."""

    hash: int | None  # perceptual hash of the field of view; None for an image of one color
    # The same for all 8 mirrorings and rotations of an image; None for an image of one color
    turned_hash: int | None
    thumbnail: bytes  # uint8 (32, 32) as bytes, the texture inside the field of view; 0 outside of it


def compute_signature(data: bytes) -> Signature:
    """Hash the field of view of an encoded image, upright by its EXIF orientation.

    Raises:
        ImageError: the image cannot be decoded; see `codecs.read_picture`.
    """
    from scalp_core.images.field_of_view import find_field  # imports SciPy, which is slow

    picture = read_picture(data, lambda _width, _height: (_READ, _READ))
    gray = Image.fromarray(upright(picture.pixels, picture.orientation)).convert("L")
    field = find_field(gray)
    values = np.asarray(_cropped(gray, field.box), np.float32)
    inside = np.ones((SIDE, SIDE), bool)
    if field.mask is not None:
        mask = Image.fromarray(field.mask.view(np.uint8) * 255)
        inside = np.asarray(_cropped(mask, field.box)) > 250
    if not inside.any() or values[inside].std() < _FLAT:
        return Signature(None, None, bytes(THUMBNAIL_BYTES))
    values = np.where(inside, values - values[inside].mean(), np.float32(0))
    spectrum = _COSINES @ values @ _COSINES.T
    return Signature(_sign_bits(spectrum), _sign_bits(_turned(spectrum)), _texture(values, inside))


def _cropped(image: Image.Image, box: tuple[float, float, float, float]) -> Image.Image:
    (width, height), (left, top, right, bottom) = image.size, box
    pixels = (left * width, top * height, right * width, bottom * height)
    return image.resize((SIDE, SIDE), Image.Resampling.BILINEAR, pixels)


def _sign_bits(spectrum: np.ndarray) -> int:
    return int(np.packbits(spectrum[_IS_HASHED] > 0).view(">u8")[0])


def _turned(spectrum: np.ndarray) -> np.ndarray:
    """Spectrum of the mirroring or rotation whose first two coefficients are positive and in order."""
    signs = np.ones(len(spectrum))
    signs[1::2] = -1  # mirroring changes the sign of every second coefficient
    if spectrum[0, 1] < 0:
        spectrum = spectrum * signs
    if spectrum[1, 0] < 0:
        spectrum = spectrum * signs[:, None]
    return spectrum if spectrum[0, 1] >= spectrum[1, 0] else spectrum.T


def _texture(values: np.ndarray, inside: np.ndarray) -> bytes:
    from scipy import ndimage  # slow to import; only `scalp prepare` needs it

    weights = ndimage.uniform_filter(inside.astype(np.float32), _TEXTURE_WINDOW, mode="constant")
    sums = ndimage.uniform_filter(values, _TEXTURE_WINDOW, mode="constant")
    texture = values - sums / np.maximum(weights, 1e-6)
    scale = _TEXTURE_LEVELS / max(float(texture[inside].std()), 1e-3)
    levels = np.clip(np.rint(MIDDLE + texture * scale), 1, 255)
    return np.where(inside, levels, 0).astype(np.uint8).tobytes()
