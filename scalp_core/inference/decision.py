"""The decision: grade, grade set and referral of an image, from logits and image statistics."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from scalp_core.bundles.contract import BundleSpec
from scalp_core.grades import NUM_GRADES
from scalp_core.images import gates as image_gates
from scalp_core.inference import calibration, conformal, referral

NOT_FINITE = "not_finite"

REASONS = {
    NOT_FINITE: "the model's scores are not finite numbers, so grade and probabilities mean nothing",
    "ambiguous_grade": "the grade set contains more grades than the bundle allows",
    "low_confidence": "the likeliest grade is less probable than the bundle requires",
    "possibly_severe": "graded good or mild, but moderate or severe is more probable than the bundle allows",
    image_gates.BLURRED: "far fewer edges than any image of the training split",
    image_gates.TOO_DARK: "far darker than any image of the training split",
    image_gates.TOO_BRIGHT: "far brighter than any image of the training split",
    image_gates.UNLIKE_TRAINING: ("not like the images of the training split; its grade means nothing"),
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
    probs = calibration.calibrated(logits, spec)
    finite = calibration.finite_rows(logits)
    grades = np.where(finite, probs.argmax(axis=1), NUM_GRADES - 1).tolist()
    sets = conformal.grade_sets(probs, spec.conformal)
    sizes = np.array([len(grade_set) for grade_set in sets])
    possibly_severe = referral.is_possibly_severe(probs, spec.referral.max_tail)
    flags = {
        NOT_FINITE: ~finite,
        "ambiguous_grade": finite & (sizes > spec.referral.max_set_size),
        "low_confidence": finite & (probs.max(axis=1) < spec.referral.min_confidence),
        "possibly_severe": finite & possibly_severe,
    }
    distances: list[float | None] = [None] * len(probs)
    if spec.gates is not None:
        distances = image_gates.unlikeness(statistics, spec.gates).tolist()
        flags |= image_gates.flag_images(statistics, spec.gates)
    reasons = [[name for name, applies in flags.items() if applies[index]] for index in range(len(probs))]
    return [
        Grading(
            grade=grade,
            grade_name=spec.grade_names[grade],
            probabilities=row.tolist(),
            expected_severity=float(row @ np.arange(NUM_GRADES)),
            grade_set=sets[index] if finite[index] else list(range(NUM_GRADES)),
            unlikeness=distances[index],
            refer=bool(reasons[index]),
            refer_reasons=reasons[index],
        )
        for index, (grade, row) in enumerate(zip(grades, probs, strict=True))
    ]
