"""Augmentation that keeps the label: flips, quarter turns, crops, color jitter, blur and JPEG compression."""

from __future__ import annotations

import numpy as np
import simplejpeg
from cykooz_resizer import CropBox
from PIL import Image, ImageFilter

from scalp_core.images.preprocess import resize_pixels

NUM_SYMMETRIES = 8
# Unchanged, half turn, mirrored, upside down: these do not swap height and width.
_FLIPS = (0, 2, 4, 6)


def symmetries(turns: bool) -> np.ndarray:
    """List symmetries for `apply_dihedral`, int8: all eight, or without `turns` the four flips.

    An image that was squashed to a square is stretched along one side. A quarter turn would stretch it along
    the other side, unlike any image of that camera.
    """
    return np.arange(NUM_SYMMETRIES, dtype=np.int8) if turns else np.array(_FLIPS, np.int8)


def apply_dihedral(images: np.ndarray, symmetry: np.ndarray) -> np.ndarray:
    """Rotate and flip each square image by its symmetry in the dihedral group.

    Args:
        images: (N, S, S, C), any dtype.
        symmetry: int (N,) in 0..7: `symmetry % 4` quarter turns, then a left-right flip from 4 on.

    Returns:
        New array of the shape and dtype of `images`.
    """
    out = np.empty_like(images)
    for index in range(NUM_SYMMETRIES):
        rows = np.flatnonzero(symmetry == index)
        if rows.size:
            turned = np.rot90(images[rows], k=index % 4, axes=(1, 2))
            out[rows] = turned[:, :, ::-1] if index >= 4 else turned
    return out


def jitter_color(images: np.ndarray, strength: float, change: np.ndarray) -> np.ndarray:
    """Jitter light and white balance mildly, as they differ between microscopes.

    Args:
        images: uint8 (N, S, S, 3).
        strength: Largest relative change of brightness and of contrast; of each color, half of it.
        change: float (N, 5) in -1..1: change of brightness, contrast, red, green and blue.

    Returns:
        The images at strength 0, else a new uint8 array of the same shape.
    """
    if not strength:
        return images
    contrast = 1 + strength * change[:, 1]
    gain = (1 + strength * change[:, :1]) * (1 + strength / 2 * change[:, 2:])
    means = images.mean(axis=(1, 2))
    levels = np.arange(256, dtype=np.float32)
    out = np.empty_like(images)
    for row in range(len(images)):
        for channel in range(3):  # a lookup table is faster than arithmetic per pixel
            center = means[row, channel]
            changed = ((levels - center) * contrast[row] + center) * gain[row, channel]
            table = np.clip(changed + 0.5, 0, 255).astype(np.uint8)
            out[row, :, :, channel] = table[images[row, :, :, channel]]
    return out


def crop_squares(images: np.ndarray, min_area: float, draws: np.ndarray) -> np.ndarray:
    """Cut a random square out of each image and resize it to the image's size; shapes keep their proportions.

    Args:
        images: uint8 (N, S, S, 3).
        min_area: Smallest area of the square, as a fraction of the image; 1 returns the images.
        draws: float (N, 3) in -1..1: area, and position from left and top.
    """
    if min_area == 1:
        return images
    size = images.shape[1]
    area, left, top = (1 + draws.T.astype(float)) / 2
    side = size * np.sqrt(1 - (1 - min_area) * area)
    boxes = zip((size - side) * left, (size - side) * top, side, side, strict=True)
    cropped = [
        resize_pixels(image, size, size, CropBox(*box)) for image, box in zip(images, boxes, strict=True)
    ]
    return np.stack(cropped)


def degrade(images: np.ndarray, blur: float, jpeg_quality: int, draws: np.ndarray) -> np.ndarray:
    """Blur about half of the images, and compress about half of them, as focus and cameras differ.

    Args:
        images: uint8 (N, S, S, 3).
        blur: Largest radius of the Gaussian blur, pixels; 0: none.
        jpeg_quality: Lowest JPEG quality; 100: no compression.
        draws: float (N, 2) in -1..1: blur and compression; negative values change nothing.

    Returns:
        The images, or a new array of the same shape.
    """
    out = images if blur == 0 and jpeg_quality == 100 else images.copy()
    strengths = np.maximum(draws, 0).astype(float) * (blur, 100 - jpeg_quality)
    for row, (radius, loss) in enumerate(strengths.tolist()):
        if radius:
            out[row] = np.asarray(Image.fromarray(out[row]).filter(ImageFilter.GaussianBlur(radius)))
        if round(loss):
            compressed = simplejpeg.encode_jpeg(np.ascontiguousarray(out[row]), quality=100 - round(loss))
            out[row] = simplejpeg.decode_jpeg(compressed)
    return out
