"""Bootstrap intervals of metrics, resampled by group.

Images of one microscope or session are not independent, so a resample draws as many groups as exist, with
replacement, and takes all images of each. Metrics are computed for many resamples at a time, from sums per
group or from ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from scalp_core.evaluation import metrics
from scalp_core.grades import NUM_GRADES

RESAMPLES = 1000
SEED = 0
LEVEL = 0.95
FEW_GROUPS = 10  # below it, percentile intervals are too narrow
_CHUNK_CELLS = 2_000_000  # weights in memory: resamples times images

Values = dict[str, np.ndarray]


def bootstrap_grades(
    labels: np.ndarray, grades: np.ndarray, groups: Sequence[Any], seed: int = SEED
) -> dict[str, Any]:
    """Compute intervals of the metrics of `metrics.score`, as in `bootstrap_metrics`."""
    index = group_indices(groups)
    sums = sums_by_group(confusion_cells(labels, grades), index)

    def values(weights: np.ndarray) -> Values:
        return metrics.score_confusion((weights @ sums).reshape(-1, NUM_GRADES, NUM_GRADES))

    return _intervals(values, index, len(labels), seed)


def bootstrap_metrics(
    labels: np.ndarray,
    probs: np.ndarray,
    groups: Sequence[Any],
    extra: dict[str, np.ndarray] | None = None,
    seed: int = SEED,
) -> dict[str, Any]:
    """Compute intervals of the metrics of `metrics.score` and `metrics.score_probabilities`.

    Args:
        labels: int (N,), 0..3.
        probs: float (N, 4).
        groups: (N,), group of each image; the images of a group are drawn together.
        extra: Additional values per image, float (N,) by name, whose means get intervals.
        seed: Random seed of the resamples.

    Returns:
        `groups, resamples, seed, level`, and per metric `low, high, undefined` (resamples omitted because the
        metric is undefined in them); recall and precision have a list of these per grade. None with a single
        group, or if the metric is undefined in all resamples.
    """
    index, extra = group_indices(groups), extra or {}
    means = {
        "rps": metrics.ranked_probability_scores(labels, probs),
        "log_loss": metrics.log_losses(labels, probs),
        **extra,
    }
    right, confidence = probs.argmax(axis=1) == labels, probs.max(axis=1)
    bins = np.eye(metrics.ECE_BINS)[metrics.confidence_bins(probs)]
    sums = sums_by_group(confusion_cells(labels, probs.argmax(axis=1)), index)
    mean_sums = sums_by_group(np.column_stack([np.ones(len(labels)), *means.values()]), index)
    gaps = sums_by_group(bins * (confidence - right)[:, None], index)
    positive, severity = labels >= metrics.REFERABLE, probs[:, metrics.REFERABLE :].sum(axis=1)

    def values(weights: np.ndarray) -> Values:
        totals = weights @ mean_sums
        return {
            **metrics.score_confusion((weights @ sums).reshape(-1, NUM_GRADES, NUM_GRADES)),
            **dict(zip(means, (totals[:, 1:] / totals[:, :1]).T, strict=True)),
            # The fraction of a bin times its gap is the gap of its sums divided by the number of images.
            "ece": np.abs(weights @ gaps).sum(axis=1) / totals[:, 0],
            **metrics.score_referable(positive, severity, weights[:, index]),
        }

    return _intervals(values, index, len(labels), seed)


def bootstrap_confusion(matrix: np.ndarray, seed: int = SEED) -> dict[str, Any]:
    """Compute intervals as `bootstrap_grades`, from counts (4, 4) alone: each image is its own group."""
    total = int(matrix.sum())
    drawn = np.random.default_rng(seed).multinomial(total, matrix.ravel() / total, size=RESAMPLES)
    values = metrics.score_confusion(drawn.reshape(-1, NUM_GRADES, NUM_GRADES))
    if total == 1:
        values = {name: np.full_like(value, np.nan, dtype=float) for name, value in values.items()}
    return _summaries(values)


def group_indices(groups: Sequence[Any]) -> np.ndarray:
    """Number the groups: return the group index of each image, int (N,), from 0."""
    return np.unique(np.asarray(groups, dtype=str), return_inverse=True)[1]


def confusion_cells(labels: np.ndarray, grades: np.ndarray) -> np.ndarray:
    """Return the confusion matrix of each image alone, float (N, 16)."""
    return np.eye(NUM_GRADES**2)[labels * NUM_GRADES + grades]


def sums_by_group(values: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Sum values (N, K) over the images of each group: float (groups, K)."""
    sums = np.zeros((index.max() + 1, values.shape[1]))
    np.add.at(sums, index, values)
    return sums


def resamples(groups: int, cells: int, seed: int = SEED) -> Iterator[np.ndarray]:
    """Draw groups with replacement, and yield chunks of the counts per group, float (B, groups).

    Args:
        groups: Number of groups.
        cells: Values that the caller holds per resample, which limit the size of a chunk.
        seed: Random seed of the draws.
    """
    rng = np.random.default_rng(seed)
    chunk = max(1, min(RESAMPLES, _CHUNK_CELLS // cells))
    for start in range(0, RESAMPLES, chunk):
        count = min(chunk, RESAMPLES - start)
        drawn = rng.integers(groups, size=(count, groups)) + groups * np.arange(count)[:, None]
        yield np.bincount(drawn.ravel(), minlength=count * groups).reshape(count, groups).astype(float)


def upper_bound(drawn: np.ndarray, groups: int, confidence: float) -> float | None:
    """Compute a one-sided upper confidence bound from resamples (B,); None if none is defined.

    The percentile is expanded for few groups (Hesterberg 2015, Am. Stat. 69).
    """
    from scipy.special import ndtr, stdtrit  # grading does not need it; `scipy.stats` takes 0.5 s to import

    defined = drawn[~np.isnan(drawn)]
    if not defined.size:
        return None
    expanded = ndtr(np.sqrt(groups / (groups - 1)) * stdtrit(groups - 1, confidence))
    return float(np.quantile(defined, expanded))


def _intervals(values: Any, index: np.ndarray, images: int, seed: int) -> dict[str, Any]:
    groups = int(index.max()) + 1
    record = {"groups": groups, "resamples": RESAMPLES, "seed": seed, "level": LEVEL}
    if groups == 1:
        names = values(np.ones((1, 1)))
        return record | {
            name: None if value.ndim == 1 else [None] * NUM_GRADES for name, value in names.items()
        }
    chunks = [values(weights) for weights in resamples(groups, images, seed)]
    drawn = {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}
    return record | _summaries(drawn)


def _summaries(drawn: Values) -> dict[str, Any]:
    return {
        name: _interval(value) if value.ndim == 1 else [_interval(column) for column in value.T]
        for name, value in drawn.items()
    }


def _interval(drawn: np.ndarray) -> dict[str, Any] | None:
    defined = drawn[~np.isnan(drawn)]
    if not defined.size:
        return None
    low, high = np.quantile(defined, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return {"low": float(low), "high": float(high), "undefined": int(drawn.size - defined.size)}
