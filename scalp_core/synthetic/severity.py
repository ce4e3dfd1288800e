"""Latent severities of the symptoms of a synthetic set, and their grades.

A latent severity is standard normal. Thresholds between grades are quantiles of it, so that shares of grades
are exact for any number of images.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from scalp_core.grades import NUM_GRADES, SYMPTOM_IDS

Array = np.ndarray

PERSON_SHARE = 0.8
"""Share of the variance of a severity between people; the rest is between positions on one head."""

# Images of each grade in the paper's training folders.
PAPER_COUNTS = (534, 4435, 5486, 2284)

# Percent of images of each grade with all symptoms drawn, in the order of `SYMPTOM_IDS`. The real set has 17,
# 72, 60, 5, 37 and 24 % of images that are not good; rare grades are more frequent here, so that some hundred
# images hold enough of each to learn from.
SHARES = (
    (50, 18, 20, 12),
    (38, 27, 22, 13),
    (42, 28, 19, 11),
    (76, 12, 8, 4),
    (60, 18, 13, 9),
    (60, 18, 13, 9),
)
# Dry scale and sebum nearly exclude each other: Cramer's V of the real grades is 0.45.
_SCALE_AND_SEBUM = -0.7


class GradeScale:
    """Thresholds of a latent severity between the four grades.

    Args:
        counts: Relative number of images of each grade.
    """

    def __init__(self, counts: tuple[int, ...]) -> None:
        shares = np.cumsum(counts)[:-1] / sum(counts)
        self._thresholds = np.array([NormalDist().inv_cdf(share) for share in shares])
        self._latent_per_grade = float(np.diff(self._thresholds).mean())

    def grade(self, latent: float) -> int:
        return int(np.searchsorted(self._thresholds, latent))

    def severity(self, latent: float) -> float:
        """Map a latent to grade units, -0.5 to 3.5, with 0.5, 1.5, 2.5 at the thresholds.

        Values concentrate at integer grades: most images look like their grade, and some are in between,
        because graders work from one reference image per grade.
        """
        low, high = latent < self._thresholds[0], latent > self._thresholds[-1]
        if low or high:
            edge, base = (self._thresholds[0], 0.5) if low else (self._thresholds[-1], NUM_GRADES - 1.5)
            even = base + (latent - edge) / self._latent_per_grade
            even = float(np.clip(even, -0.5, NUM_GRADES - 0.5))
        else:
            even = float(np.interp(latent, self._thresholds, np.arange(NUM_GRADES - 1) + 0.5))
        grade = self.grade(latent)
        deviation = even - grade
        return grade + deviation * (0.3 + 0.7 * (2 * deviation) ** 2)

    def judge(self, latent: Array, label_noise: float, rng: np.random.Generator) -> Array:
        """Return latent severities, (N,), as a grader sees them, with an error of `label_noise` grades.

        Scaled so that grader and truth have the same spread, hence the same shares of grades.
        """
        error = label_noise * self._latent_per_grade
        return normal_by_rank(latent + rng.normal(0, error, len(latent)))


def normal_by_rank(values: Array) -> Array:
    """Replace values by standard normal quantiles in the same order, so that shares are exact."""
    ranks = np.argsort(np.argsort(values))
    inverse = NormalDist().inv_cdf
    return np.array([inverse((rank + 0.5) / len(values)) for rank in ranks])


def draw_latent(people: Array, rng: np.random.Generator) -> Array:
    """Draw the latent of each image, (N,), from that of its person, (N,), and a deviation per image."""
    latent = people * np.sqrt(PERSON_SHARE)
    return normal_by_rank(latent + rng.normal(0, np.sqrt(1 - PERSON_SHARE), len(people)))


@dataclass(frozen=True)
class OtherSymptoms:
    """The five symptoms of each image in addition to micro-keratin, in the order of `SYMPTOM_IDS[1:]`."""

    severities: Array  # float (N, 5), grade units
    labels: Array  # int (N, 5), the grader's


def draw_others(
    scale: Array, person_of: Array, label_noise: float, rng: np.random.Generator
) -> OtherSymptoms:
    """Draw the other symptoms of each image.

    Args:
        scale: Latent severity of micro-keratin, (N,).
        person_of: Number of the person, int (N,).
        label_noise: Standard deviation of the grader's error, in grades.
        rng: Random generator.
    """
    severities, labels = [], []
    for symptom, shares in zip(SYMPTOM_IDS[1:], SHARES[1:], strict=True):
        latent = draw_latent(rng.standard_normal(person_of.max() + 1)[person_of], rng)
        if symptom == "excess_sebum":
            own = np.sqrt(1 - _SCALE_AND_SEBUM**2) * latent
            latent = normal_by_rank(_SCALE_AND_SEBUM * scale + own)
        grades = GradeScale(shares)
        severities.append([grades.severity(value) for value in latent.tolist()])
        labels.append([grades.grade(value) for value in grades.judge(latent, label_noise, rng).tolist()])
    return OtherSymptoms(np.array(severities).T, np.array(labels).T)
