"""Label-safe augmentation: the eight flips and quarter turns of a square (a microscope has no up)."""

from __future__ import annotations

import numpy as np

NUM_SYMMETRIES = 8
# As it is, a half turn, mirrored, upside down: height stays height.
_FLIPS = (0, 2, 4, 6)


def symmetries(turns: bool) -> np.ndarray:
    """int8, for `apply_dihedral`: all eight, or without `turns` the four that do not swap height and width.

    An image that was squashed to a square has its shapes stretched along one side. After a quarter turn they
    are stretched along the other, which no image of that camera shows.
    """
    return np.arange(NUM_SYMMETRIES, dtype=np.int8) if turns else np.array(_FLIPS, np.int8)


def apply_dihedral(images: np.ndarray, symmetry: np.ndarray) -> np.ndarray:
    """Turns and flips each square by its own symmetry.

    Args:
        images: (N, S, S, C), any dtype.
        symmetry: int (N,) in 0..7: quarter turns are `symmetry % 4`, a left-right flip follows from 4 on.

    Returns:
        a new array of the shape and dtype of `images`.
    """
    out = np.empty_like(images)
    for index in range(NUM_SYMMETRIES):
        rows = np.flatnonzero(symmetry == index)
        if rows.size:
            turned = np.rot90(images[rows], k=index % 4, axes=(1, 2))
            out[rows] = turned[:, :, ::-1] if index >= 4 else turned
    return out


def jitter_color(images: np.ndarray, strength: float, change: np.ndarray) -> np.ndarray:
    """Mild changes of light and white balance, as between microscopes.

    Args:
        images: uint8 (N, S, S, 3).
        strength: largest relative change of brightness, of contrast and, by half of it, of each color.
        change: float (N, 5) in -1..1: of brightness, contrast, red, green and blue.

    Returns:
        uint8 of the same shape, new.
    """
    contrast = 1 + strength * change[:, 1]
    gain = (1 + strength * change[:, :1]) * (1 + strength / 2 * change[:, 2:])
    middle = images.mean(axis=(1, 2))
    levels = np.arange(256, dtype=np.float32)
    out = np.empty_like(images)
    for row in range(len(images)):
        for channel in range(3):  # a table of 256 levels instead of arithmetic on every pixel
            center = middle[row, channel]
            changed = ((levels - center) * contrast[row] + center) * gain[row, channel]
            table = np.clip(changed + 0.5, 0, 255).astype(np.uint8)
            out[row, :, :, channel] = table[images[row, :, :, channel]]
    return out
