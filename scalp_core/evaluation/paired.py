"""Paired comparison of models on the same labeled images: differences with intervals over groups.

Two models that grade the same images err on the same hard ones, so the interval of the difference is much
narrower than those of the two models suggest. Each resample draws groups (microscopes or sessions), and
measures all models on it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from scalp_core.evaluation import bootstrap, metrics
from scalp_core.grades import GRADE_NAMES, NUM_GRADES

METRICS = {
    "qwk": "quadratic weighted kappa",
    "top1": "top-1 accuracy",
    **{f"recall_{name}": f"sensitivity, {name}" for name in GRADE_NAMES},
    "coverage": "grade sets with the label",
    "referred": "referred to a person",
    "wrong_among_answered": "wrong among answered",
}
"""Labels of the compared metrics, by name."""

LOWER_IS_BETTER = frozenset({"referred", "wrong_among_answered"})

_CELLS = NUM_GRADES**2


class Answers(NamedTuple):
    """Answers of one model.

    Args:
        grades: int (N,), 0..3.
        covered: bool (N,), whether the grade set holds the true grade.
        refer: bool (N,), whether a person should grade the image.
    """

    grades: np.ndarray
    covered: np.ndarray
    refer: np.ndarray


def resample_answers(
    labels: np.ndarray, models: Sequence[Answers], groups: Sequence[Any]
) -> tuple[list[dict[str, np.ndarray]], int]:
    """Measure models on the images, and on resamples of the groups that all models share.

    Args:
        labels: int (N,), 0..3.
        models: Answers of each model.
        groups: (N,), the microscope or session of each image.

    Returns:
        Per model, values (1 + B,) of `METRICS`, NaN where undefined: first of all images, then of B resamples
        (none for a single group). And the number of groups.
    """
    index = bootstrap.group_indices(groups)
    count = int(index.max()) + 1
    sums = [bootstrap.sums_by_group(_summands(labels, answers), index) for answers in models]
    weights: Iterable[np.ndarray] = [np.ones((1, count))]
    if count > 1:
        weights = chain(weights, bootstrap.resamples(count, count + sum(s.shape[1] for s in sums)))
    chunks = [[_measure(chunk @ of_model) for of_model in sums] for chunk in weights]
    return [
        {name: np.concatenate([chunk[model][name] for chunk in chunks]) for name in METRICS}
        for model in range(len(models))
    ], count


def compare_answers(labels: np.ndarray, models: Sequence[Answers], groups: Sequence[Any]) -> dict[str, Any]:
    """Compute the differences of each later model from the first, on the same images.

    Args:
        labels: int (N,), 0..3.
        models: Answers of two or more models.
        groups: (N,), the microscope or session of each image.

    Returns:
        `images, groups, resamples, seed, level`, and `differences`: per later model and metric `first`,
        `second`, `difference` (second minus first), `low`, `high` and `contains_zero`. Undefined values are
        None, and so are the last three for a single group.
    """
    (first, *others), count = resample_answers(labels, models, groups)
    record = {"images": len(labels), "groups": count, "resamples": bootstrap.RESAMPLES}
    return record | {
        "seed": bootstrap.SEED,
        "level": bootstrap.LEVEL,
        "differences": [compare_values(first, second, count) for second in others],
    }


def compare_values(
    first: Mapping[str, np.ndarray], second: Mapping[str, np.ndarray], groups: int
) -> dict[str, Any]:
    """Compute the differences of values (1 + B,) of `resample_answers`, as in `compare_answers`."""
    return {name: _difference(first[name], second[name], groups) for name in METRICS}


def measure_answers(labels: np.ndarray, answers: Answers, groups: Sequence[Any]) -> dict[str, Any]:
    """Measure one model: per metric of `METRICS` its `value`, `low` and `high` (None if undefined).

    Args:
        labels: int (N,), 0..3.
        answers: Answers of the model.
        groups: (N,), the microscope or session of each image.
    """
    (values,), count = resample_answers(labels, [answers], groups)
    return summarize_values(values, count)


def summarize_values(values: Mapping[str, np.ndarray], groups: int) -> dict[str, Any]:
    """Summarize values (1 + B,) of `resample_answers`, as `measure_answers`."""
    bounds = {name: _interval(drawn[1:], groups) for name, drawn in values.items()}
    return {
        name: {"value": _plain(values[name][0]), "low": low, "high": high}
        for name, (low, high) in bounds.items()
    }


def unseen_loss(metric: str, labels: np.ndarray, answers: Answers, confidence: float) -> float:
    """Return the loss of a metric that these images may miss, because they are few (rule of three).

    It is what -ln(1 - confidence) worse answers, three at 95 %, would cost: for kappa, answers that are one
    grade worse. A sample without any of them has at most this probability of a worse truth.
    """
    count = -np.log(1 - confidence)
    if metric == "qwk":
        spread = labels.var() + answers.grades.var() + (labels.mean() - answers.grades.mean()) ** 2
        images = len(labels) * spread  # the denominator of kappa
    elif metric.startswith("recall_"):
        images = (labels == GRADE_NAMES.index(metric.removeprefix("recall_"))).sum()
    elif metric == "wrong_among_answered":
        images = (~answers.refer).sum()
    else:
        images = len(labels)
    return float(count / images) if images else 0.0


def _difference(first: np.ndarray, second: np.ndarray, groups: int) -> dict[str, Any]:
    difference = second - first
    low, high = _interval(difference[1:], groups)
    return {
        "first": _plain(first[0]),
        "second": _plain(second[0]),
        "difference": _plain(difference[0]),
        "low": low,
        "high": high,
        "contains_zero": None if low is None or high is None else low <= 0 <= high,
    }


def _interval(drawn: np.ndarray, groups: int) -> tuple[float | None, float | None]:
    """Two-sided interval from resamples (B,), expanded for few groups; None for a single group."""
    high = bootstrap.upper_bound(drawn, groups, (1 + bootstrap.LEVEL) / 2)
    negative_low = bootstrap.upper_bound(-drawn, groups, (1 + bootstrap.LEVEL) / 2)
    return None if negative_low is None else -negative_low, high


def _summands(labels: np.ndarray, answers: Answers) -> np.ndarray:
    """Return the columns (N, 19) whose sums determine the metrics."""
    answered_wrong = (answers.grades != labels) & ~answers.refer
    cells = bootstrap.confusion_cells(labels, answers.grades)
    return np.column_stack([cells, answers.covered, answers.refer, answered_wrong])


def _measure(totals: np.ndarray) -> dict[str, np.ndarray]:
    """Compute the metrics (B,) from sums (B, 19) of `_summands`."""
    confusion = totals[:, :_CELLS].reshape(-1, NUM_GRADES, NUM_GRADES)
    covered, referred, wrong = totals[:, _CELLS:].T
    scores, images = metrics.score_confusion(confusion), totals[:, :_CELLS].sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return {
            "qwk": scores["qwk"],
            "top1": scores["top1"],
            **{f"recall_{name}": scores["recall"][:, grade] for grade, name in enumerate(GRADE_NAMES)},
            "coverage": covered / images,
            "referred": referred / images,
            "wrong_among_answered": wrong / (images - referred),
        }


def _plain(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
