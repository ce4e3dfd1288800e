"""From logits to the answer for a photograph, under a bundle's contract."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from scalp_core import calibration
from scalp_core.bundle import BundleSpec


@dataclass(frozen=True)
class Grading:
    """The answer for one photograph; field for field as in result rows and over HTTP."""

    grade: int
    grade_name: str
    probabilities: list[float]
    expected_severity: float
    grade_set: list[int]
    refer: bool
    refer_reasons: list[str]


def gradings(logits: np.ndarray, spec: BundleSpec) -> list[Grading]:
    """The calibrated answers that logits (N, 4) mean under a bundle's contract."""
    return [_grading(row, spec) for row in calibration.probabilities(logits, spec.temperature)]


def _grading(probs: np.ndarray, spec: BundleSpec) -> Grading:
    grade = int(np.argmax(probs))
    grades = calibration.grade_set(probs, spec.conformal.quantile)
    reasons = []
    if len(grades) > spec.referral.max_set_size:
        reasons.append("ambiguous_grade")
    if probs[grade] < spec.referral.min_confidence:
        reasons.append("low_confidence")
    return Grading(
        grade=grade,
        grade_name=spec.grade_names[grade],
        probabilities=[float(value) for value in probs],
        expected_severity=float(probs @ np.arange(len(probs))),
        grade_set=grades,
        refer=bool(reasons),
        refer_reasons=reasons,
    )
