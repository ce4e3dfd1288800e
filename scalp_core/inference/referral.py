"""Referral as a decision: thresholds that keep a stated target with a confidence, on new microscopes.

Learn then Test (Angelopoulos et al. 2021) with fixed-sequence testing: thresholds are tested from the
strictest, which refers most, until the confidence bound of the first one exceeds the target.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from scalp_core.bundles.contract import Referral
from scalp_core.evaluation.targets import (
    CONFIDENCE,
    SEVERE_FROM,
    Kind,
    Target,
    bound_share,
    independent_units,
    measure_share,
    outcomes,
)  # fmt: skip
from scalp_core.grades import NUM_GRADES

REFER_ALL = 2.0
"""Least confidence that no image has."""

_STEPS = 50
_TAIL_STEPS = 500


def tail_probability(probs: np.ndarray) -> np.ndarray:
    """Probability of moderate or worse, (N,)."""
    return probs[:, SEVERE_FROM:].sum(axis=1)


def fit_referral(
    probs: np.ndarray,
    labels: np.ndarray,
    groups: Sequence[Any],
    flagged: np.ndarray,
    targets: Mapping[Kind, float],
) -> Referral:
    """Fit the referral rule to its targets; without a target, a set of more than one grade is referred.

    `found` is fitted first, and `wrong` on the images that remain. Each target has its own confidence.

    Args:
        probs: float (N, 4), calibrated.
        labels: int (N,), true grades.
        groups: (N,), group of each image.
        flagged: bool (N,), whether a gate refers the image.
        targets: Limit by kind, from `parse_targets`.
    """
    if not targets:
        return Referral()
    units, grades = independent_units(groups), probs.argmax(axis=1)
    referred, found, records = flagged.copy(), None, []
    if "found" in targets:
        found = _fit_tail(tail_probability(probs), labels, grades, units, referred, targets["found"])
        referred |= is_possibly_severe(probs, found)
    confidence = probs.max(axis=1)
    least = 0.0
    if "wrong" in targets:
        left = ~referred
        least = _fit_confidence(confidence[left], (grades != labels)[left], units[left], targets["wrong"])
        referred |= confidence < least
    for kind in targets:
        inside, events = outcomes(kind, labels, grades, referred)
        share = measure_share(kind, labels, grades, referred)
        bound = None if share is None else bound_share(events[inside], units[inside])
        records.append(
            Target(
                kind=kind,
                limit=targets[kind],
                images=int(inside.sum()),
                groups=len({groups[place] for place in np.flatnonzero(inside).tolist()}),
                share=share,
                bound=1 - bound if bound is not None and kind == "found" else bound,
                answered=float((~referred).mean()),
            )
        )
    return Referral(max_set_size=NUM_GRADES, min_confidence=least, max_tail=found, targets=tuple(records))


def is_possibly_severe(probs: np.ndarray, max_tail: float | None) -> np.ndarray:
    """Whether an image is graded below moderate although moderate or worse is too probable; bool (N,)."""
    if max_tail is None:
        return np.zeros(len(probs), bool)
    return (probs.argmax(axis=1) < SEVERE_FROM) & (tail_probability(probs) > max_tail)


def _fit_tail(
    tail: np.ndarray, labels: np.ndarray, grades: np.ndarray, units: np.ndarray, referred: np.ndarray,
    least_found: float,
) -> float:  # fmt: skip
    """Largest tail probability of answered images graded below moderate."""
    severe = labels >= SEVERE_FROM
    risky = severe & (grades < SEVERE_FROM) & ~referred
    largest = 0.0
    # Between two candidates, the same images are missed; the last refers none for its tail.
    candidates = np.sort(tail[risky])
    if len(candidates) > _TAIL_STEPS:  # a bound of each would take minutes for a hundred thousand images
        candidates = candidates[np.linspace(0, len(candidates) - 1, _TAIL_STEPS).astype(int)]
    for candidate in [*candidates, 1.0]:
        missed = risky & (tail < candidate)
        if not severe.any() or bound_share(missed[severe], units[severe]) > 1 - least_found:
            break
        largest = float(candidate)
    return math.nextafter(largest, 0) if largest < 1 else 1.0


def _fit_confidence(confidence: np.ndarray, wrong: np.ndarray, units: np.ndarray, limit: float) -> float:
    """Least confidence of the answered images."""
    order = np.argsort(-confidence, kind="stable")
    # Twice the images that prove the limit without an error, so that one error does not end the search.
    first = 2 * math.ceil(math.log(1 - CONFIDENCE) / math.log(1 - limit))
    least = REFER_ALL
    for count in np.unique(np.linspace(min(first, len(order)), len(order), _STEPS).astype(int)):
        if not count:
            break
        answered = confidence >= confidence[order[count - 1]]
        if bound_share(wrong[answered], units[answered]) > limit:
            break
        least = float(confidence[answered].min())
    return least
