"""Find the field of view of an image: the skin without a microscope's mask or a screen's frame.

Masks and frames are regions of one color. They look alike in all images of one microscope, so a perceptual
hash over the whole image compares the masks and not the skin.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from PIL import Image
from scipy import ndimage

_SIDE = 72
_DARK = 6  # masks of real cameras are noisy, but not brighter
_FLAT_STEP = 2  # neighbors that differ by more are texture
_FLAT_SPREAD = 3.0  # standard deviation of a region of one color; lit skin has more
_EDGE_SHARE, _INNER_SHARE = 0.01, 0.10  # least area of such a region at the image's edge, and inside
_LEAST_FIELD, _MOST_FIELD = 0.02, 0.95  # shares of the image; a field outside of these is the whole image


class Field(NamedTuple):
    """A field of view."""

    # Left, top, right and bottom as shares of width and height, 0 to 1
    box: tuple[float, float, float, float]
    mask: np.ndarray | None  # bool (128, 128) over the whole image; None when the field is the whole image


WHOLE = Field((0.0, 0.0, 1.0, 1.0), None)


def find_field(gray: Image.Image) -> Field:
    """Find the largest region of an image that is not of one color.

    Args:
        gray: Image of mode L, any size.
    """
    small = np.asarray(gray.resize((_SIDE, _SIDE), Image.Resampling.BILINEAR))
    background = _background(small)
    if background.mean() < 1 - _MOST_FIELD:
        return WHOLE
    # Eroded, so that the lines between two regions of a frame do not connect to the field.
    labels, count = ndimage.label(_eroded(~background))
    if not count:
        return WHOLE
    largest = 1 + int(np.bincount(labels.ravel())[1:].argmax())
    mask = ~_eroded(labels != largest) & ~background
    if not _LEAST_FIELD <= mask.mean() <= _MOST_FIELD:
        return WHOLE
    left, right = _extent(mask.sum(axis=0))
    top, bottom = _extent(mask.sum(axis=1))
    return Field((left, top, right, bottom), mask)


def _background(small: np.ndarray) -> np.ndarray:
    """Regions of one color that are large or touch the edge; bool of the image's shape."""
    dark = small < _DARK
    values = np.where(dark, 0, small).astype(np.int16)
    flat = np.ones(small.shape, bool)
    across = np.abs(np.diff(values, axis=1)) > _FLAT_STEP
    down = np.abs(np.diff(values, axis=0)) > _FLAT_STEP
    flat[:, 1:] &= ~across
    flat[:, :-1] &= ~across
    flat[1:] &= ~down
    flat[:-1] &= ~down
    flat |= dark
    if flat.mean() < 1 - _MOST_FIELD:
        return np.zeros(small.shape, bool)
    labels, count = ndimage.label(flat)
    areas = np.bincount(labels.ravel(), minlength=count + 1)
    sums = np.bincount(labels.ravel(), values.ravel(), count + 1)
    squares = np.bincount(labels.ravel(), values.ravel().astype(np.int32) ** 2, count + 1)
    means = sums / np.maximum(areas, 1)
    is_one_color = squares / np.maximum(areas, 1) - means**2 <= _FLAT_SPREAD**2
    at_edge = np.zeros(count + 1, bool)
    for side in (labels[0], labels[-1], labels[:, 0], labels[:, -1]):
        at_edge[side] = True
    is_large = areas >= np.where(at_edge, _EDGE_SHARE, _INNER_SHARE) * labels.size
    chosen = is_one_color & is_large
    chosen[0] = False
    return chosen[labels]


def _extent(counts: np.ndarray) -> tuple[float, float]:
    """Mean plus and minus the square root of 3 standard deviations, as shares of the side.

    That is the exact extent of a rectangle, and 0.87 of a circle's radius. Unlike the first and last pixel it
    hardly moves when a few pixels at the border change.
    """
    at = (np.arange(_SIDE) + 0.5) / _SIDE
    weights = counts / counts.sum()
    mean = float(weights @ at)
    reach = float(np.sqrt(3 * (weights @ (at - mean) ** 2)))
    return max(0.0, mean - reach), min(1.0, mean + reach)


def _eroded(mask: np.ndarray) -> np.ndarray:
    """Binary erosion by 2 pixels; pixels outside of the image count as set."""
    return ndimage.minimum_filter(mask, size=5, mode="constant", cval=1)
