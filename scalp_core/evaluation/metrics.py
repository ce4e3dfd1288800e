"""Metrics of predicted grades and probabilities.

An undefined metric (recall of a grade without images, AUROC of one class) is None. Averages over grades are
over those among the labels. docs/evaluation.md defines each metric; `bootstrap` computes the intervals.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from scalp_core.grades import NUM_GRADES, Grade

_DISTANCE = np.abs(np.subtract.outer(range(NUM_GRADES), range(NUM_GRADES)))

ECE_BINS = 15
_ECE_DRAWS = 1000
_ECE_CHUNK_CELLS = 2_000_000  # values in memory: draws times images
SPECIFICITY = 0.95
REFERABLE = Grade.MODERATE  # positive class of AUROC and sensitivity: this grade and above

PAPER_NOTE = (
    "The paper's 95.48 % is BinaryAccuracy over four one-hot outputs cut at 0.5, 1-(FP+FN)/(4N), where "
    "always being confidently wrong scores 50 % and no output above 0.5 scores 75 %; it goes with the "
    "precision (91.08 %) and recall (90.82 %) of its training, and its notebook's own test (84.61 %, "
    "precision 69.45 %, recall 68.62 %) means a top-1 accuracy of about 69 %."
)


def confusion(labels: np.ndarray, grades: np.ndarray) -> np.ndarray:
    """Count the confusion matrix, int (4, 4): rows are the labels, columns the predicted grades."""
    cells = np.asarray(labels) * NUM_GRADES + np.asarray(grades)
    return np.bincount(cells, minlength=NUM_GRADES**2).reshape(NUM_GRADES, NUM_GRADES)


def quadratic_weighted_kappa(matrix: np.ndarray) -> float:
    """Compute quadratic weighted kappa: agreement beyond chance; 1 is perfect, 0 is chance.

    A constant prediction gives 0 even if the labels are constant, so that epochs can be compared. `score`
    gives None there, because kappa is undefined.

    Args:
        matrix: int (4, 4) from `confusion`, of the whole set; kappas of batches cannot be averaged.
    """
    kappa = score_confusion(matrix[None])["qwk"][0]
    return 0.0 if np.isnan(kappa) else float(kappa)


def score(labels: np.ndarray, grades: np.ndarray) -> dict[str, Any]:
    """Compute the metrics of predicted grades.

    Args:
        labels: int (N,), 0..3.
        grades: int (N,), predicted, 0..3.
    """
    matrix = confusion(labels, grades)
    counts = {"support": matrix.sum(axis=1).tolist(), "confusion": matrix.tolist()}
    return {"n": len(labels), **_score_matrix(matrix), **counts}


def score_probabilities(labels: np.ndarray, probs: np.ndarray) -> dict[str, Any]:
    """Compute the metrics of predicted probabilities.

    Args:
        labels: int (N,), 0..3.
        probs: float (N, 4), each row sums to 1.
    """
    impossible = probs[np.arange(len(labels)), labels] == 0
    chance = ece_if_calibrated(probs)
    once = np.ones((1, len(labels)))
    referable = score_referable(labels >= REFERABLE, probs[:, REFERABLE:].sum(axis=1), once)
    return {
        **{name: _plain(value[0]) for name, value in referable.items()},
        "rps": float(ranked_probability_scores(labels, probs).mean()),
        "log_loss": None if impossible.any() else float(log_losses(labels, probs).mean()),
        "ece": expected_calibration_error(labels, probs),
        "ece_if_calibrated": chance["mean"],
        "ece_if_calibrated_95": chance["high"],
    }


def score_referable(positive: np.ndarray, severity: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    """Compute AUROC and sensitivity at `SPECIFICITY` for many weightings of the images: (B,); NaN: one class.

    Args:
        positive: bool (N,), whether the label is `REFERABLE` or above.
        severity: float (N,), probability of that.
        weights: float (B, N), number of times that each image counts.
    """
    order = np.argsort(severity, kind="stable")
    starts = np.flatnonzero(np.diff(severity[order], prepend=-1))  # equal severities are one threshold
    positive, weights = positive[order], weights[:, order]
    positives = np.add.reduceat(weights * positive, starts, axis=1)
    negatives = np.add.reduceat(weights * ~positive, starts, axis=1)
    below = np.cumsum(negatives, axis=1) - negatives
    all_positives, all_negatives = positives.sum(axis=1), negatives.sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        auroc = (positives * (below + negatives / 2)).sum(axis=1) / (all_positives * all_negatives)
        # At the lowest threshold with enough negatives below it; the tolerance includes 19 of 20.
        specific = below >= SPECIFICITY * all_negatives[:, None] - 1e-9
        sensitivity = (positives * specific).sum(axis=1) / all_positives
    return {
        "auroc": auroc,
        "sensitivity_at_95_specificity": np.where(all_negatives > 0, sensitivity, np.nan),
    }


def ranked_probability_scores(labels: np.ndarray, probs: np.ndarray) -> np.ndarray:
    """Compute the ranked probability score per image, float (N,) in 0..1.

    It is the mean squared distance of the cumulative probabilities from those of the label, over three steps.
    """
    steps = np.cumsum(probs, axis=1)[:, :-1] - (labels[:, None] <= np.arange(NUM_GRADES - 1))
    return (steps**2).sum(axis=1) / (NUM_GRADES - 1)


def log_losses(labels: np.ndarray, probs: np.ndarray) -> np.ndarray:
    """Compute -ln of the label's probability per image, float (N,); 0 counts as the smallest step."""
    of_label = probs[np.arange(len(labels)), labels]
    return -np.log(np.maximum(of_label, np.finfo(probs.dtype).eps))


