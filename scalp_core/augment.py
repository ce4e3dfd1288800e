"""Label-safe augmentation: the eight flips and quarter turns of a square (a microscope has no up)."""

from __future__ import annotations

import numpy as np

NUM_SYMMETRIES = 8


def dihedral(images: np.ndarray, symmetry: np.ndarray) -> np.ndarray:
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
