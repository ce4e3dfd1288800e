"""Pictures for the page of a review: pixels of an image, encoded again, so that no metadata leaves."""

from __future__ import annotations

from functools import partial

import simplejpeg

from scalp_core.datasets.locations import Location, read_images
from scalp_core.errors import ImageError
from scalp_core.images.codecs import MAX_BYTES, read_picture
from scalp_core.images.preprocess import resize_pixels, upright

MAX_SIDE = 2_048
"""Longest side of a picture in pixels; larger images are reduced."""

_QUALITY = 92


def read_jpeg(location: Location, max_side: int = MAX_SIDE) -> bytes:
    """Read an image and encode its pixels as a JPEG without metadata, upright.

    Args:
        location: Location of the image.
        max_side: Longest side of the picture in pixels; a larger image is reduced.

    Raises:
        ImageError: The image cannot be read or decoded, is above a limit, or has changed since it was graded.
    """
    (data,) = read_images([location], MAX_BYTES)
    if isinstance(data, ImageError):
        raise data
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


def _fit(max_side: int, width: int, height: int) -> tuple[int, int]:
    scale = min(1, max_side / max(width, height))
    return max(1, round(width * scale)), max(1, round(height * scale))
