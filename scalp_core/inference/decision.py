"""The decision: grade, grade set and referral of an image, from logits and image statistics."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from scalp_core.bundles.bundle import BundleSpec
from scalp_core.images import statistics as image_statistics
from scalp_core.inference import calibration

NOT_FINITE = "not_finite"

REASONS = {
    NOT_FINITE: "the model's scores are not finite numbers, so grade and probabilities mean nothing",
    "ambiguous_grade": "the grade set contains more grades than the bundle allows",
    "low_confidence": "the likeliest grade is less probable than the bundle requires",
    image_statistics.BLURRED: "far fewer edges than any image of the training split",
    image_statistics.TOO_DARK: "far darker than any image of the training split",
    image_statistics.TOO_BRIGHT: "far brighter than any image of the training split",
    image_statistics.UNLIKE_TRAINING: ("not like the images of the training split; its grade means nothing"),
}
"""Reasons to refer an image to a person, in the order of answers."""


@dataclass(frozen=True)
class Grading:
    """The answer for one image, with the same fields as result rows and HTTP responses.

    Logits that are not finite give the reason `not_finite`, uniform probabilities, the set of all grades and
    the worst grade, so that a program that reads only the grade errs on the safe side.
    """

    grade: int
    grade_name: str
    probabilities: list[float]
    expected_severity: float
    grade_set: list[int]
    unlikeness: float | None  # flagged above 1; None if the bundle has no gates
    refer: bool
    refer_reasons: list[str]


def make_gradings(logits: np.ndarray, statistics: np.ndarray, spec: BundleSpec) -> list[Grading]:
    """Make the answers for images from their logits and statistics.

    Args:
        logits: float (N, 4).
        statistics: float (N, K) from `images.statistics.measure`; bundles without gates ignore them.
    """
    probs = calibration.probabilities(logits, spec.temperature)
    finite = calibration.finite_rows(logits)
    distances: list[float | None] = [None] * len(probs)
    flags: dict[str, np.ndarray] = {}
    if spec.gates is not None:
        distances = image_statistics.unlikeness(statistics, spec.gates).tolist()
        flags = image_statistics.flag_images(statistics, spec.gates)
    return [
        _grading(row, finite[index], distances[index], [name for name in flags if flags[name][index]], spec)
        for index, row in enumerate(probs)
    ]


def _grading(
    probs: np.ndarray, finite: bool, distance: float | None, flagged: list[str], spec: BundleSpec
) -> Grading:
    if finite:
        grade = int(np.argmax(probs))
        grades = calibration.grade_set(probs, spec.conformal.quantile)
        doubts = {
            "ambiguous_grade": len(grades) > spec.referral.max_set_size,
            "low_confidence": probs[grade] < spec.referral.min_confidence,
        }
        reasons = [name for name, applies in doubts.items() if applies]
    else:
        grade, grades, reasons = len(probs) - 1, list(range(len(probs))), [NOT_FINITE]
    reasons += flagged
    return Grading(
        grade=grade,
        grade_name=spec.grade_names[grade],
        probabilities=[float(value) for value in probs],
        expected_severity=float(probs @ np.arange(len(probs))),
        grade_set=grades,
        unlikeness=distance,
        refer=bool(reasons),
        refer_reasons=reasons,
    )
