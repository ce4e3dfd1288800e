"""From logits and statistics to the answer for a photograph, under a bundle's contract."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from scalp_core.bundles.bundle import BundleSpec
from scalp_core.images import statistics as image_statistics
from scalp_core.inference import calibration

NOT_FINITE = "not_finite"

REASONS = {
    NOT_FINITE: "the model's scores are not finite numbers, so grade and probabilities mean nothing",
    "ambiguous_grade": "the grade set holds more grades than the bundle allows",
    "low_confidence": "the likeliest grade is less probable than the bundle asks for",
    image_statistics.BLURRED: "fewer edges than any photograph of the training part comes near",
    image_statistics.TOO_DARK: "darker than any photograph of the training part comes near",
    image_statistics.TOO_BRIGHT: "brighter than any photograph of the training part comes near",
    image_statistics.UNLIKE_TRAINING: (
        "it is no picture of the kind in the training part; its grade means nothing"
    ),
}
"""Why a photograph is referred to a person; answers name the reasons in this order."""


@dataclass(frozen=True)
class Grading:
    """The answer for one photograph; field for field as in result rows and over HTTP.

    Scores that are not finite give the reason `not_finite`, equal probabilities, all grades as the set and
    the worst grade: a program that reads the grade alone then errs towards a person.
    """

    grade: int
    grade_name: str
    probabilities: list[float]
    expected_severity: float
    grade_set: list[int]
    unlikeness: float | None  # above 1 it is flagged; None where the bundle has no gates
    refer: bool
    refer_reasons: list[str]


def make_gradings(logits: np.ndarray, statistics: np.ndarray, spec: BundleSpec) -> list[Grading]:
    """The answers for photographs.

    Args:
        logits: float (N, 4).
        statistics: float (N, K) from `quality.measure`; not used by bundles without gates.
        spec: the bundle's contract.
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
        reasons = _doubts(probs[grade], grades, spec)
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


def _doubts(confidence: float, grades: list[int], spec: BundleSpec) -> list[str]:
    """Reasons to refer that follow from the probabilities."""
    doubts = {
        "ambiguous_grade": len(grades) > spec.referral.max_set_size,
        "low_confidence": confidence < spec.referral.min_confidence,
    }
    return [name for name, holds in doubts.items() if holds]
