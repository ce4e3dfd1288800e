"""Conformal grade sets: neighboring grades that contain the true one with a promised coverage, per grade.

The conformity of an image to a grade is the smaller of its two tail probabilities, P(Y <= grade) and
P(Y >= grade). A set contains the grades whose conformity reaches their threshold. Each grade has its own
threshold (Mondrian or label-conditional conformal prediction, Vovk 2012), so that rare grades are covered as
often as common ones. Images of one microscope are alike, so the level of a threshold is the one that covers
enough images of left-out groups (the jackknife of Barber et al. 2021, with groups instead of images).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from scalp_core.bundles.contract import Conformal
from scalp_core.evaluation.targets import independent_units
from scalp_core.grades import NUM_GRADES

_TOLERANCE = 1e-9  # a score that equals its threshold except for rounding is in the set
_LEVELS = 100


def conformity(probs: np.ndarray) -> np.ndarray:
    """Compute the smaller tail probability of each grade, float (N, 4), from probabilities (N, 4)."""
    up_to = np.cumsum(probs, axis=1)
    return np.minimum(up_to, 1 - up_to + probs)


def fit_conformal(probs: np.ndarray, labels: np.ndarray, groups: Sequence[Any], coverage: float) -> Conformal:
    """Fit the thresholds of grade sets.

    If the model is right more often than `coverage`, its grade alone would keep the promise, and sets would
    never have two grades. Then the promise is halfway between its accuracy and 1, if the images suffice.
    A grade with too few images or groups for a promise of its own has the threshold of all images, or its
    least conformity if that is less.

    Args:
        probs: float (N, 4), calibrated.
        labels: int (N,), true grades.
        groups: (N,), group of each image; with a single group each image counts as one.
        coverage: Least promised coverage.
    """
    units = independent_units(groups)
    scores = conformity(probs)[np.arange(len(labels)), labels]
    halfway = (1 + float((probs.argmax(axis=1) == labels).mean())) / 2
    for promise in (max(coverage, halfway), coverage):
        pooled = _fit_threshold(scores, units, promise)
        if pooled is not None:
            break
    thresholds, grade_groups = [], []
    for grade in range(NUM_GRADES):
        inside = labels == grade
        own = _fit_threshold(scores[inside], units[inside], promise)
        lowest = float(scores[inside].min(initial=1.0))
        thresholds.append(own if own is not None else min(pooled or 0.0, lowest))
        grade_groups.append(len(np.unique(units[inside])) if own is not None else 0)
    return Conformal(
        coverage=promise,
        thresholds=tuple(thresholds),
        groups=len(set(groups)),
        grade_groups=tuple(grade_groups),
    )


def _fit_threshold(scores: np.ndarray, units: np.ndarray, coverage: float) -> float | None:
    """Threshold of the least level that covers enough images of left-out groups; None if no level does."""
    levels = np.linspace(coverage, 1, _LEVELS)
    covered = np.zeros(_LEVELS)
    for unit in np.unique(units):
        inside = units == unit
        others = np.sort(scores[~inside])[::-1]
        if not len(others):
            return None
        thresholds = others[_ranks(levels, len(others))]
        covered += (scores[inside, None] >= thresholds - _TOLERANCE).sum(axis=0)
    enough = covered >= coverage * len(scores) - _TOLERANCE
    if not len(scores) or not enough.any():
        return None
    level = levels[np.argmax(enough)]
    return float(np.sort(scores)[::-1][_ranks(level, len(scores))])


def _ranks(levels: np.ndarray | float, count: int) -> np.ndarray:
    """Place of the last covered score, in descending order, at each level."""
    return np.ceil(np.asarray(levels) * count - _TOLERANCE).astype(int) - 1


def grade_sets(probs: np.ndarray, conformal: Conformal) -> list[list[int]]:
    """Return the grade set of each image: neighboring grades, with the likeliest one.

    Args:
        probs: float (N, 4), calibrated.
        conformal: Thresholds of the bundle.
    """
    if conformal.thresholds is None:
        return [_older_set(row, conformal.quantile or 0.0) for row in probs]
    inside = conformity(probs) >= np.array(conformal.thresholds) - _TOLERANCE
    inside[np.arange(len(probs)), probs.argmax(axis=1)] = True
    low, high = inside.argmax(axis=1), NUM_GRADES - 1 - inside[:, ::-1].argmax(axis=1)
    return [list(range(first, last + 1)) for first, last in zip(low.tolist(), high.tolist(), strict=True)]


def _older_set(probs: np.ndarray, quantile: float) -> list[int]:
    """Grade set of a bundle without thresholds: it grows by the likelier neighbor up to a mass."""
    low = high = int(np.argmax(probs))
    while low > 0 or high < NUM_GRADES - 1:
        if probs[low : high + 1].sum() > quantile + _TOLERANCE:
            break
        below = probs[low - 1] if low > 0 else -1.0
        above = probs[high + 1] if high + 1 < NUM_GRADES else -1.0
        low, high = (low - 1, high) if below > above else (low, high + 1)
    return list(range(low, high + 1))
