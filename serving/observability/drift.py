"""How the images of the last hours differ from those of training, at an endpoint."""

from __future__ import annotations

from collections import Counter

import numpy as np

from scalp_core.bundles.bundle import BundleSpec
from scalp_core.images.statistics import STATISTICS
from scalp_core.inference.decision import Grading
from scalp_core.results.drift import Drift, count_statistics, measure_drift

WINDOW_IMAGES = 2000
"""In a window: several times what `drift.MIN_PHOTOGRAPHS` asks for, compared in 1.3 ms of one core."""


class DriftWindow:
    """The last images that one replica graded, against the training part of its bundle.

    A number of images, not of hours: the comparison needs some hundred however quiet the endpoint is.

    Args:
        spec: of the bundle.
        images: that the window holds.
    """

    def __init__(self, spec: BundleSpec, images: int = WINDOW_IMAGES) -> None:
        self._spec = spec
        self._statistics = np.empty((images, len(STATISTICS)), np.float32)
        self._grades = np.empty(images, np.int8)
        self._seen = 0

    def add(self, gradings: list[Grading], statistics: np.ndarray) -> None:
        """Takes in images, the last one last; the oldest make room.

        Args:
            gradings: their answers.
            statistics: float (N, K) of them from `statistics.measure`.
        """
        places = (self._seen + np.arange(len(gradings))) % len(self._grades)
        self._statistics[places] = statistics
        self._grades[places] = [grading.grade for grading in gradings]
        self._seen += len(gradings)

    def drift(self) -> Drift:
        """What is different now."""
        held = min(self._seen, len(self._grades))
        counts = count_statistics(self._statistics[:held], self._spec.gates) if self._spec.gates else None
        names = Counter(self._spec.grade_names[grade] for grade in self._grades[:held].tolist())
        return measure_drift(counts, names, self._spec)
