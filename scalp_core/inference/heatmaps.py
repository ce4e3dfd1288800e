"""Heatmaps (Grad-CAM): the parts of an image that raised the score of a grade. `overlay` draws them.

A heatmap shows where the model looked, not where the lesion is. A model that grades by hair or by light shows
hair or light, and heatmaps exist to reveal that.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
from PIL import Image

from scalp_core.bundles.bundle import Bundle
from scalp_core.errors import UserError

# Images per pass. Captum stores the activations of all layers, so memory grows with it.
_CHUNK_SIZE = 8


class Explainer(ABC):
    """Compute heatmaps of a bundle in fp32; the same pixels give the same heatmap.

    Thread-safe: a lock admits one thread at a time. `explainer.make_explainer` makes one.

    Args:
        bundle: Loaded bundle.

    Raises:
        UserError: The architecture has no feature map for Grad-CAM.
    """

    cells: tuple[int, int]
    """Rows and columns of the feature map."""

    def __init__(self, bundle: Bundle) -> None:
        self.spec = bundle.spec
        self._lock = threading.Lock()

    @abstractmethod
    def _maps(self, images: np.ndarray, grades: Sequence[int] | None) -> np.ndarray:
        """Compute Grad-CAM, float32 (N, *cells), at least 0, of a few images."""

    def heatmap(self, image: np.ndarray, grade: int | None = None) -> np.ndarray:
        """Compute the heatmap of a grade for one image.

        Args:
            image: uint8 (size, size, 3) from `preprocess.decode`.
            grade: Grade to explain; None: the likeliest one.

        Returns:
            float32 (size, size) in 0..1, interpolated between `cells`. 1 is the maximum of this image, so
            heat is not comparable between images. All zeros if no part raised the score of the grade.

        Raises:
            UserError: The grade does not exist.
        """
        return self.heatmaps(image[None], None if grade is None else [grade])[0]

    def heatmaps(self, images: np.ndarray, grades: Sequence[int] | None = None) -> np.ndarray:
        """Compute heatmaps, float32 (N, size, size), of images uint8 (N, size, size, 3) and N grades."""
        names = self.spec.grade_names
        if wrong := [grade for grade in grades or () if not 0 <= grade < len(names)]:
            raise UserError(f"grade {wrong[0]} does not exist; use a grade from 0 to {len(names) - 1}")
        if grades is not None and len(grades) != len(images):
            raise ValueError(f"{len(grades)} grades for {len(images)} images")
        heatmaps = [np.zeros((0, *images.shape[1:3]), np.float32)]
        for start in range(0, len(images), _CHUNK_SIZE):
            chunk = slice(start, start + _CHUNK_SIZE)
            with self._lock:
                maps = self._maps(images[chunk], None if grades is None else grades[chunk])
            heatmaps.append(_scale(maps, images.shape[1:3]))
        return np.concatenate(heatmaps)

    def _check_cells(self) -> None:
        rows, columns = self.cells
        if rows * columns == 1:
            raise UserError(
                f"{self.spec.architecture} at {self.spec.preprocess.size} px has a feature map of one cell, "
                "so its heatmap is uniform; explain a bundle that was trained at a larger size"
            )


def _scale(maps: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """Interpolate maps (N, rows, columns) to `size`, and scale each to its maximum."""
    height, width = size
    resized = [Image.fromarray(cells).resize((width, height), Image.Resampling.BILINEAR) for cells in maps]
    heat = np.stack([np.asarray(image) for image in resized])
    heat[~np.isfinite(heat).all(axis=(1, 2))] = 0  # as if no part raised the score
    peak = heat.max(axis=(1, 2), keepdims=True)
    return np.divide(heat, peak, out=np.zeros_like(heat), where=peak > 0)
