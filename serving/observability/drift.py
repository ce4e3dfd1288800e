"""Drift of an endpoint: compare the last graded images with those of training."""

from __future__ import annotations

from collections import Counter

import numpy as np

from scalp_core.bundles.bundle import BundleSpec
from scalp_core.images.statistics import STATISTICS
from scalp_core.inference.decision import Grading
from scalp_core.results.drift import Drift, count_statistics, measure_drift

WINDOW_IMAGES = 2000
"""Images of a window: several times `drift.MIN_PHOTOGRAPHS`, compared in 1.3 ms of one core."""


class DriftWindow:
    """Window of the last images that one replica graded, compared with the training split of its bundle.

    Its size is a number of images, not of hours, because the comparison needs some hundred images.

    Args:
        spec: Contract of the bundle.
        images: Size of the window.
    """

    def __init__(self, spec: BundleSpec, images: int = WINDOW_IMAGES) -> None:
        self._spec = spec
        self._statistics = np.empty((images, len(STATISTICS)), np.float32)
        self._grades = np.empty(images, np.int8)
        self._seen = 0

    def add(self, gradings: list[Grading], statistics: np.ndarray) -> None:
        """Add images in order; the oldest are dropped.

        Args:
            gradings: Gradings of the images.
            statistics: float (N, K) from `statistics.measure`.
        """
        places = (self._seen + np.arange(len(gradings))) % len(self._grades)
        self._statistics[places] = statistics
        self._grades[places] = [grading.grade for grading in gradings]
        self._seen += len(gradings)

    def drift(self) -> Drift:
        """Measure the drift of the window."""
        size = min(self._seen, len(self._grades))
        counts = count_statistics(self._statistics[:size], self._spec.gates) if self._spec.gates else None
        names = Counter(self._spec.grade_names[grade] for grade in self._grades[:size].tolist())
        return measure_drift(counts, names, self._spec)
