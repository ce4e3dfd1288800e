"""Agreement between readers: quadratic weighted kappa per pair, with its interval."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np

from scalp_core.evaluation.bootstrap import bootstrap_grades
from scalp_core.evaluation.metrics import score
from scalp_core.labels.decisions import Answers


def measure_agreement(answers: Answers) -> list[dict[str, Any]]:
    """Measure the agreement of each pair of readers who graded the same images.

    Deciding answers do not count: they were given with the others in view.

    Returns:
        Per pair `readers` (two names), `images` (both answered), `graded` (both gave a grade), `equal` (the
        same grade), `qwk` (None if undefined), and its 95 % interval `low` and `high` from resamples of the
        groups in the log, or of single images without groups (None with a single group).
    """
    readers = sorted({reader for of_image in answers.by_image.values() for reader in of_image})
    pairs = []
    for first, second in combinations(readers, 2):
        both = [
            (of_image[first], of_image[second])
            for of_image in answers.by_image.values()
            if first in of_image and second in of_image
        ]
        if not both:
            continue
        graded = [pair for pair in both if None not in (pair[0].grade, pair[1].grade)]
        pairs.append(
            {
                "readers": [first, second],
                "images": len(both),
                "graded": len(graded),
                "equal": sum(one.grade == other.grade for one, other in graded),
                **_kappa([(one.grade, other.grade, one.group or one.sha256) for one, other in graded]),
            }
        )
    return pairs


def _kappa(rows: list[tuple[Any, Any, str]]) -> dict[str, float | None]:
    if not rows:
        return {"qwk": None, "low": None, "high": None}
    ones, others, groups = zip(*rows, strict=True)
    first, second = np.array(ones, int), np.array(others, int)
    interval = bootstrap_grades(first, second, groups)["qwk"] or {}
    return {
        "qwk": score(first, second)["qwk"],
        "low": interval.get("low"),
        "high": interval.get("high"),
    }
