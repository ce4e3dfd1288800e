"""The decision: grade, grade set, referral and other symptoms of an image, from logits and statistics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

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


class SymptomGrade(TypedDict):
    """Grade of a symptom other than that of `grade`. It has no grade set, and it refers no image."""

    grade: int
    grade_name: str
    probabilities: list[float]


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
    other_symptoms: dict[str, SymptomGrade] | None = None  # by name; None if the bundle grades one symptom


def make_gradings(logits: np.ndarray, statistics: np.ndarray, spec: BundleSpec) -> list[Grading]:
    """Make the answers for images from their logits and statistics.

    Args:
        logits: float (N, 4 S), of S symptoms, as `Predictor.logits` returns them; or (N, 4), without the
            other symptoms.
        statistics: float (N, K) from `images.statistics.measure`; bundles without gates ignore them.
    """
    logits, of_others = logits[:, :NUM_GRADES], logits[:, NUM_GRADES:]
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
    others = grade_other_symptoms(of_others, spec)
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
            other_symptoms=others[index],
        )
        for index, (grade, row) in enumerate(zip(grades, probs, strict=True))
    ]


def grade_other_symptoms(logits: np.ndarray, spec: BundleSpec) -> Sequence[dict[str, SymptomGrade] | None]:
    """Grade the other symptoms of images from their logits, float (N, 4 (S - 1)).

    Logits that are not finite give uniform probabilities and the worst grade. A symptom without a temperature
    has no grade.
    """
    if not logits.shape[1]:
        return [None] * len(logits)
    answers: list[dict[str, SymptomGrade]] = [{} for _ in logits]
    for name, (grades, probs) in other_answers(logits, spec).items():
        for answer, grade, row in zip(answers, grades.tolist(), probs.tolist(), strict=True):
            answer[name] = SymptomGrade(grade=grade, grade_name=spec.grade_names[grade], probabilities=row)
    return answers


def other_answers(logits: np.ndarray, spec: BundleSpec) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Grades int (N,) and calibrated probabilities (N, 4) per graded other symptom, from (N, 4 (S - 1))."""
    answers = {}
    for place, symptom in enumerate(spec.other_symptoms):
        if symptom.temperature is None:
            continue
        own = logits[:, NUM_GRADES * place : NUM_GRADES * (place + 1)]
        probs = calibration.probabilities(own, symptom.temperature)
        finite = calibration.finite_rows(own)
        answers[symptom.name] = np.where(finite, probs.argmax(axis=1), NUM_GRADES - 1), probs
    return answers
