"""Augmentation that keeps the label: flips and quarter turns of a square, and color jitter."""

from __future__ import annotations

import numpy as np

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
        New uint8 array of the same shape.
    """
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
