"""Pictures for the page of a review: pixels of an image, encoded again, so that no metadata leaves."""

from __future__ import annotations

import logging
from functools import partial

import simplejpeg

from scalp_core.datasets.locations import Location, read_images
from scalp_core.errors import IMAGE_CODES, ImageError
from scalp_core.images.codecs import MAX_BYTES, read_picture
from scalp_core.images.preprocess import resize_pixels, upright

MAX_SIDE = 2_048
"""Longest side of a picture in pixels; larger images are reduced."""

_QUALITY = 92

_log = logging.getLogger(__name__)


def read_jpeg(location: Location, max_side: int = MAX_SIDE) -> bytes:
    """Read an image and encode its pixels as a JPEG without metadata, upright.

    Args:
        location: Location of the image.
        max_side: Longest side of the picture in pixels; a larger image is reduced.

    Raises:
        ImageError: The image cannot be read or decoded, is above a limit, or has changed since it was graded.
    """
    data = read_file(location)
    fit = partial(_fit, max_side)
    picture = read_picture(data, fit)
    height, width = picture.pixels.shape[:2]
    pixels = picture.pixels
    if (width, height) != fit(width, height):
        pixels = resize_pixels(pixels, *fit(width, height))
    jpeg: bytes = simplejpeg.encode_jpeg(
        upright(pixels, picture.orientation), _QUALITY, colorspace="RGB", colorsubsampling="444"
    )
    return jpeg


def read_file(location: Location) -> bytes:
    """Read the bytes of an image; the log has its location if that fails.

    Raises:
        ImageError: The image cannot be read, or has changed since it was graded. The message has neither
            path nor member, which may name a grade or a person.
    """
    (data,) = read_images([location], MAX_BYTES)
    if isinstance(data, ImageError):
        _log.warning("%s cannot be shown to a reader: %s", location, data.message)
        raise ImageError(data.code, IMAGE_CODES[data.code])
    return data


def _fit(max_side: int, width: int, height: int) -> tuple[int, int]:
    scale = min(1, max_side / max(width, height))
    return max(1, round(width * scale)), max(1, round(height * scale))