def confidence_bins(probs: np.ndarray) -> np.ndarray:
    """Assign the likeliest grade's probability to one of `ECE_BINS` bins of equal width: int (N,)."""
    return np.minimum((probs.max(axis=1) * ECE_BINS).astype(int), ECE_BINS - 1)


def reliability(labels: np.ndarray, probs: np.ndarray) -> list[dict[str, Any]]:
    """Compute `low, high, n, confidence, top1` per confidence bin; the last two are None in empty bins."""
    bins, confidence = confidence_bins(probs), probs.max(axis=1)
    right = probs.argmax(axis=1) == labels
    rows: list[dict[str, Any]] = []
    for index in range(ECE_BINS):
        inside = bins == index
        rows.append(
            {
                "low": index / ECE_BINS,
                "high": (index + 1) / ECE_BINS,
                "n": int(inside.sum()),
                "confidence": float(confidence[inside].mean()) if inside.any() else None,
                "top1": float(right[inside].mean()) if inside.any() else None,
            }
        )
    return rows


def expected_calibration_error(labels: np.ndarray, probs: np.ndarray) -> float:
    """Compute the expected calibration error: mean gap of confidence and accuracy, weighted by bin size."""
    filled = [row for row in reliability(labels, probs) if row["n"]]
    return sum(row["n"] * abs(row["confidence"] - row["top1"]) for row in filled) / len(labels)


def ece_if_calibrated(probs: np.ndarray, seed: int = 0) -> dict[str, float]:
    """Compute the ECE that a perfectly calibrated model with these probabilities has by chance.

    Each draw decides from its confidence whether an image is right (consistency resampling: Bröcker and Smith
    2007, doi:10.1175/WAF993.1). The draws are independent. If images err together, for example those of one
    microscope, the ECE by chance is larger than this.

    Args:
        probs: float (N, 4), each row sums to 1; the order of the rows does not matter.
        seed: Random seed of the draws.

    Returns:
        `mean` of the draws, and `high`, their 95th percentile.
    """
    confidence = np.sort(probs.max(axis=1).astype(float))
    bins = confidence_bins(confidence[:, None])
    starts = np.flatnonzero(np.diff(bins, prepend=-1))
    rng, total = np.random.default_rng(seed), len(confidence)
    chunk = max(1, min(_ECE_DRAWS, _ECE_CHUNK_CELLS // total))
    drawn = []
    for start in range(0, _ECE_DRAWS, chunk):
        right = rng.random((min(chunk, _ECE_DRAWS - start), total)) < confidence
        gaps = np.add.reduceat(confidence - right, starts, axis=1)
        drawn.append(np.abs(gaps).sum(axis=1) / total)
    values = np.concatenate(drawn)
    return {"mean": float(values.mean()), "high": float(np.quantile(values, 0.95))}


def binary_accuracy(labels: np.ndarray, probs: np.ndarray) -> float:
    """Compute the paper's binary accuracy (`PAPER_NOTE`): share of outputs on the right side of 0.5."""
    return float(np.mean((probs > 0.5) == np.eye(NUM_GRADES, dtype=bool)[labels]))


def majority_baseline(labels: np.ndarray, majority: int) -> dict[str, Any]:
    """Compute the metrics of always predicting `majority`, the most common grade of the training split."""
    return score(labels, np.full_like(labels, majority))


def prior_baseline(labels: np.ndarray, counts: Sequence[int]) -> dict[str, Any]:
    """Compute the metrics of a predictor that knows only the grade frequencies of the training split.

    It assigns these frequencies as probabilities to each image, and draws the grade from them. The matrix of
    expected counts replaces the draw, so the result is deterministic: top-1, within-1, recall and errors are
    expectations over draws; kappa, F1 and precision are those of the expected matrix.

    Args:
        labels: int (N,), 0..3.
        counts: Training images per grade.
    """
    shares = np.asarray(counts) / np.sum(counts)
    support = np.bincount(labels, minlength=NUM_GRADES)
    values = _score_matrix(np.outer(support, shares))
    return {"n": len(labels), **values, **score_probabilities(labels, np.tile(shares, (len(labels), 1)))}


def score_confusion(matrices: np.ndarray) -> dict[str, np.ndarray]:
    """Compute the metrics of `score` for many confusion matrices: (B,), or (B, 4) per grade; NaN: undefined.

    Args:
        matrices: (B, 4, 4), counts or expected counts; rows are the labels.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        total = matrices.sum(axis=(1, 2))
        support, answered = matrices.sum(axis=2), matrices.sum(axis=1)
        right = np.diagonal(matrices, axis1=1, axis2=2)
        occurs = support > 0
        recall = right / support
        by_chance = (support[:, :, None] * answered[:, None, :] * _DISTANCE**2).sum(axis=(1, 2)) / total

        def mean(values: np.ndarray) -> np.ndarray:
            return np.where(occurs, values, 0).sum(axis=1) / occurs.sum(axis=1)

        return {
            "top1": right.sum(axis=1) / total,
            "within1": (matrices * (_DISTANCE <= 1)).sum(axis=(1, 2)) / total,
            "qwk": 1 - (matrices * _DISTANCE**2).sum(axis=(1, 2)) / by_chance,
            "macro_f1": mean(2 * right / (support + answered)),
            "balanced_accuracy": mean(recall),
            "mae": (matrices * _DISTANCE).sum(axis=(1, 2)) / total,
            "mae_macro": mean((matrices * _DISTANCE).sum(axis=2) / support),
            "recall": recall,
            "precision": right / answered,
        }


def _score_matrix(matrix: np.ndarray) -> dict[str, Any]:
    """Compute the metrics of one confusion matrix, with None for an undefined one."""
    values = score_confusion(matrix[None])
    return {
        name: list(map(_plain, value[0])) if value.ndim > 1 else _plain(value[0])
        for name, value in values.items()
    }


def _plain(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
