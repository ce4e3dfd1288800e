"""Evaluation by subgroup (slice), of grade sets, of calibration and of the referral rule."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from scalp_core.evaluation import bootstrap, metrics
from scalp_core.grades import NUM_GRADES

SLICED_BY = ("device", "position", "sex", "age")
SMALL = 20  # images; below it a slice is marked as small
UNKNOWN = "unknown"

_CURVE_POINTS = 100
_MANY = 8  # small slices of a column from which they are pooled into one


def penalize_not_finite(labels: np.ndarray, probs: np.ndarray, finite: np.ndarray) -> np.ndarray:
    """Return probabilities (N, 4) in which images without finite logits count as the largest possible error.

    Such an image keeps uniform probabilities, with 1e-9 added to the grade farthest from its label.

    Args:
        labels: int (N,), 0..3.
        probs: float (N, 4), from `calibration.probabilities`.
        finite: bool (N,), from `calibration.finite_rows`.
    """
    farthest = np.where(labels < NUM_GRADES / 2, NUM_GRADES - 1, 0)
    return probs + 1e-9 * (~finite[:, None] & (np.arange(NUM_GRADES) == farthest[:, None]))


def score_slices(
    labels: np.ndarray, grades: np.ndarray, groups: Sequence[Any], columns: Mapping[str, Sequence[str | None]]
) -> dict[str, list[dict[str, Any]]]:
    """Compute metrics per slice: per value of each column, in the order of the values.

    If many values have fewer than `SMALL` images, they are pooled into one slice, so that hundreds of
    microscopes with three images each give one usable number. Small slices are marked.

    Args:
        labels: int (N,), 0..3.
        grades: int (N,), predicted.
        groups: (N,), group of each image for the intervals.
        columns: Values (N,) by column name; None is the slice `unknown`.

    Returns:
        Per column, slices of `value, n, groups, qwk, top1, mae, intervals, small, pooled` (count of values).
    """
    return {
        name: _score_column(labels, grades, np.asarray(groups), values) for name, values in columns.items()
    }


def _score_column(
    labels: np.ndarray, grades: np.ndarray, groups: np.ndarray, values: Sequence[str | None]
) -> list[dict[str, Any]]:
    named = [UNKNOWN if value is None else str(value) for value in values]
    few = {value for value, count in Counter(named).items() if count < SMALL and value != UNKNOWN}
    pool = f"{len(few)} values of under {SMALL}" if len(few) >= _MANY else None
    pooled = np.array([pool if pool and value in few else value for value in named])
    order = sorted(set(pooled), key=lambda value: (value == UNKNOWN, value == pool, value))
    return [
        {"value": str(value), "pooled": len(few) if value == pool else 1}
        | _slice(labels[inside], grades[inside], groups[inside])
        for value in order
        for inside in [pooled == value]
    ]


def _slice(labels: np.ndarray, grades: np.ndarray, groups: np.ndarray) -> dict[str, Any]:
    scored = metrics.score(labels, grades)
    bounds = bootstrap.bootstrap_grades(labels, grades, groups.tolist())
    names = ("qwk", "top1", "mae")
    return {
        "n": len(labels),
        "groups": bounds["groups"],
        **{name: scored[name] for name in names},
        "intervals": {name: bounds[name] for name in names},
        "small": len(labels) < SMALL,
    }


def measure_grade_sets(labels: np.ndarray, sets: Sequence[Sequence[int]], promised: float) -> dict[str, Any]:
    """Measure coverage and size of grade sets, overall and per true grade.

    Args:
        labels: int (N,), 0..3.
        sets: (N,), grades of each set.
        promised: Promised coverage.
    """
    covered, sizes = is_in_set(labels, sets), np.array([len(grades) for grades in sets])
    return {
        "promised": promised,
        "coverage": float(covered.mean()),
        "mean_set_size": float(sizes.mean()),
        "sizes": np.bincount(sizes, minlength=NUM_GRADES + 1)[1:].tolist(),
        "by_grade": [
            {
                "coverage": float(covered[labels == grade].mean()) if (labels == grade).any() else None,
                "mean_set_size": float(sizes[labels == grade].mean()) if (labels == grade).any() else None,
            }
            for grade in range(NUM_GRADES)
        ],
    }


def is_in_set(labels: np.ndarray, sets: Sequence[Sequence[int]]) -> np.ndarray:
    """Check whether each set contains its label: bool (N,)."""
    return np.array([label in grades for label, grades in zip(labels, sets, strict=True)])


def measure_risk_coverage(labels: np.ndarray, probs: np.ndarray, refer: np.ndarray) -> dict[str, Any]:
    """Measure error against coverage, when only the most confident images are answered and others referred.

    Images of equal confidence share their mean risk, so their order does not matter.

    Args:
        labels: int (N,), 0..3.
        probs: float (N, 4).
        refer: bool (N,), decision of the bundle's referral rule, which may use more than confidence.

    Returns:
        `aurc` (mean error over all coverages) and `aurc_mae`; `curve` with up to 100 points of
        `coverage, error, mae`; `referral`, the point of the referral rule (risks None if it refers all).
    """
    confidence = probs.max(axis=1)
    distance = np.abs(labels - probs.argmax(axis=1)).astype(float)
    error = (distance > 0).astype(float)
    order = np.argsort(-confidence, kind="stable")
    ties = np.unique(-confidence[order], return_inverse=True)[1]
    ranks = np.arange(1, len(labels) + 1)
    risks = {
        name: np.cumsum((np.bincount(ties, loss[order]) / np.bincount(ties))[ties]) / ranks
        for name, loss in (("error", error), ("mae", distance))
    }
    shown = np.unique(np.linspace(0, len(labels) - 1, min(_CURVE_POINTS, len(labels))).round().astype(int))
    answered = ~refer
    return {
        "aurc": float(risks["error"].mean()),
        "aurc_mae": float(risks["mae"].mean()),
        "curve": {
            "coverage": (ranks[shown] / len(labels)).tolist(),
            **{name: risk[shown].tolist() for name, risk in risks.items()},
        },
        "referral": {
            "coverage": float(answered.mean()),
            "error": float(error[answered].mean()) if answered.any() else None,
            "mae": float(distance[answered].mean()) if answered.any() else None,
        },
    }


def measure_calibration(labels: np.ndarray, after: np.ndarray, before: np.ndarray | None) -> dict[str, Any]:
    """Measure ECE, ECE by chance and reliability bins, with and without the temperature.

    Args:
        labels: int (N,), 0..3.
        after: float (N, 4), calibrated probabilities.
        before: float (N, 4), probabilities without the temperature; None if unavailable.
    """
    measures = {
        "ece": metrics.expected_calibration_error,
        "if_calibrated": lambda _, probs: metrics.ece_if_calibrated(probs),
        "reliability": metrics.reliability,
    }
    return {
        "bins": f"{metrics.ECE_BINS} of equal width on the likeliest grade's probability",
        **{
            f"{name}_{when}": None if probs is None else measure(labels, probs)
            for name, measure in measures.items()
            for when, probs in (("before", before), ("after", after))
        },
    }


def ece_line(calibrated: Mapping[str, Any], when: Literal["before", "after"]) -> str:
    """Describe an ECE of `measure_calibration` next to the ECE by chance of a perfectly calibrated model."""
    ece, chance = calibrated[f"ece_{when}"], calibrated[f"if_calibrated_{when}"]
    return (
        "-"
        if ece is None
        else f"{ece:.3f} ({chance['mean']:.3f} expected of a perfectly calibrated model, 95 % of such up to "
        f"{chance['high']:.3f})"
    )


def score_other_symptoms(
    names: Sequence[str], labels: np.ndarray, answers: Mapping[str, np.ndarray], groups: Sequence[Any]
) -> dict[str, Any]:
    """Compute the metrics of the other symptoms, by name, each on the images with a label of it.

    Args:
        names: Names of the columns of `labels`.
        labels: int (N, S - 1), true grades; -1 without a label.
        answers: Predicted grades int (N,) of the graded symptoms, by name.
        groups: (N,), group of each image.

    Returns:
        `metrics.score` and its `intervals` by name; a symptom without a grade or a label is omitted.
    """
    scores = {}
    for name, grades in answers.items():
        truth = labels[:, names.index(name)]
        known = np.flatnonzero(truth >= 0)
        if len(known):
            within = [groups[place] for place in known.tolist()]
            scores[name] = {
                **metrics.score(truth[known], grades[known]),
                "intervals": bootstrap.bootstrap_grades(truth[known], grades[known], within),
            }
    return scores


def validation_metrics(
    labels: np.ndarray,
    before: np.ndarray,
    after: np.ndarray,
    groups: Sequence[Any],
    columns: Mapping[str, Sequence[str | None]],
) -> dict[str, Any]:
    """Compute the validation metrics of a bundle: all metrics, `intervals`, `calibration`, `slices`."""
    grades = after.argmax(axis=1)
    calibrated = measure_calibration(labels, after, before)
    return {
        **metrics.score(labels, grades),
        **metrics.score_probabilities(labels, after),
        "intervals": bootstrap.bootstrap_metrics(labels, after, groups),
        "calibration": {
            name: value for name, value in calibrated.items() if not name.startswith("reliability")
        },
        "slices": score_slices(labels, grades, groups, columns),
    }
